"""What policy-gradient training asks of the outside: answers to prompts, and what they are worth.

Training may import neither the engine that generates nor the graders that judge; it knows them by these
protocols alone. ``nemotron4.feedback`` implements them, and the command line hands them in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.model.transformer import Transformer
from nemotron4.training.formats import Prompt
from nemotron4.training.packing import Sample

if TYPE_CHECKING:
    from nemotron4.training.recipe import Recipe


@dataclass(frozen=True)
class PromptSample(Sample):
    """A prompt: one segment that trains nothing, and the row that the judges read."""

    prompt: Prompt = ""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Draw:
    """One answer to be generated. ``seed``, prompt and weights decide it, and nothing else does."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Continuation:
    """A generated answer. ``logprobs`` are the sampler's, at temperature 1, in nats."""

    token_ids: tuple[int, ...]  # with the stop token, if one was drawn
    text: str  # without it
    is_finished: bool  # False: cut at max_new_tokens
    logprobs: tuple[float, ...]


class Generate(Protocol):
    def __call__(
        self,
        net: Transformer,
        draws: Sequence[Draw],
        *,
        max_new_tokens: int,
        temperature: float,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Continuation]:
        """One continuation for each draw, in order, by the weights that ``net`` has now.

        ``on_progress`` hears now and then how many are finished and how many tokens there are.
        """
        ...


@dataclass(frozen=True)
class Answer:
    """What a judge sees: the prompt, the answer's text, and the prompt's whole row."""

    prompt: Prompt
    text: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A reward, or the reason why there is none; never a default."""

    value: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.value is not None or self.reason, "an answer without a reward needs a reason"


class Judge(Protocol):
    @property
    def identity(self) -> str:
        """Changes when the same answers could get other rewards; part of the run's fingerprint."""
        ...

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]: ...


@dataclass(frozen=True)
class Outside:
    """The two together, made for one recipe."""

    generate: Generate
    judge: Judge


Connect = Callable[["Recipe", Checkpoint], Outside]


def draw_seed(seed: int, step: int, place: int, answer: int) -> int:
    """The seed of one answer of one step: a resumed run draws what the interrupted one would have drawn."""
    digest = hashlib.blake2b(f"{seed}/{step}/{place}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
