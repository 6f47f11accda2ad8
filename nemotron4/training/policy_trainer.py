"""The loop of policy-gradient training: prompts, answers, rewards, advantages, updates.

One step of the run is one round of answers; the updates within it share its learning rate. The answers always
come from the latest weights. Of several processes each writes and judges its share of them; what follows from
all answers, as the advantages, is computed on every process alike.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nemotron4.engine import SamplingParams, SamplingRequest, derive_seed
from nemotron4.errors import TrainingError
from nemotron4.model.transformer import Transformer
from nemotron4.records import Generation
from nemotron4.training import checkpoints
from nemotron4.training.dataset import epoch_order
from nemotron4.training.engine import StepOutcome, TrainingEngine, add_totals
from nemotron4.training.losses import Row, actor_critic_advantages, advantages_of_group, token_kl
from nemotron4.training.metrics import peak_memory_bytes
from nemotron4.training.packing import Segment
from nemotron4.training.policy import (
    AnswerSample,
    CriticObjective,
    PolicyGradientSection,
)
from nemotron4.training.reference import as_base, base_samples
from nemotron4.training.rollouts import Answer, PromptSample, RewardVerdict, RolloutBackend
from nemotron4.training.sampler import Sampler
from nemotron4.training.trainer import Trainer, apply_gradients, build_optimizer, learning_rate


@dataclass(frozen=True)
class Judged:
    """One answer of a step. ``prompt`` is the place of its prompt among the step's prompts."""

    prompt: int
    generation: Generation
    verdict: RewardVerdict
    sample: AnswerSample


