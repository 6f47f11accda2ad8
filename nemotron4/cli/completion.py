"""Completion of commands and options in bash, zsh and fish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from nemotron4.cli.commands import Command, load_app
from nemotron4.errors import unknown

_BASH = """\
_nemotron4() {
    local IFS=$'\\n'
    COMPREPLY=($(nemotron4 --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _nemotron4 nemotron4
"""
SCRIPTS = {
    "bash": _BASH,
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + _BASH,
    "fish": "complete -c nemotron4 -a '(nemotron4 --complete (commandline -opc)[2..] (commandline -ct))'\n",
}


def completion(shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print what a shell needs to complete commands and options.

    For bash and zsh: source <(nemotron4 completion bash). For fish: nemotron4 completion fish | source.
    """
    if shell not in SCRIPTS:
        raise unknown("shell", shell, SCRIPTS)
    print(SCRIPTS[shell], end="")


def candidates(words: Sequence[str], commands: Mapping[str, Command]) -> list[str]:
    """What the last of ``words`` may become; file names are left to the shell."""
    *before, last = words or [""]
    if not before:
        return [name for name in commands if name.startswith(last)]
    parser = _parser(before, commands)
    if parser is None:
        return []
    if not last.startswith("-"):
        return [name for name in getattr(parser, "commands", {}) if name.startswith(last)]
    spellings = [spelling for parameter in parser.params for spelling in parameter.opts]
    return [spelling for spelling in (*spellings, "--help") if spelling.startswith(last)]


def _parser(words: Sequence[str], commands: Mapping[str, Command]) -> Any:
    name, *rest = words
    if name not in commands:
        return None
    parser: Any = typer.main.get_command(load_app(name, commands[name]))
    for word in rest:
        parser = getattr(parser, "commands", {}).get(word, parser)
    return parser
