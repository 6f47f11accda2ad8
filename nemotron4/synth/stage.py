"""What a stage is, and what its function may use: calls, prompt texts, seeded choices, counters."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemotron4.client import Reply, Reward, Sampling
from nemotron4.errors import Nemotron4Error
from nemotron4.records import JsonObject, Message
from nemotron4.synth.rows import Row


class Filtered(Nemotron4Error):  # noqa: N818 - a decision, not an error
    """A row leaves the pipeline by a rule; not a failure. ``rule`` is counted, the message is kept."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class Context(Protocol):
    """One piece of work, seen from its stage's function.

    The function must be deterministic apart from the replies: after a kill it runs again from the start, and
    the calls it has paid for are answered from the ledger.
    """

    @property
    def max_repairs(self) -> int: ...

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        sample: int = 0,
        endpoint: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_logprobs: int | None = None,
    ) -> Reply: ...

    async def score(self, messages: Sequence[Message], *, endpoint: str | None = None) -> Reward: ...

    def prompt(self, name: str, **values: object) -> str:
        """A prompt text of the book with its placeholders filled in."""
        ...

    def random(self, purpose: str) -> random.Random:
        """A generator seeded by the run's seed, this record and the purpose."""
        ...

    def count(self, name: str, value: float = 1.0) -> None:
        """Add to a counter of the stage; stored with the work's effects."""
        ...


MapFunction = Callable[[Any, Context, Any], Awaitable[Sequence[Row | None]]]
Drop = tuple[str, str]  # rule, reason
BarrierFunction = Callable[[Iterable[tuple[bytes, Any]], Any], Mapping[bytes, Drop]]
RootFunction = Callable[[Any], Iterable[JsonObject]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of stage.

    run: rows made of one row; None in the list stands for "the row itself passes". Raises Filtered to drop
    it. decide: for stages that must see all rows at once, the rows to drop. roots: for sources.
    version: raise it when the code changes what the stage makes.
    """

    summary: str
    takes: tuple[type, ...]
    makes: type | None  # None: the type it takes
    knobs: type
    run: MapFunction | None = None
    decide: BarrierFunction | None = None
    roots: RootFunction | None = None
    prompts: tuple[str, ...] = ()
    sampling: Sampling | None = None  # the default; None: this stage makes no calls
    version: int = 1
    calls: Callable[[Any], float] | None = None  # expected calls per row, for `plan`
    fan_out: Callable[[Any], float] | None = None  # expected rows per row, for `plan`


@dataclass(frozen=True)
class NoKnobs:
    """For stages without any setting."""
