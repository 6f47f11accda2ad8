"""The ``nemotron4`` command: a table of sub-commands, each imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron4 import __version__
from nemotron4.errors import Nemotron4Error, unknown_name

if TYPE_CHECKING:
    import typer


class Command(NamedTuple):
    """Where a sub-command lives (``module:attribute``, a function or a typer group) and its line of help."""

    target: str
    help: str


# One line for each sub-command, in the order of a user's journey. The help text stands here and not in the
# module, so that `nemotron4 --help` imports none of them.
COMMANDS: dict[str, Command] = {
    "pull": Command("nemotron4.cli.pull:pull", "Fetch a model into the cache."),
    "serve": Command("nemotron4.cli.serve:serve", "Put a model on a port: PUT /generate and OpenAI routes."),
    "chat": Command("nemotron4.cli.chat:chat", "Chat with a model in the terminal."),
    "generate": Command("nemotron4.cli.generate:generate", "Answer a file of prompts."),
    "plan": Command("nemotron4.cli.plan:plan", "Say which GPUs a model needs, and why."),
    "convert": Command("nemotron4.cli.convert:convert", "Write a checkpoint in another form."),
    "train": Command("nemotron4.cli.train:train", "Train or align a model as a recipe says."),
    "doctor": Command("nemotron4.cli.doctor:app", "Look for what would go wrong later."),
    "synth": Command("nemotron4.cli.synth:app", "Make synthetic training data."),
    "eval": Command("nemotron4.cli.eval:app", "Measure a model by the card's benchmarks."),
    "redteam": Command("nemotron4.cli.redteam:app", "Attack a model and keep what came of it."),
    "launch": Command("nemotron4.cli.launch:app", "Start jobs on a cluster, and the card's own scripts."),
}

USAGE = "Usage: nemotron4 COMMAND [OPTIONS]..."
OPTIONS = {"--help": "Show this text; after a command, that command's own.", "--version": "Show the version."}

USAGE_ERROR = 2
INTERRUPTED = 130
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
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head`). What is still buffered goes nowhere, without a message at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Nemotron4Error as error:
        return _fail(error.message, error.hint)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}no space left on the disk", "free some space, then repeat the command")
    return status


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
    if not arguments or arguments[0] in ("--help", "-h"):
        print(help_text(commands))
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"nemotron4 {__version__}")
        return 0
    if name.startswith("-"):
        return _fail(*unknown_name("option", name, OPTIONS), status=USAGE_ERROR)
    if name not in commands:
        return _fail(*unknown_name("command", name, commands), status=USAGE_ERROR)
    return _run(name, commands[name], rest)


def load_app(name: str, command: Command) -> typer.Typer:
    """Import a sub-command; a plain function is made into an app of one command."""
    import typer

    module, attribute = command.target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return target
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, help=target.__doc__ or command.help)(target)
    return app


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
        return _fail(*_usage_problem(error, f"nemotron4 {name}"), status=USAGE_ERROR)
    return result if isinstance(result, int) else 0


def _usage_problem(error: Exception, command: str) -> tuple[str, str]:
    """Message and hint for arguments that the parser refused."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else command
    option = getattr(error, "option_name", None)
    if context is not None and option is not None and hasattr(error, "possibilities"):
        known = [spelling for parameter in context.command.params for spelling in parameter.opts]
        message, hint = unknown_name("option", option, [*(k for k in known if k.startswith("-")), "--help"])
        return message, f"{hint} See `{path} --help`"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return message[:1].lower() + message[1:].rstrip("."), f"see `{path} --help`"


def _fail(message: str, hint: str | None, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return status
