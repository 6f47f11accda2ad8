"""Answers to prompts: several of one model or of several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.client import BadContentError, Reply, Sampling
from nemotron4.records import Message
from nemotron4.synth.rows import Answered, Prompt, Response, Row
from nemotron4.synth.stage import Context, Kind


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
        calls=lambda knobs: knobs.k, fan_out=lambda knobs: 1,
    ),
}  # fmt: skip
