"""Every kind of stage, by the name a recipe uses."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron4.synth.stage import Kind
from nemotron4.synth.stages import (
    asking,
    balance,
    dialogue,
    filtering,
    genetic,
    instructions,
    judging,
    own,
    questions,
    sources,
    topic_following,
    topics,
)

KINDS: Mapping[str, Kind] = {
    **topics.KINDS, **sources.KINDS, **questions.KINDS, **instructions.KINDS, **filtering.KINDS,
    **balance.KINDS, **asking.KINDS, **dialogue.KINDS, **topic_following.KINDS, **genetic.KINDS,
    **judging.KINDS, **own.KINDS,
}  # fmt: skip
