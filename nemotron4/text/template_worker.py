"""Renders one chat template in a process of its own; run by ``chat_template.py``, never imported.

A template is a program that a stranger wrote. The kernel ends this process when a rendering takes too much
processor time, refuses it memory above a limit, and lets it write no file. One JSON object per line: first
the template and its limits, then one request per line, each answered by one line.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Around what an assistant wrote; random, so that no message can hold them.
START, END = (f"\ufdd0{secrets.token_hex(8)}" for _ in range(2))


class GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant wrote: the text inside is between START and END."""

    tags = {"generation"}  # noqa: RUF012 - the form that jinja2 declares

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{START}{caller()}{END}"


def compile_template(source: str, date: str | None) -> jinja2.Template:
    """The template with the names and settings that transformers gives to chat templates.

    ``date``: the day that it writes, at noon, in place of now.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now(date).strftime(form)
    return environment.from_string(source)


def now(date: str | None) -> datetime.datetime:
    return datetime.datetime.fromisoformat(f"{date}T12:00") if date else datetime.datetime.now()


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(template: jinja2.Template, variables: dict[str, Any], max_characters: int) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        parts.append(part)
        length += len(part)
        if length > max_characters:
            raise jinja2.TemplateError(f"the text is longer than {max_characters} characters")
    return "".join(parts)


def without_marks(text: str) -> dict[str, Any]:
    """The text, and the (start, end) of each part that a template marked."""
    if START not in text:
        return {"text": text}
    plain, spans = "", []
    for number, part in enumerate(re.split(f"{START}|{END}", text)):
        if number % 2:
            spans.append((len(plain), len(plain) + len(part)))
        plain += part
    return {"text": plain, "spans": spans}


def set_limits(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # macOS knows the limit and refuses to set it.
    if sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    set_limits(settings["memory_bytes"])
    template: jinja2.Template | None = None
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        # SIGPROF keeps its default effect, which ends the process even inside one long operation.
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_time_s"])
        try:
            template = template or compile_template(settings["template"], settings["date"])
            result = without_marks(render(template, request["variables"], request["max_characters"]))
        except MemoryError:
            result = {"error": "it needs more memory than a template may use"}
        except RecursionError:
            result = {"error": "it nests too deeply"}
        except Exception as error:  # whatever the template raised, in its own words
            result = {"error": f"{error}" or type(error).__name__, "line": getattr(error, "lineno", None)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(result)


if __name__ == "__main__":
    main()
