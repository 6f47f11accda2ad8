"""Asking for an answer that is not blank, and for a list until it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.client import BadContentError, Reply, Sampling
from nemotron4.records import Message
from nemotron4.synth.parsing import ParsedList, normalise, parse_list
from nemotron4.synth.rows import Answered, Prompt, Response, Row
from nemotron4.synth.stage import Context, Kind

MAX_ITEMS_PER_CALL = 20
LIST_PROMPTS = ("list_form", "list_more", "list_convert")


async def ask_list(
    context: Context, question: str, n: int, *, is_single_line: bool = False, max_characters: int = 2000
) -> list[str]:
    """``n`` different items. At most 20 are asked for at a time, and the next round shows what exists.

    A short list is topped up, ``max_repairs`` rounds without any new item end it. More items than asked for
    are all kept. No item at all is a BadContentError; a shortfall is counted as ``items_missing``.
    """
    items: list[str] = []
    seen: set[str] = set()
    last: Reply | None = None
    sample = fruitless = 0
    while len(items) < n and fruitless <= context.max_repairs:
        wanted = min(n - len(items), MAX_ITEMS_PER_CALL)
        form = context.prompt("list_more", n=wanted, existing=_bullets(items)) if items else None
        request = f"{question}\n\n{form or context.prompt('list_form', n=wanted)}"
        last = await context.chat((Message("user", request),), sample=sample)
        sample += 1
        new = _new_items(_parsed(last, wanted), seen, is_single_line, max_characters)
        items += new
        fruitless = 0 if new else fruitless + 1
    if not items and last is not None:
        items = await _convert(context, last, n, sample, is_single_line, max_characters)
    context.count("items_requested", n)
    context.count("items_made", len(items))
    if len(items) < n:
        context.count("items_missing", n - len(items))
    if not items:
        raise BadContentError(f"no list item in {sample} replies, the last: {_shown(last)}", kind="no_list")
    return items


def _parsed(reply: Reply, expected: int) -> ParsedList:
    return parse_list(reply.text, expected=expected, is_truncated=reply.finish_reason == "length")


def _new_items(parsed: ParsedList, seen: set[str], is_single_line: bool, max_characters: int) -> list[str]:
    new = []
    for item in parsed.items:
        text = item.text.splitlines()[0].strip() if is_single_line else item.text
        key = normalise(text)
        if key and key not in seen and len(text) <= max_characters:
            seen.add(key)
            new.append(text)
    return new


async def _convert(
    context: Context, reply: Reply, n: int, sample: int, is_single_line: bool, max_characters: int
) -> list[str]:
    """A model copies the items out; only what is in the reply, whole words, is taken."""
    if not reply.text.strip():
        return []
    request = context.prompt("list_convert", reply=reply.text)
    converted = await context.chat((Message("user", request),), sample=sample, temperature=0.0)
    source = f" {normalise(reply.text)} "
    found = _new_items(_parsed(converted, n), set(), is_single_line, max_characters)
    return [item for item in found if f" {normalise(item)}" in source]


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def _shown(reply: Reply | None) -> str:
    return repr("" if reply is None else reply.text[:160])


@dataclass(frozen=True)
class RespondKnobs:
    """``k`` answers. With several ``endpoints``, each prompt gets a draw of them, different if possible."""

    k: int = 2
    endpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; expected 1 or more")


async def answer(
    context: Context, messages: Sequence[Message], *, sample: int, endpoint: str | None = None
) -> Reply:
    """A reply that is not blank; a blank one is drawn again with a new sample index."""
    for repair in range(context.max_repairs + 1):
        reply = await context.chat(messages, sample=sample + 100 * repair, endpoint=endpoint)
        if reply.text.strip():
            return reply
    raise BadContentError(f"{context.max_repairs + 1} blank replies", kind="blank")


async def ask_yes_no(context: Context, question: str) -> bool:
    """By the first word of the reply, asked again while it is neither."""
    for sample in range(context.max_repairs + 1):
        reply = await context.chat((Message("user", question),), sample=sample)
        first = (reply.text.split() or [""])[0].strip(".,:;!*\"'").lower()
        if first in ("yes", "no"):
            return first == "yes"
    raise BadContentError(f"neither Yes nor No, but {reply.text[:80]!r}", kind="no_verdict")


async def respond(prompt: Prompt, context: Context, knobs: RespondKnobs) -> Sequence[Row]:
    """Prompt -> the prompt with k answers."""
    order: list[str | None] = [] if knobs.endpoints else [None] * knobs.k
    while len(order) < knobs.k:
        order += context.random("endpoints").sample(knobs.endpoints, len(knobs.endpoints))
    responses = []
    for sample, endpoint in enumerate(order[: knobs.k]):
        reply = await answer(context, prompt.messages, sample=sample, endpoint=endpoint)
        responses.append(
            Response(
                text=reply.text.strip(),
                model=reply.model,
                sample=sample,
                finish_reason=reply.finish_reason,
                tokens=reply.completion_tokens,
            )
        )
    return [Answered(prompt=prompt, responses=tuple(responses))]


KINDS = {
    "respond": Kind(
        summary="several answers to each prompt",
        takes=(Prompt,), makes=Answered, knobs=RespondKnobs, run=respond,
        sampling=Sampling(temperature=0.8, top_p=1.0, max_tokens=1024),
        answers=lambda knobs: knobs.k, calls=lambda knobs: knobs.k, fan_out=lambda knobs: 1,
    ),
}  # fmt: skip
