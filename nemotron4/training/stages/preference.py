"""Preference training: DPO, IPO, RPO and KTO against cached reference log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nemotron4.records import FieldError, Message
from nemotron4.training import kto, prompts, rows
from nemotron4.training.encoding import Encoder, RowError, RowKind
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.prompts import PromptKind
from nemotron4.training.rollout_settings import RolloutSection
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.samples import Sample
from nemotron4.training.stage import Objective, Stage
from nemotron4.training.stages.sft import merging, never_stops


@dataclass(frozen=True, kw_only=True)
class PairRow:
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    strength: float | None = None
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class PairKind(RowKind):
    """A prompt with a chosen and a rejected answer, in the forms that ``read_pair`` knows."""

    name = "preference"
    needs_rewards: bool = False

    def parse(self, row: Fields) -> PairRow:
        return read_pair(row)

    def sample(self, row: PairRow, encoder: Encoder) -> Sample:
        if row.chosen == row.rejected:
            raise RowError("chosen and rejected are equal")
        labels: tuple[float, ...] = ()
        if row.chosen_reward is not None and row.rejected_reward is not None:
            labels = (row.chosen_reward, row.rejected_reward)
        elif self.needs_rewards:
            name = "chosen_reward" if row.chosen_reward is None else "rejected_reward"
            raise RowError(f"field {name!r} is missing; loss rpo needs both rewards and assumes none")
        answers = (row.chosen, row.rejected)
        return Sample(tuple(encoder.answer(row.prompt, text, row.tools) for text in answers), labels)

    def findings(self, row: PairRow, sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
        yield from never_stops(sample, encoder)
        if row.chosen_reward is None or row.rejected_reward is None:
            yield "without_rewards", "no rewards: loss rpo would refuse the row"
        elif row.chosen_reward < row.rejected_reward:
            yield "inverted_rewards", f"chosen has {row.chosen_reward:g}, rejected {row.rejected_reward:g}"
        elif row.chosen_reward == row.rejected_reward:
            yield "equal_rewards", f"both answers have reward {row.chosen_reward:g}"
        yield from merging(row.prompt, [row.chosen, row.rejected], encoder)

    def numbers(self, row: PairRow) -> Mapping[str, float]:
        found = {} if isinstance(row.prompt, str) else {"turns": float(len(row.prompt) + 1)}
        named = (("chosen_reward", row.chosen_reward), ("rejected_reward", row.rejected_reward))
        return found | {name: value for name, value in named if value is not None}


# ---- forms of pairs

REWARD_NAMES = (
    ("chosen_reward", "rejected_reward"),
    ("score_chosen", "score_rejected"),  # UltraFeedback binarized
    ("chosen-rating", "rejected-rating"),  # its cleaned form
    ("rating_chosen", "rating_rejected"),  # Capybara's pairs
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)


def read_pair(row: Fields) -> PairRow:
    """Ours and TRL's, NeMo-Aligner's, NeMo-RL's, UltraFeedback's, HelpSteer2's and 3's, HH, Orca, PKU."""
    if "completions" in row:
        return _nemo_rl_pair(row)
    if "better_response_id" in row:
        return _safe_pair(row)
    if "response_1" in row or "response1" in row:
        return _helpsteer_pair(row)
    names = ("chosen_response", "rejected_response") if "chosen_response" in row else ("chosen", "rejected")
    missing = [name for name in names if row.row.get(name) is None]
    if missing:
        raise FieldError(
            f"field {missing[0]!r} is missing; expected {names[0]} and {names[1]}, or context and completions"
        )
    chosen, rejected = (row.row[name] for name in names)
    if isinstance(chosen, list) and isinstance(rejected, list) and max(len(chosen), len(rejected)) > 1:
        return _whole_conversations(row, *(rows.messages(row, name) for name in names))
    question = rows.asked(row)
    if question is None and "prompt" not in row:
        if not isinstance(chosen, str) or not chosen.startswith(("\n\nHuman:", "\n\nAssistant:")):
            raise FieldError("field 'prompt' is missing; two texts have no certain common prompt")
        return _whole_conversations(row, *(rows.spoken_turns(row.text(name), name) for name in names))
    is_turn = isinstance(chosen, list) or isinstance(rejected, list)
    prompt = rows.prompt(row, "prompt", is_turn=is_turn) if question is None else question
    return _rewarded(row, prompt, rows.answer(row, names[0]), rows.answer(row, names[1]))


def _rewarded(row: Fields, prompt: Prompt, chosen: str, rejected: str) -> PairRow:
    """The pair with its rewards, by the first pair of names of which the row has one."""
    names = next((both for both in REWARD_NAMES if any(name in row for name in both)), REWARD_NAMES[0])
    return PairRow(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_reward=row.number(names[0]),
        rejected_reward=row.number(names[1]),
        strength=row.number("margin"),
        tools=rows.tools(row),
    )


def _whole_conversations(row: Fields, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> PairRow:
    """Two whole conversations whose common beginning is the prompt; other columns may repeat parts of it."""
    if chosen[:-1] != rejected[:-1]:
        raise FieldError("chosen and rejected differ before their last message; expected one common prompt")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant" or len(messages) < 2:
            raise FieldError(f"field {name!r} does not end with an assistant's answer to a prompt")
    prompt = chosen[:-1]
    if "prompt" in row:
        given = row["prompt"]
        said = [m.content for m in prompt if m.role == "user"]
        if isinstance(given, str) and given.strip() not in {text.strip() for text in said}:
            raise FieldError("field 'prompt' is none of the user's turns in chosen and rejected")
        if isinstance(given, list) and (whole := rows.messages(row, "prompt")) != prompt[-len(whole) :]:
            raise FieldError("field 'prompt' is not how chosen and rejected begin")
    if "messages" in row and rows.messages(row, "messages") not in (chosen, prompt):
        raise FieldError("field 'messages' is neither the chosen conversation nor the prompt")
    if prompt[0].role != "system":
        prompt = (*rows.system(row), *prompt)
    return _rewarded(
        row, prompt, rows.plain_answer(chosen[-1], "chosen"), rows.plain_answer(rejected[-1], "rejected")
    )


def _nemo_rl_pair(row: Fields) -> PairRow:
    """``{"context", "completions": [{"rank", "completion": [...], "reward"?}, ...]}``; rank 0 is best."""
    context = (*rows.system(row), *rows.messages(row, "context"))
    completions = row.require("completions", list, "a list of two completions")
    if len(completions) != 2 or not all(isinstance(item, dict) for item in completions):
        raise FieldError(f"field 'completions' has {len(completions)} entries; expected two objects")
    fields = [Fields(item) for item in completions]
    ranks = [item.require("rank", int, "an integer") for item in fields]
    if ranks[0] == ranks[1]:
        raise FieldError(f"both completions have rank {ranks[0]}; expected different ranks, 0 the best")
    best, worst = fields if ranks[0] < ranks[1] else fields[::-1]
    pair = PairRow(
        prompt=context,
        chosen=rows.answer(best, "completion"),
        rejected=rows.answer(worst, "completion"),
        chosen_reward=best.number("reward"),
        rejected_reward=worst.number("reward"),
        tools=rows.tools(row),
    )
    for item in fields:
        row.left_inside("completions", item.unread())
    return pair


def _helpsteer_pair(row: Fields) -> PairRow:
    """HelpSteer2-Preference and HelpSteer3: a strength of -3 to 3, negative when the first one is better."""
    is_third = "response1" in row
    name = "overall_preference" if is_third else "preference_strength"
    names = ("response1", "response2") if is_third else ("response_1", "response_2")
    strength = float(row.require(name, (int, float), "a number from -3 to 3"))
    first, second = row.text(names[0]), row.text(names[1])
    if strength == 0:
        raise FieldError(f"field {name!r} is 0: neither response is better")
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    prompt = rows.messages(row, "context") if "context" in row else rows.marked_turns(row.text("prompt"))
    return PairRow(
        prompt=(*rows.system(row), *prompt), chosen=chosen, rejected=rejected, strength=abs(strength)
    )


def _safe_pair(row: Fields) -> PairRow:
    """PKU-SafeRLHF: ``better_response_id`` names one of two responses."""
    better = row.require("better_response_id", int, "0 or 1")
    if better not in (0, 1):
        raise FieldError(f"field 'better_response_id' is {better}; expected 0 or 1")
    answers = [row.text(f"response_{i}") for i in (0, 1)]
    prompt = (*rows.system(row), Message("user", row.text("prompt")))
    return PairRow(prompt=prompt, chosen=answers[better], rejected=answers[1 - better])


class PreferenceStage(Stage):
    name = "preference"
    section = PreferenceSection
    needed = "loss and beta"
    kinds = (PairKind(), kto.JudgedKind(), PromptKind())
    examples: ClassVar = {loss: {"loss": loss, "beta": 0.1} for loss in ("dpo", "ipo", "rpo", "kto")} | {
        f"online_{loss}": {
            "loss": loss,
            "beta": 0.1,
            "pairs": "online",
            "rollouts": {"rewards": [{"kind": "gsm8k"}]},
        }
        for loss in ("dpo", "rpo")
    }

    def check(self, recipe: Any) -> None:
        if recipe.settings.rollouts is not None:
            prompts.check_rollouts(recipe, recipe.settings.rollouts)

    def named(self, table: dict[str, Any], reward_model: str | None) -> dict[str, Any]:
        if not isinstance(table.get("rollouts"), dict):
            return table
        return table | {"rollouts": prompts.with_reward_model(table["rollouts"], reward_model)}

    def has_reference(self, settings: PreferenceSection) -> bool:
        return settings.rollouts is None

    def rollouts(self, settings: PreferenceSection) -> RolloutSection | None:
        return settings.rollouts

    def trainer(self, settings: PreferenceSection) -> Any:
        if settings.rollouts is None:
            return None
        from nemotron4.training.online import online_pair_trainer

        return online_pair_trainer

    def kind(self, settings: PreferenceSection) -> RowKind:
        if settings.rollouts is not None:
            return prompts.prompt_kind(settings.rollouts)
        if settings.loss == "kto":
            return kto.JudgedKind()
        return PairKind(needs_rewards=settings.loss == "rpo")

    def objective(self, settings: PreferenceSection) -> Objective:
        from nemotron4.training.objectives import JudgedObjective, PairObjective

        return JudgedObjective(settings) if settings.loss == "kto" else PairObjective(settings)


STAGE = PreferenceStage()
