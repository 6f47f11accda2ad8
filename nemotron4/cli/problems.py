"""What is wrong with a command line: every problem of it, not only the first that the parser meets."""

from __future__ import annotations

from typing import Any

import typer

from nemotron4.cli import synonyms
from nemotron4.errors import unknown_name

Problem = tuple[str, str]  # what is wrong, what to do


def find_problems(error: Exception, words: list[str], command: str) -> list[Problem]:
    """All problems of ``words``, which follow the name ``command``; ``error`` is the first of them."""
    context: Any = getattr(error, "ctx", None)
    if context is None:
        return [_explained(error, command)]
    depth = len(context.command_path.split()) - len(command.split())
    return _of_command(context, words[depth:]) or [_explained(error, command)]


def _of_command(context: Any, words: list[str]) -> list[Problem]:
    command, found = context.command, []
    if hasattr(command, "commands"):  # a group, whose only fault is the name of its command
        return []
    given: dict[str, Any] | None = None
    order: list[Any] = []
    has_unknown = False
    while given is None:
        try:
            given, rest, order = command.make_parser(context).parse_args(args=list(words))
        except typer.TyperException as error:
            name = getattr(error, "option_name", None)
            without = _without(words, name)
            if name is None or without == words:
                return []
            words = without
            has_unknown = has_unknown or hasattr(error, "possibilities")
            found.append(_explained(error, context.command_path))
    for parameter in sorted(
        command.params, key=lambda each: order.index(each) if each in order else len(order)
    ):
        if parameter.is_eager:  # --help
            continue
        try:
            _, rest = parameter.handle_parse_result(context, given, rest)
        except typer.TyperException as error:
            found.append(_explained(error, context.command_path))
    if rest and not has_unknown:  # else they may be the values of what is unknown
        found.append((f"unexpected: {' '.join(map(str, rest))}", f"see `{context.command_path} --help`"))
    return found


def _without(words: list[str], option: str | None) -> list[str]:
    """The words but for the first that is the option (``--name`` or ``--name=value``)."""
    for index, word in enumerate(words):
        if word.split("=")[0] == option:
            return words[:index] + words[index + 1 :]
    return words


def _explained(error: Exception, command: str) -> Problem:
    """Message and hint for one thing that the parser refused."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else command
    option = getattr(error, "option_name", None)
    if context is not None and option is not None and hasattr(error, "possibilities"):
        known = [spelling for parameter in context.command.params for spelling in parameter.opts]
        options = [*(spelling for spelling in known if spelling.startswith("-")), "--help"]
        arguments = [
            p.metavar for p in context.command.params if p.param_type_name == "argument" and p.metavar
        ]
        message, hint = unknown_name("option", option, options)
        if hasattr(context.command, "commands"):  # options belong to the commands of a group
            hint = f"give a command first: {', '.join(context.command.commands)}"
        hint = synonyms.ours(option, path, options, arguments) or hint
        return message, f"{hint} (see `{path} --help`)"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = " ".join(message.split()).replace(": Value error, ", ": ").replace(": Input should", ": should")
    return message[:1].lower() + message[1:].rstrip("."), f"see `{path} --help`"
