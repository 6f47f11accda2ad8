"""A stand-in for garak with its command line, plugin list and report; see ``__main__``."""
