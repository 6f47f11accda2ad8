"""Prompts to be answered: what a row of them is, and what stages share that draw answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron4.errors import ConfigError
from nemotron4.records import FieldError
from nemotron4.training import rows
from nemotron4.training.encoding import Encoder, RowError, RowKind
from nemotron4.training.rollout_settings import PREVIOUS, RolloutSection
from nemotron4.training.rollouts import PromptSample
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.samples import Sample, Segment

ASKED = ("instruction", "question")
NAMES = ("prompt", "messages", *ASKED, "context", "text")  # the first that is there is the prompt
SHOWN = ("messages", "images", "image", "videos", "video", "audio", "documents", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to be answered, and the whole row, in which judges find what they compare with."""

    prompt: Prompt
    fields: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class PromptKind(RowKind):
    """``prompt`` or ``messages``, a text or messages that end before an answer; a question; NeMo's ``text``.

    A prompt leaves room for ``num_new`` tokens and has what its judges read: ``row_fields``.
    """

    name = "prompts"
    trains_text = False
    num_new: int = 0
    needs_messages: bool = False
    row_fields: tuple[str, ...] = ()
    is_row_judged: bool = False  # by judges that may read every field

    def parse(self, row: Fields) -> PromptRow:
        name = next((name for name in NAMES if name in row), "")
        if not name:
            raise rows.no_form(row, "prompt, messages, question or text")
        if name in ASKED and "context" in row:
            raise FieldError(
                f"the prompt may be {name!r} or 'context'; name one as prompt in the source's map"
            )
        prompt: Prompt = (rows.asked(row) if name in ASKED else None) or rows.prompt(row, name)
        if not isinstance(prompt, str) and prompt[-1].role == "assistant":
            raise FieldError(
                f"field {name!r} ends with an assistant's message; expected the turn to be answered"
            )
        if not prompt:
            raise FieldError(f"field {name!r} is empty; expected a prompt")
        tools = rows.tools(row)
        for other in row:  # what a prompt shows, or a second one, nobody would see
            is_judged = self.is_row_judged or other not in NAMES or other in self.row_fields
            if is_judged and other not in SHOWN:
                row.get(other)
        return PromptRow(prompt=prompt, fields=row.row, tools=tools)

    def sample(self, row: PromptRow, encoder: Encoder) -> Sample:
        if self.needs_messages and isinstance(row.prompt, str):
            raise RowError("the prompt is rendered text; a reward model judges lists of messages")
        missing = [name for name in self.row_fields if row.fields.get(name) is None]
        if missing:
            raise RowError(f"field {missing[0]!r} is missing; the reward compares with it")
        segment = encoder.open_prompt(row.prompt, row.tools)
        total = len(segment.tokens) + self.num_new
        if total > encoder.max_length:
            raise RowError(
                f"{total} tokens with {self.num_new} new ones; data.max_length is {encoder.max_length}"
            )
        return PromptSample((segment,), prompt=row.prompt, fields=row.fields)

    def numbers(self, row: PromptRow) -> Mapping[str, float]:
        return {} if isinstance(row.prompt, str) else {"turns": float(len(row.prompt))}


def prompt_kind(settings: RolloutSection) -> PromptKind:
    return PromptKind(
        settings.max_new_tokens,
        any(reward.needs_messages for reward in settings.rewards),
        tuple(name for reward in settings.rewards for name in reward.row_fields),
        any(reward.kind in ("python", "genrm") for reward in settings.rewards),
    )


def check_rollouts(recipe: Any, settings: RolloutSection) -> None:
    """ConfigError for settings that do not go with drawing answers."""
    if recipe.batch.ramp:
        raise ConfigError(f"batch.ramp has no meaning in stage {recipe.stage}, whose samples are prompts")
    if settings.max_new_tokens >= recipe.data.max_length:
        raise ConfigError(
            f"{settings.table}.max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt in "
            f"data.max_length ({recipe.data.max_length})"
        )


def longest_answers(settings: RolloutSection, samples: Sequence[Sample]) -> list[Sample]:
    """The prompts with as many answers to each as are drawn, at their longest."""
    new = settings.max_new_tokens
    answered = (
        Sample((Segment((*s.segments[0].tokens, *[0] * new), (*s.segments[0].is_trained, *[True] * new)),))
        for s in samples
    )
    return [sample for sample in answered for _ in range(settings.group_size)]


def with_reward_model(table: dict[str, Any], reward_model: str | None) -> dict[str, Any]:
    """The chain's reward model where ``rewards`` or the critic say "previous"."""

    def name(each: Any, key: str) -> Any:
        if not isinstance(each, dict) or each.get(key) != PREVIOUS:
            return each
        if reward_model is None:
            raise ConfigError(
                f"{key} 'previous' is the model of a stage of kind reward; none is before this one"
            )
        return each | {key: reward_model}

    changed = dict(table)
    if isinstance(changed.get("rewards"), list):
        changed["rewards"] = [name(each, "model") for each in changed["rewards"]]
    if "critic" in changed:
        changed["critic"] = name(changed["critic"], "start")
    return changed
