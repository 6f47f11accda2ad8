"""A content-safety classifier in front of the model: screens prompts, and answers before they are sent.

Blocking holds an answer back until it is judged, streams included. Annotating changes nothing but what is
reported. No verdict (a failed call, a reply that cannot be read) is its own outcome, open or closed as set.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemotron4.client import ChatModel, ClientError, Sampling
from nemotron4.errors import ConfigError
from nemotron4.records import Message
from nemotron4.server.context import ApiError, Metrics, RequestContext
from nemotron4.text.content_safety import (
    CATEGORIES,
    Judged,
    Policy,
    SafetyVerdict,
    parse_tolerant,
    question,
    raw_prompt,
    read_policy,
)

Outcome = Literal["safe", "unsafe", "unparsed", "failed"]
TIMEOUT_S = 30.0
MAX_REPLY_TOKENS = 100
HEADER = "X-Guard"


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """``mode`` block refuses what is unsafe, annotate reports it. ``failure`` is about block only."""

    mode: Literal["block", "annotate"] = "block"
    failure: Literal["open", "closed"] = "closed"
    is_permissive: bool = False  # Needs Caution alone counts as safe
    is_raw: bool = False  # the raw prompt of AEGIS' own classifiers, by /v1/completions
    policy: Policy | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", ("block", "annotate")), ("failure", ("open", "closed"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"guard {name} is {getattr(self, name)!r}; expected {' or '.join(known)}")


@dataclass(frozen=True)
class Screening:
    """What the classifier said of one prompt or answer."""

    outcome: Outcome
    codes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {"verdict": self.outcome, "categories": [f"{code} {CATEGORIES[code]}" for code in self.codes]}

    def __str__(self) -> str:
        return " ".join([self.outcome, *self.codes])


class Guard:
    """One classifier, shared by all requests. The caller closes it on the loop that used it."""

    def __init__(self, classifier: ChatModel, settings: GuardSettings) -> None:
        self.settings = settings
        self._classifier = classifier
        self._policy = settings.policy or read_policy()

    @property
    def is_blocking(self) -> bool:
        return self.settings.mode == "block"

    async def close(self) -> None:
        await self._classifier.close()

    async def screen_prompts(
        self, conversations: Sequence[Sequence[Message]], context: RequestContext, metrics: Metrics
    ) -> list[Screening]:
        """One screening each; ApiError if one is refused. System turns are the operator's and not judged."""
        talks = [[message for message in talk if message.role != "system"] for talk in conversations]
        found = await self._screen_all(talks, "user", context, metrics)
        for index, screening in enumerate(found):
            if self.is_refused(screening):
                where = f"Prompt {index + 1} of {len(found)}" if len(found) > 1 else "The prompt"
                raise refusal(screening, where)
        return found

    async def screen_answers(
        self, answers: Sequence[tuple[Sequence[Message], str]], context: RequestContext, metrics: Metrics
    ) -> list[Screening]:
        """One screening each. ApiError where no verdict came and the guard fails closed."""
        talks = [
            [*(m for m in prompt if m.role != "system"), Message("assistant", text)]
            for prompt, text in answers
        ]
        found = await self._screen_all(talks, "assistant", context, metrics)
        for screening in found:
            if screening.outcome != "unsafe" and self.is_refused(screening):
                raise refusal(screening, "The answer")
        return found

    def is_refused(self, screening: Screening) -> bool:
        if not self.is_blocking or screening.outcome == "safe":
            return False
        return screening.outcome == "unsafe" or self.settings.failure == "closed"

    async def _screen_all(
        self, talks: Sequence[Sequence[Message]], judged: Judged, context: RequestContext, metrics: Metrics
    ) -> list[Screening]:
        part = "prompt" if judged == "user" else "answer"
        found = await asyncio.gather(*(self._screen(talk, judged, part, metrics) for talk in talks))
        context.guard += [f"{part} {screening}" for screening in found]
        return list(found)

    async def _screen(
        self, talk: Sequence[Message], judged: Judged, part: str, metrics: Metrics
    ) -> Screening:
        started = time.monotonic()
        try:
            screening = self._read(parse_tolerant(await self._ask(question(talk, judged, self._policy))))
        except ClientError:
            screening = Screening("failed")
        metrics.guarded(part, screening.outcome, time.monotonic() - started)
        return screening

    async def _ask(self, asked: str) -> str:
        sampling = Sampling(max_tokens=MAX_REPLY_TOKENS, temperature=0.0)
        if self.settings.is_raw:
            return (await self._classifier.complete(raw_prompt(asked), sampling)).text
        return (await self._classifier.chat((Message("user", asked),), sampling)).text

    def _read(self, verdict: SafetyVerdict) -> Screening:
        is_unsafe = verdict.is_unsafe(is_permissive=self.settings.is_permissive)
        if is_unsafe is None:
            return Screening("unparsed")
        return Screening("unsafe" if is_unsafe else "safe", verdict.codes)


def refusal(screening: Screening, what: str) -> ApiError:
    """The error of a refused prompt, or of anything that got no verdict from a guard that fails closed."""
    if screening.outcome != "unsafe":
        text = f"{what} got no verdict from the content guard, which lets nothing pass unjudged. Try later."
        return ApiError(503, text, code="content_guard_unavailable")
    named = ", ".join(f"{code} {CATEGORIES[code]}" for code in screening.codes) or "no category given"
    return ApiError(400, f"{what} was refused by the content guard: {named}.", code="content_filter")


def report(prompts: Sequence[Screening], answers: Sequence[Screening]) -> dict[str, object]:
    """The field ``guard`` of an OpenAI answer: what was found, in the order of prompts and choices."""
    return {
        "prompts": [screening.to_json() for screening in prompts],
        "answers": [screening.to_json() for screening in answers],
    }


def header(prompts: Sequence[Screening], answers: Sequence[Screening]) -> dict[str, str]:
    """The same for ``/generate``, whose body is NeMo's and stays so."""
    shown = [f"prompt={screening}" for screening in prompts] + [
        f"answer={screening}" for screening in answers
    ]
    return {HEADER: "; ".join(shown)}
