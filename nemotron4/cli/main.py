"""The ``nemotron4`` command: finds the sub-command, runs it, explains what went wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from nemotron4 import __version__
from nemotron4.cli.commands import COMMANDS, HELP_NAMES, Command, load_app
from nemotron4.errors import Nemotron4Error, TerminatedError, unknown_name

USAGE = "Usage: nemotron4 COMMAND [OPTIONS]..."
OPTIONS = {
    "-h, --help": "Show this text; after a command, that command's own (also: nemotron4 help COMMAND).",
    "--version": "Show the version.",
}

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one sub-command; the exit status is 0, 1 (explained error), 2 (wrong usage) or 130 (Ctrl-C).

    Data goes to stdout, errors and progress to stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return explained(lambda: _dispatch(words, commands))


def explained(run: Callable[[], int]) -> int:
    """The exit status of ``run``; what a user or a full disk caused is told in words."""
    try:
        status = run()
        sys.stdout.flush()
    except TerminatedError:
        return TERMINATED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head`). What is still buffered goes nowhere, without a message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Nemotron4Error as error:
        for each in (error, *error.others):
            _fail(each.message, each.hint)
        return 1
    except OSError as error:
        if os.environ.get("NEMOTRON4_TRACEBACK"):
            raise
        return _fail(*_system_problem(error))
    return status


def _system_problem(error: OSError) -> tuple[str, str]:
    """Message and hint for what the operating system refused."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the disk", "free some space, then repeat the command"
    reason = error.strerror or str(error) or type(error).__name__
    hints = {
        errno.ENOENT: "check the path; a missing folder is not made for you",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EISDIR: "name a file, not a folder",
        errno.EACCES: "check the owner and the permissions of the path",
        errno.EROFS: "name a path on a disk that can be written",
        errno.EADDRINUSE: "another program listens there: give another --port",
    }
    hint = hints.get(error.errno or 0, "NEMOTRON4_TRACEBACK=1 shows where it happened")
    return f"{where}{reason[:1].lower()}{reason[1:]}", hint


def help_text(commands: Mapping[str, Command] = COMMANDS) -> str:
    """What ``nemotron4 --help`` prints."""
    from nemotron4 import __doc__ as summary

    width = max((len(name) for name in (*commands, *OPTIONS)), default=0) + 2
    lines = [USAGE, "", f"  {summary}", "", "Commands:"]
    lines += [f"  {name:<{width}}{command.help}" for name, command in commands.items()]
    lines += ["", "Options:"]
    lines += [f"  {name:<{width}}{text}" for name, text in OPTIONS.items()]
    return "\n".join(lines)


def _dispatch(arguments: list[str], commands: Mapping[str, Command]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP_NAMES:
        print(help_text(commands))
        return 0
    name, *rest = arguments
    if name in ("--version", "version"):
        print(f"nemotron4 {__version__}")
        return 0
    if name == "--complete":
        from nemotron4.cli.completion import candidates

        print(*candidates(rest, commands), sep="\n")
        return 0
    if name.startswith("-"):
        return _fail(*unknown_name("option", name, ("--help", "--version")), status=USAGE_ERROR)
    if name not in commands:
        from nemotron4.cli.problems import elsewhere

        if hint := elsewhere(name):
            return _fail(f"unknown command {name!r}", hint, status=USAGE_ERROR)
        return _fail(*unknown_name("command", name, (*commands, "help", "version")), status=USAGE_ERROR)
    return _run(name, commands[name], rest)


def _run(name: str, command: Command, arguments: list[str]) -> int:
    import typer

    parser = typer.main.get_command(load_app(name, command))
    if not arguments and hasattr(parser, "commands"):
        arguments = ["--help"]
    try:
        result = parser.main(arguments, prog_name=f"nemotron4 {name}", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except typer.TyperException as error:
        from nemotron4.cli.problems import find_problems

        for problem in find_problems(error, arguments, f"nemotron4 {name}"):
            _fail(*problem)
        return USAGE_ERROR
    return result if isinstance(result, int) else 0


def _fail(message: str, hint: str | None, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return status
