"""What policy-gradient training asks for: answers to prompts, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nemotron4.training.rows import Prompt
from nemotron4.training.samples import Sample
from nemotron4.training.stopping import StopSwitch

if TYPE_CHECKING:
    from nemotron4.checkpoint.interface import Checkpoint
    from nemotron4.inference.rollouts import RolloutEngine
    from nemotron4.training.recipe import Recipe


@dataclass(frozen=True)
class PromptSample(Sample):
    """A prompt: one segment that trains nothing, and the row that the judges read."""

    prompt: Prompt = ""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Answer:
    """What a judge sees: the prompt, the answer's text, and the prompt's whole row."""

    prompt: Prompt
    text: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class RewardVerdict:
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

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]: ...


@dataclass(frozen=True)
class RolloutBackend:
    """What writes the answers of one recipe, and what judges them."""

    generate: RolloutEngine
    judge: Judge
    stop: StopSwitch  # which the judge obeys


Connect = Callable[["Recipe", "Checkpoint"], RolloutBackend]
