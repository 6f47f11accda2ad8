"""What every grader returns: a value, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """The outcome for one item.

    ``value`` is None when the item cannot be scored; ``reason`` then says why. ``is_unparsed`` marks a
    reply from which no answer could be read under a definition that counts it as wrong (value 0).
    ``parts`` holds named sub-results, such as one entry per instruction.
    """

    value: float | None
    reason: str | None = None
    is_unparsed: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("an unscored item needs a reason")

    @property
    def is_scored(self) -> bool:
        return self.value is not None


def unscored(reason: str) -> Score:
    """An item that no definition lets us count: it leaves the mean and is shown next to it."""
    return Score(value=None, reason=reason)


def unparsed(reason: str) -> Score:
    """A reply without a readable answer, where the benchmark counts that as wrong."""
    return Score(value=0.0, reason=reason, is_unparsed=True)


def passed(is_right: bool) -> Score:
    return Score(value=1.0 if is_right else 0.0)
