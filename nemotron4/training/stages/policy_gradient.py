"""Policy-gradient training on prompts: their answers are generated and judged by what the caller hands in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from nemotron4.errors import ConfigError
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Transformer
from nemotron4.records import FieldError
from nemotron4.training import parallel, rows
from nemotron4.training.encoding import Encoder, RowError, RowKind
from nemotron4.training.loading import Origin, build_critic
from nemotron4.training.packing import Sample, Segment
from nemotron4.training.policy import PREVIOUS, ActorObjective, PolicyGradientSection
from nemotron4.training.policy_trainer import PolicyTrainer
from nemotron4.training.reference import model_hash
from nemotron4.training.rollouts import Connect, PromptSample
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.scorer import PolicyScorer, Scorer
from nemotron4.training.sharded import Grid
from nemotron4.training.stage import Objective, Stage


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

    def parse(self, row: Fields) -> PromptRow:
        prompt: Prompt | None = rows.asked(row)
        name = "question" if "question" in row else "instruction"
        if prompt is None:
            name = next((name for name in ("prompt", "messages", "context", "text") if name in row), "")
            if not name:
                raise rows.no_form(row, "prompt, messages, question or text")
            prompt = rows.prompt(row, name)
        if not isinstance(prompt, str) and prompt[-1].role == "assistant":
            raise FieldError(
                f"field {name!r} ends with an assistant's message; expected the turn to be answered"
            )
        if not prompt:
            raise FieldError(f"field {name!r} is empty; expected a prompt")
        tools = rows.tools(row)
        for other in row:  # the judges are given the whole row
            row.get(other)
        return PromptRow(prompt=prompt, fields=row.row, tools=tools)

    def sample(self, row: PromptRow, encoder: Encoder) -> Sample:
        if self.needs_messages and isinstance(row.prompt, str):
            raise RowError("the prompt is rendered text; a reward model judges lists of messages")
        missing = [name for name in self.row_fields if name not in row.fields]
        if missing:
            raise RowError(f"field {missing[0]!r} is missing; the reward compares with it")
        segment = encoder.open_prompt(row.prompt, row.tools)
        total = len(segment.tokens) + self.num_new
        if total > encoder.max_length:
            raise RowError(
                f"{total} tokens with {self.num_new} new ones; data.max_length is {encoder.max_length}"
            )
        return PromptSample((segment,), prompt=row.prompt, fields=row.fields)


def policy_trainer(
    origin: Origin,
    grid: Grid | None,
    device: torch.device,
    connect: Connect,
) -> Callable[..., PolicyTrainer]:
    """A trainer with judges, and with the reference and critic that the recipe asks for."""
    recipe, base = origin.recipe, origin.base
    settings: PolicyGradientSection = recipe.settings
    reference = None
    if settings.kl_coefficient and recipe.adapter is None:
        reference = parallel.build(origin, grid, device, is_frozen=True)
    backend = connect(recipe, base)
    identity = [backend.judge.identity]
    critic = None
    if settings.has_critic:
        scorer = build_critic(recipe, base, origin.config)
        identity.append(model_hash(scorer.net))
        critic = parallel.distribute(scorer.to(device), grid, device, compute=origin.compute)
    return partial(
        PolicyTrainer,
        backend=backend,
        identity=identity,
        skeleton=origin.policy,
        reference=reference,
        critic=critic,
    )


class PolicyGradientStage(Stage):
    name = "policy-gradient"
    section = PolicyGradientSection
    needed = "algorithm and rewards"
    kinds = (PromptKind(),)
    examples: ClassVar = {
        name: {"algorithm": name, "rewards": [{"kind": "gsm8k"}]} for name in ("grpo", "ppo", "reinforce")
    }

    def check(self, recipe: Any) -> None:
        settings: PolicyGradientSection = recipe.settings
        if recipe.batch.ramp:
            raise ConfigError("batch.ramp has no meaning in stage policy-gradient")
        if recipe.adapter is not None and recipe.adapter.modules_to_save and settings.kl_coefficient:
            raise ConfigError(
                "adapter.modules_to_save changes what the KL is measured from",
                hint="set policy_gradient.kl_coefficient = 0, or leave modules_to_save out",
            )
        if settings.max_new_tokens >= recipe.data.max_length:
            raise ConfigError(
                f"policy_gradient.max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt in "
                f"data.max_length ({recipe.data.max_length})"
            )

    def named(self, table: dict[str, Any], reward_model: str | None) -> dict[str, Any]:
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

    def kind(self, settings: PolicyGradientSection) -> RowKind:
        return PromptKind(
            settings.max_new_tokens,
            any(reward.needs_messages for reward in settings.rewards),
            tuple(name for reward in settings.rewards for name in reward.row_fields),
        )

    def objective(self, settings: PolicyGradientSection) -> Objective:
        return ActorObjective(settings)

    def scorer(self, net: Transformer | RewardModel, settings: PolicyGradientSection) -> Scorer:
        assert isinstance(net, Transformer), "a policy is a language model"
        return PolicyScorer(net, temperature=settings.temperature)

    def num_samples(self, settings: PolicyGradientSection) -> int:
        return settings.num_prompts

    def planned(self, settings: PolicyGradientSection, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Answers to each prompt, at their longest."""
        new = settings.max_new_tokens
        answered = (
            Sample(
                (Segment((*s.segments[0].tokens, *[0] * new), (*s.segments[0].is_trained, *[True] * new)),)
            )
            for s in samples
        )
        return [sample for sample in answered for _ in range(settings.group_size)]

    def trainer(self) -> Any:
        return policy_trainer


STAGE = PolicyGradientStage()
