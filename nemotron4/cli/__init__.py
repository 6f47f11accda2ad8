"""The command line: one file per sub-command, imports inside the commands."""
