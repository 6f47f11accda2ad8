"""What a reasoning model thinks before it answers, kept apart from the answer."""

from __future__ import annotations

import dataclasses
import re

from nemotron4.client.interface import Reply

_OPENING = re.compile(r"^[^\S\n]*<(think|thinking)>", re.MULTILINE)
# Some chat templates open the block in the prompt, so that the reply only closes it.
_LONE_CLOSING = re.compile(r"^[^\S\n]*</think(?:ing)?>|</think(?:ing)?>[^\S\n]*$", re.MULTILINE)


def split_thoughts(text: str) -> tuple[str, str | None]:
    """(answer, thoughts). A block that is never closed has no answer after it; without any block, None."""
    opening = _OPENING.search(text)
    lone = _LONE_CLOSING.search(text)
    if lone is not None and (opening is None or lone.start() < opening.start()):
        rest, more = split_thoughts(text[lone.end() :])
        return rest.lstrip("\n"), _joined(text[: lone.start()], more)
    if opening is None:
        return text, None
    inside, closing, after = text[opening.end() :].partition(f"</{opening[1]}>")
    if not closing:
        return text[: opening.start()].rstrip(), inside.strip()
    rest, more = split_thoughts(after.lstrip())
    before = text[: opening.start()]
    return f"{before}{rest}" if before.strip() else rest, _joined(inside, more)


def without_thoughts(reply: Reply) -> Reply:
    text, thoughts = split_thoughts(reply.text)
    return reply if thoughts is None else dataclasses.replace(reply, text=text, thoughts=thoughts)


def _joined(first: str, second: str | None) -> str:
    return "\n\n".join(part for part in (first.strip(), second) if part)
