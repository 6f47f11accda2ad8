"""Requests that can never succeed, and what they count as: for a run and for stored answers alike.

A request is named by its item, ``ID~2`` in epoch 2, and ``ID#1`` for part 1 of a judgment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from nemotron4.errors import Nemotron4Error
from nemotron4.evaluation.result import Result
from nemotron4.evaluation.task import Item, Task

OnFailure = Literal["wrong", "exclude", "stop"]

# How reasons begin for which an item is not in the numbers though the benchmark counts it.
TOO_LONG, REFUSED = "prompt does not fit the context", "request refused"
NO_RESPONSE, NO_JUDGMENT = "no response", "no judgment"
MISSING = (NO_RESPONSE, NO_JUDGMENT, TOO_LONG, REFUSED)


@dataclass(frozen=True, kw_only=True)
class FailedRequests:
    """Request -> kind of its failure, for answers and judgments."""

    on_failure: OnFailure
    responses: Mapping[str, str] = field(default_factory=dict)
    judgments: Mapping[str, str] = field(default_factory=dict)

    def are_wrong(self, num_requests: int) -> bool:
        """Whether failed answers count as wrong ones; where nothing was answered there is no score."""
        return self.on_failure == "wrong" and num_requests > len(self.responses)


def request_name(item: str, epoch: int) -> str:
    return item if epoch == 1 else f"{item}~{epoch}"


def judgment_name(item: str, part: int) -> str:
    return f"{item}#{part}"


def wrong_items(items: Sequence[Item], epochs: int, failures: FailedRequests) -> list[tuple[int, Item]]:
    """(epoch from 1, item) of each failed answer that counts as an empty one."""
    if not failures.are_wrong(len(items) * epochs):
        return []
    return [
        (epoch, item)
        for epoch in range(1, epochs + 1)
        for item in items
        if request_name(item.id, epoch) in failures.responses
    ]


def stopped(task: Task, request: str, message: str, hint: str | None = None) -> Nemotron4Error:
    """What a run of this policy ends with."""
    return Nemotron4Error(
        f"{task.name}: request {request} failed: {message}",
        hint=hint or "what was answered is kept; see --on-failure",
    )


def with_failures(result: Result, failures: FailedRequests, *, is_judged: bool) -> Result:
    """Failed requests by their reason: among the unscored, or as a note where they count as wrong."""
    unscored, notes = dict(result.unscored), list(result.notes)
    are_wrong = failures.are_wrong(result.num_items * result.epochs)
    answers = "left out", None if is_judged else NO_RESPONSE
    if are_wrong:
        answers = "requests were judged as empty answers" if is_judged else "requests count as wrong", None
    stages = ((failures.responses, *answers), (failures.judgments, "judgments left out", NO_JUDGMENT))
    for failed, what, missing in stages:
        if not failed:
            continue
        reasons = Counter(_reason(kind) for kind in failed.values())
        named = ", ".join(list(failed)[:5]) + (" ..." if len(failed) > 5 else "")
        notes.append(f"{len(failed)} {what} ({', '.join(reasons)}): {named}")
        if missing is not None:
            left = Counter(unscored) + reasons
            left[missing] -= len(failed)
            unscored = {reason: count for reason, count in left.items() if count > 0}
    return replace(result, unscored=unscored, notes=tuple(notes))


def _reason(kind: str) -> str:
    return TOO_LONG if kind == "context_length" else f"{REFUSED}: {kind}"