class PolicyTrainer(Trainer):
    """A trainer whose samples are prompts. ``reference`` is a frozen policy; with adapters there is none.

    Take ``critic`` for PPO: an engine on a value model. ``identity`` changes with what rewards and values
    come from; ``skeleton`` is that of a ``Sampler``.
    """

    has_own_validation = False

    def __init__(
        self,
        *arguments: Any,
        backend: RolloutBackend,
        identity: Sequence[str],
        skeleton: Callable[[], Transformer],
        reference: TrainingEngine | None,
        critic: TrainingEngine | None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.settings: PolicyGradientSection = self.recipe.settings
        self.sampler = Sampler(self.engine, backend.generate, skeleton, self.on_part)
        self.judge = backend.judge
        self.reference = reference
        self.critic = critic
        self.critic_objective = CriticObjective(self.settings.critic)
        self.critic_settings = replace(
            self.rates,
            learning_rate=self.settings.critic.learning_rate,
            min_learning_rate=0.0,
        )
        self.critic_optimizer: torch.optim.AdamW | None = None
        if critic is not None:
            self.critic_optimizer = build_optimizer(critic.trainable, self.critic_settings)
        self.fingerprint = hashlib.sha256(" ".join([self.fingerprint, *identity]).encode()).hexdigest()[:32]

    # ---- one step

    def _train_step(self) -> None:
        if self._step == 0 and self.validation:
            self._validate()  # what the start gives, so that the curve has its beginning
        started = time.perf_counter()
        # Not asked of the optimiser: a step without updates leaves it at an earlier one's.
        rate = learning_rate(self._step, self.plan.num_steps, self.rates)
        torch.manual_seed(self.recipe.run.seed * 1_000_003 + self._step)
        answers = self._roll_out(self.batch(self._step, self._seen), self.settings.group_size)
        seconds = {"rollout_seconds": time.perf_counter() - started}
        metrics = rollout_metrics(answers)
        scored = self._scored(self._usable(answers))
        metrics |= divergences(scored, self.settings.temperature)
        metrics |= self._learn(self._advantages(scored))
        self._seen += self.plan.sizes[self._step]
        self._step += 1
        tokens = sum(len(answer.sample.segments[0].tokens) for answer in answers)
        seconds["seconds"] = time.perf_counter() - started
        self._write(
            {
                **metrics,
                "learning_rate": rate,
                "tokens": float(tokens),
                "tokens_per_s": tokens / seconds["seconds"],
                **seconds,
                "memory_gb": peak_memory_bytes(self.engine.device) / 1e9,
                "samples_seen": float(self._seen),
            },
            "train",
        )

    def first_samples(self) -> list[AnswerSample]:
        """What the run's first step trains on, for a look at its loss without a step."""
        answers = self._roll_out(self.batch(0, 0), self.settings.group_size)
        return self._advantages(self._scored(self._usable(answers)))

    def _roll_out(self, prompts: Sequence[Any], group_size: int, *, is_greedy: bool = False) -> list[Judged]:
        """Answers to the prompts, ``group_size`` side by side for each, and their rewards."""
        params = SamplingParams(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=0.0 if is_greedy else self.settings.temperature,
            logprobs=0,
        )
        # A resumed run draws what the interrupted one would have drawn.
        seed = partial(derive_seed, self.recipe.run.seed, self._step)
        requests = [
            SamplingRequest(prompt.segments[0].tokens, replace(params, seed=seed(place, answer)))
            for place, prompt in enumerate(prompts)
            for answer in range(group_size)
        ]
        found = self.sampler(requests)
        owners: list[PromptSample] = [prompt for prompt in prompts for _ in range(group_size)]
        answers = [Answer(o.prompt, c.text, o.fields) for o, c in zip(owners, found, strict=True)]
        verdicts = self.engine.joined(self.judge(self.engine.share(answers)))
        return [
            Judged(i // group_size, found[i], verdicts[i], _answer_sample(owners[i], found[i]))
            for i in range(len(owners))
        ]

    def _usable(self, answers: Sequence[Judged]) -> list[Judged]:
        """Answers that have a reward and, unless the recipe judges the others too, an end."""
        judged = [answer for answer in answers if answer.verdict.value is not None]
        if not judged:
            reasons = Counter(answer.verdict.reason for answer in answers).most_common(3)
            raise TrainingError(
                f"no answer of step {self._step + 1} got a reward: "
                + "; ".join(f"{reason} ({count} times)" for reason, count in reasons),
                hint="no update was made; the same command continues when the judge works",
            )
        if self.settings.unfinished == "judge":
            return judged
        return [answer for answer in judged if answer.generation.finish_reason == "stop"]

    def _scored(self, answers: Sequence[Judged]) -> list[Judged]:
        """The answers with log-probabilities of policy and reference, and the critic's values."""
        samples = [answer.sample for answer in answers]
        logprobs = self._token_scores(self.engine, samples)
        reference: list[Row] = [() for _ in samples]
        if self.reference is not None:
            reference = self._token_scores(self.reference, samples)
        elif self.engine.has_adapters:
            with as_base(self.engine):
                reference = self._token_scores(self.engine, base_samples(samples, self.engine))
        values: list[Row] = [() for _ in samples]
        if self.critic is not None:
            values = self._token_scores(self.critic, samples)
        return [
            replace(
                answer,
                sample=replace(
                    answer.sample, logprobs=logprobs[i], reference_logprobs=reference[i], values=values[i]
                ),
            )
            for i, answer in enumerate(answers)
        ]

    def _token_scores(self, engine: TrainingEngine, samples: Sequence[AnswerSample]) -> list[Row]:
        """The first score of each token of each answer, on every process."""
        ends = list(itertools.accumulate(sample.segments[0].num_trained for sample in samples))
        places = {
            id(sample): slice(end - sample.segments[0].num_trained, end)
            for sample, end in zip(samples, ends, strict=True)
        }
        flat = [0.0] * (ends[-1] if ends else 0)
        rows = engine.rows(samples, self.recipe.batch.row_tokens)
        for row, scores in zip(rows, engine.scores(rows), strict=True):
            values = iter((scores if scores.dim() == 1 else scores[:, 0]).tolist())
            for sample in row.samples:
                place = places[id(sample)]
                flat[place] = itertools.islice(values, place.stop - place.start)
        flat = engine.add_up(flat)  # a process has its own rows' scores and zeros
        return [tuple(flat[places[id(sample)]]) for sample in samples]

    # ---- advantages

    def _advantages(self, answers: Sequence[Judged]) -> list[AnswerSample]:
        """Samples with what the losses need, without the groups that say nothing."""
        if self.settings.algorithm == "ppo":
            return self._with_critic(answers) if answers else []
        groups: dict[int, list[Judged]] = {}
        for answer in answers:
            groups.setdefault(answer.prompt, []).append(answer)
        samples: list[AnswerSample] = []
        for group in groups.values():
            rewards = [self._penalised(answer) for answer in group]
            found = advantages_of_group(rewards, is_normalised=self.settings.algorithm == "grpo")
            if found is None or not any(found):
                continue
            for answer, advantage in zip(group, found, strict=True):
                length = len(answer.sample.logprobs)
                samples.append(replace(answer.sample, advantages=(advantage,) * length))
        return samples

    def _penalised(self, answer: Judged) -> float:
        """The reward; for REINFORCE less the coefficient times the answer's mean KL."""
        assert answer.verdict.value is not None, "answers without a reward have been left out"
        if self.settings.algorithm != "reinforce" or not self.settings.kl_coefficient:
            return answer.verdict.value
        kl = self._kl(answer.sample)
        return answer.verdict.value - self.settings.kl_coefficient * sum(kl) / len(kl)

    def _kl(self, sample: AnswerSample) -> Row:
        return token_kl(sample.logprobs, sample.reference_logprobs, is_absolute=self.settings.absolute_kl)

    def _with_critic(self, answers: Sequence[Judged]) -> list[AnswerSample]:
        """PPO: the KL is paid at each token, the reward comes with the last one."""
        settings = self.settings
        rewards: list[Row] = []
        for answer in answers:
            paid = [0.0] * len(answer.sample.logprobs)
            if settings.kl_coefficient:
                paid = [-settings.kl_coefficient * kl for kl in self._kl(answer.sample)]
            assert answer.verdict.value is not None, "answers without a reward have been left out"
            paid[-1] += answer.verdict.value
            rewards.append(tuple(paid))
        advantages, returns = actor_critic_advantages(
            rewards,
            [answer.sample.values for answer in answers],
            discount=settings.discount,
            decay=settings.gae_decay,
            is_normalised=settings.normalise_advantages,
        )
        return [
            replace(answer.sample, advantages=advantages[i], returns=returns[i])
            for i, answer in enumerate(answers)
        ]

    # ---- updates

    def _learn(self, samples: Sequence[AnswerSample]) -> dict[str, float]:
        """Updates of ``batch.global_size`` answers each, in an order that depends on the step alone."""
        metrics = {"updates": 0.0, "trained_answers": float(len(samples))}
        results: list[StepOutcome] = []
        critic_results: list[StepOutcome] = []
        norms: list[float] = []
        size = self.recipe.batch.global_size
        for epoch in range(self.settings.inner_epochs):
            seed = self.recipe.run.seed * 1_000_003 + self._step
            order = epoch_order(len(samples), seed=seed, epoch=epoch)
            for start in range(0, len(samples), size):
                part = [samples[i] for i in order[start : start + size]]
                rows = self.engine.rows(part, self.recipe.batch.row_tokens)
                results.append(self.engine.forward_backward(rows, self.objective))
                norms.append(self._update())
                critic_results += self._update_critic(part)
        if results:
            metrics |= _joined(results, self.objective.summarise)
            metrics |= {"updates": float(len(results)), "grad_norm": sum(norms) / len(norms)}
        if critic_results:
            metrics["critic_loss"] = sum(result.loss for result in critic_results) / len(critic_results)
        return metrics

    def _update_critic(self, part: Sequence[AnswerSample]) -> list[StepOutcome]:
        if self.critic is None or self.critic_optimizer is None:
            return []
        rows = self.critic.rows(part, self.recipe.batch.row_tokens)
        result = self.critic.forward_backward(rows, self.critic_objective)
        rate = learning_rate(self._step, self.plan.num_steps, self.critic_settings)
        norm = self.critic.grad_norm()
        apply_gradients(self.critic, self.critic_optimizer, norm, rate, self.recipe.optimizer.clip_norm)
        return [result]

    # ---- validation and checkpoints

    def _validate(self) -> bool:
        """The mean reward of greedy answers to the validation prompts; True if it is the highest yet."""
        answers = self._roll_out(self.validation, 1, is_greedy=True)
        metrics = rollout_metrics(answers)
        if "reward" not in metrics:
            raise TrainingError(
                f"no validation answer got a reward: {answers[0].verdict.reason}",
                hint="the same command continues when the judge works",
            )
        self._write(metrics, "validation")
        return self._is_best(metrics, self.recipe.run.metric or "reward")

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().tensors()
        if self.critic is not None and self.critic_optimizer is not None:
            critic = checkpoints.plain_tensors(self.critic.trainable, self.critic_optimizer)
            tensors |= {f"critic.{name}": tensor for name, tensor in critic.items()}
        return tensors


def _answer_sample(prompt: PromptSample, generation: Generation) -> AnswerSample:
    front = prompt.segments[0].tokens
    answer = generation.token_ids
    segment = Segment((*front, *answer), (*[False] * len(front), *[True] * len(answer)))
    return AnswerSample((segment,), where=prompt.where)


def rollout_metrics(answers: Sequence[Judged]) -> dict[str, float]:
    """Reward, length, and the shares of answers and prompts that cannot teach anything."""
    rewards = [answer.verdict.value for answer in answers if answer.verdict.value is not None]
    lengths = [len(answer.generation.token_ids) for answer in answers]
    metrics: dict[str, float] = {}
    if rewards:
        mean = sum(rewards) / len(rewards)
        metrics["reward"] = mean
        metrics["reward_std"] = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    groups: dict[int, list[float]] = {}
    for answer in answers:
        if answer.verdict.value is not None:
            groups.setdefault(answer.prompt, []).append(answer.verdict.value)
    metrics |= {
        "length": sum(lengths) / len(lengths),
        "share_unfinished": sum(a.generation.finish_reason != "stop" for a in answers) / len(answers),
        "share_without_reward": 1 - len(rewards) / len(answers),
    }
    if len(rewards) > len(groups):
        metrics["share_equal_groups"] = sum(len(set(g)) == 1 for g in groups.values()) / len(groups)
    return metrics


def divergences(answers: Sequence[Judged], temperature: float) -> dict[str, float]:
    """KL to the reference (k3, per token), and how far sampler and trainer are apart."""
    metrics: dict[str, float] = {}
    rows = [answer for answer in answers if answer.sample.logprobs]
    if rows and rows[0].sample.reference_logprobs:
        policy = torch.tensor([x for a in rows for x in a.sample.logprobs], dtype=torch.float64)
        reference = torch.tensor([x for a in rows for x in a.sample.reference_logprobs], dtype=torch.float64)
        log_ratio = reference - policy
        metrics["kl"] = float((torch.expm1(log_ratio) - log_ratio).mean())
    if rows and temperature == 1:
        pairs = [
            (x, y) for a in rows for x, y in zip(a.sample.logprobs, a.generation.logprobs or (), strict=True)
        ]
        metrics["sampler_gap"] = max(abs(x - y) for x, y in pairs)
    return metrics


def _joined(results: Sequence[StepOutcome], summarise: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    """Means over a step's updates: the loss over updates, the rest over tokens."""
    totals: dict[str, tuple[float, float]] = {}
    for result in results:
        add_totals(totals, result.totals)
    return {"loss": sum(result.loss for result in results) / len(results), **summarise(totals)}
