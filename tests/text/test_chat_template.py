from __future__ import annotations

import gc
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from nemotron4.errors import TemplateError
from nemotron4.text.chat_template import MAX_TEMPLATE_CHARACTERS, ChatTemplate

MESSAGES = {"messages": [{"role": "user", "content": "<b> \u00e9 \U0001f389"}], "add_generation_prompt": True}


def render(source: str) -> str:
    return ChatTemplate(source).render(MESSAGES)


def test_templates_have_what_transformers_gives_them() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "<b> é 🎉"}]'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{% generation %}a{{ messages[0].content[:3] }}{% endgeneration %}z") == "a<b>z"
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{{ nothing }}") == ""


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a' * 99) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (NESTED, "more than 0.3 s of processor time"),
        (DOUBLING, "more than 0.3 s of processor time|more memory"),
        ("{{ 'a' * 10000000000 }}", "more memory"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than [0-9]+ characters"),
        ("{{ range(99999999) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deeply"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('only users') }}", "chat template: only users"),
        ("\n\n{% if %}", "chat template:3: "),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_hostile_or_broken_template_ends_in_an_error(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, cpu_time_s=0.3).render(MESSAGES)


def test_a_template_that_was_ended_renders_again() -> None:
    template = ChatTemplate(
        "{% if messages[0].content == 'loop' %}" + NESTED + "{% endif %}fine", cpu_time_s=0.3
    )
    with pytest.raises(TemplateError, match="processor time"):
        template.render({"messages": [{"role": "user", "content": "loop"}]})
    assert template.render(MESSAGES) == "fine"


def test_a_template_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(TemplateError, match=f"{MAX_TEMPLATE_CHARACTERS + 1} characters; expected at most"):
        ChatTemplate(" " * (MAX_TEMPLATE_CHARACTERS + 1))


def test_threads_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}!")
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = template.render({"messages": [{"role": "user", "content": str(number)}]})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}!" for number in range(8)}


def test_long_contents_pass() -> None:
    text = "word " * 400_000
    assert ChatTemplate("{{ messages[0].content }}").render({"messages": [{"content": text}]}) == text


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table of Linux")
def test_no_process_is_left_when_the_template_is_gone() -> None:
    before = children()
    template = ChatTemplate("x")
    template.render(MESSAGES)
    assert len(children() - before) == 1
    del template
    gc.collect()
    assert not children() - before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table of Linux")
def test_a_process_that_something_else_ended_costs_no_request() -> None:
    before = children()
    template = ChatTemplate("fine")
    template.render(MESSAGES)
    (process,) = children() - before
    os.kill(int(process), signal.SIGKILL)
    assert template.render(MESSAGES) == "fine"
    assert children() - before != {process}
