"""Token sequences to train on. No torch, so that what only reads or tokenizes rows starts quickly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

SHORTEST_SHARED = 16  # a shorter common beginning saves less than its pieces cost


@dataclass(frozen=True)
class Segment:
    """One token sequence; ``is_trained[i]`` says whether token i is a target (the first never is)."""

    tokens: tuple[int, ...]
    is_trained: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.is_trained), "one flag per token"

    @property
    def num_trained(self) -> int:
        """Trained tokens that have a predecessor to be predicted from."""
        return sum(self.is_trained[1:])


@dataclass(frozen=True)
class Sample:
    """One unit of the loss: a text, a pair (chosen, rejected), or an answer with its mismatched twin.

    ``labels`` are the stage's own numbers: rewards of a pair, attributes, desirability. ``where`` is the
    row's ``file:line`` for messages.
    """

    segments: tuple[Segment, ...]
    labels: tuple[float, ...] = ()
    where: str = ""
    reference: tuple[float, ...] = ()  # log-probability of each segment under the reference model, nats
    was_cut: bool = False  # to the recipe's length; told when the row is encoded

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @cached_property
    def num_shared(self) -> int:
        """Tokens that all segments begin with and none trains, if there are enough to be worth it."""
        if len(self.segments) < 2:
            return 0
        num = min(len(segment.tokens) for segment in self.segments) - 1
        first = self.segments[0].tokens
        for segment in self.segments:
            pairs = enumerate(zip(first[:num], segment.tokens, segment.is_trained, strict=False))
            num = next((i for i, (a, b, trained) in pairs if a != b or (trained and i)), num)
        return num if num >= SHORTEST_SHARED else 0

    @property
    def packed_tokens(self) -> int:
        """What the sample takes of a row."""
        return self.num_tokens - (len(self.segments) - 1) * self.num_shared


class SampleSequence(Sequence[Sample]):
    """Samples made when they are asked for, by ``sample``."""

    @abstractmethod
    def sample(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index)
