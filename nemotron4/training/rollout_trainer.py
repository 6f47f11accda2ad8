"""The loop of training on answers: prompts, answers, rewards, updates.

One step of the run is one round of answers; the updates within it share its learning rate. The answers come
from the latest weights, or from servers whose weights may be some steps behind. Of several processes each
writes and judges its share of them; what follows from all answers, as the advantages, is computed on every
process alike.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nemotron4.engine import SamplingParams, SamplingRequest, derive_seed
from nemotron4.errors import TrainingError
from nemotron4.model.transformer import Transformer
from nemotron4.records import Generation
from nemotron4.training.advantages import Row
from nemotron4.training.dataset import epoch_order
from nemotron4.training.engine import StepOutcome, TrainingEngine
from nemotron4.training.judged import (
    Judged,
    answer_sample,
    differ,
    divergences,
    groups_of,
    joined,
    rollout_metrics,
)
from nemotron4.training.metrics import peak_memory_bytes
from nemotron4.training.policy import AnswerSample
from nemotron4.training.reference import as_base, base_samples
from nemotron4.training.remote_sampler import RemoteSampler
from nemotron4.training.rollout_settings import RolloutSection
from nemotron4.training.rollouts import Answer, PromptSample, RolloutBackend
from nemotron4.training.sampler import DrawnAnswer, Sampler
from nemotron4.training.samples import Sample
from nemotron4.training.schedule import learning_rate
from nemotron4.training.stopping import joined_unless_stopped
from nemotron4.training.trainer import Trainer


class RolloutTrainer(Trainer):
    """A trainer whose samples are prompts. ``reference`` is a frozen policy; with adapters there is none.

    ``identity`` changes with what rewards come from; ``skeleton`` is that of a ``Sampler``.
    """

    changeable = "a judge's function, prompt or weights, or the critic's start,"  # the rest is told before
    has_own_validation = False

    def __init__(
        self,
        *arguments: Any,
        backend: RolloutBackend,
        identity: Sequence[str],
        skeleton: Callable[[], Transformer],
        reference: TrainingEngine | None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        settings = self.recipe.kind.rollouts(self.recipe.settings)
        assert settings is not None, "the stage draws answers"
        self.settings: RolloutSection = settings
        self.stop_requested = backend.stop
        self.sampler: Sampler | RemoteSampler = (
            RemoteSampler(self.engine, settings, self.stop_requested)
            if settings.servers
            else Sampler(self.engine, backend.generate, skeleton, self.on_part)
        )
        # Prompts that are being answered while the step trains, and what waits for their answers.
        self._has_sent = False
        self._ahead: deque[tuple[list[Sample], Callable[[], list[DrawnAnswer]]]] = deque()
        self.judge = backend.judge
        self.reference = reference
        self.fingerprint = hashlib.sha256(" ".join([self.fingerprint, *identity]).encode()).hexdigest()[:32]

    # ---- one step

    def _train_step(self) -> None:
        if not self._has_sent:
            self.sampler.update()
            self._has_sent = True
        if self._step == 0 and self.validation:
            self._validate_start()  # what the start gives, so that the curve has its beginning
        started = time.perf_counter()
        # Not asked of the optimiser: a step without updates leaves it at an earlier one's.
        rate = learning_rate(self._step, self.plan.num_scheduled, self.rates)
        torch.manual_seed(self._step_seed)
        answers, num_prompts = self._answers()
        seconds = {"rollout_seconds": time.perf_counter() - started}
        metrics = rollout_metrics(answers)
        scored = self._scored(self._usable(answers))
        metrics |= divergences(scored, self.settings.temperature)
        metrics |= self._learn(self._samples(scored))
        if metrics["updates"]:
            self.sampler.update()
        self._seen += num_prompts
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

    def first_samples(self) -> list[Sample]:
        """What the run's first step trains on, for a look at its loss without a step."""
        answers = self._roll_out(self.batch(0, 0), self.settings.group_size)
        return list(self._samples(self._scored(self._usable(answers))))

    def _answers(self) -> tuple[list[Judged], int]:
        """The step's answers, and how many prompts were taken from the data for them.

        With ``max_resamples`` further prompts are drawn until enough have answers whose rewards differ; the
        others are left out (DAPO's dynamic sampling).
        """
        size = self.plan.sizes[self._step]
        self._begin()
        prompts, wait = self._ahead.popleft()
        answers = self._judged(prompts, wait(), self.settings.group_size)
        taken = size
        for _ in range(self.settings.max_resamples):
            kept = [group for group in groups_of(answers) if differ(group)]
            if len(kept) >= size:
                break
            more = self.batch(self._step, self._seen + taken)
            answers += self._roll_out(more, self.settings.group_size, first=taken)
            taken += size
        if not self.settings.max_resamples:
            return answers, taken
        kept = [group for group in groups_of(answers) if differ(group)]
        return [answer for group in kept[:size] for answer in group] or answers, taken

    def _begin(self) -> None:
        """Have this step's prompts answered, and those of the steps that may be ahead of their weights."""
        step = self._step + len(self._ahead)
        seen = self._seen + sum(len(prompts) for prompts, _ in self._ahead)
        while len(self._ahead) <= self.settings.max_staleness and step < self.plan.num_steps:
            prompts = self.batch(step, seen)
            requests = self._requests(prompts, self.settings.group_size, step=step)
            self._ahead.append((prompts, self.sampler.begin(requests)))
            step, seen = step + 1, seen + len(prompts)

    def _roll_out(
        self, prompts: Sequence[Any], group_size: int, *, is_greedy: bool = False, first: int = 0
    ) -> list[Judged]:
        """Answers to the prompts, ``group_size`` side by side for each, and their rewards.

        ``first`` is the place of the first prompt among all of the step.
        """
        requests = self._requests(prompts, group_size, step=self._step, is_greedy=is_greedy, first=first)
        return self._judged(prompts, self.sampler.begin(requests)(), group_size, first=first)

    def _requests(
        self, prompts: Sequence[Any], group_size: int, *, step: int, is_greedy: bool = False, first: int = 0
    ) -> list[SamplingRequest]:
        params = SamplingParams(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=0.0 if is_greedy else self.settings.temperature,
            logprobs=0,
        )
        # A resumed run draws what the interrupted one would have drawn.
        seed = partial(derive_seed, self.recipe.run.seed, step)
        return [
            SamplingRequest(prompt.segments[0].tokens, replace(params, seed=seed(place, answer)))
            for place, prompt in enumerate(prompts, start=first)
            for answer in range(group_size)
        ]

    def _judged(
        self, prompts: Sequence[Any], found: Sequence[DrawnAnswer], group_size: int, *, first: int = 0
    ) -> list[Judged]:
        owners: list[PromptSample] = [prompt for prompt in prompts for _ in range(group_size)]
        answers = [
            Answer(owner.prompt, each.generation.text, owner.fields)
            for owner, each in zip(owners, found, strict=True)
        ]
        verdicts = joined_unless_stopped(self.engine, lambda: self.judge(self.engine.share(answers)))
        return [
            Judged(
                first + i // group_size,
                each.generation,
                verdicts[i],
                answer_sample(owners[i], each.generation),
                each.staleness,
            )
            for i, each in enumerate(found)
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
        values = self._values(samples)
        return [
            replace(
                answer,
                sample=replace(
                    answer.sample,
                    logprobs=logprobs[i],
                    reference_logprobs=reference[i],
                    values=values[i],
                    weights=self._importance(answer.generation, logprobs[i]),
                ),
            )
            for i, answer in enumerate(answers)
        ]

    def _importance(self, generation: Generation, logprobs: Row) -> Row:
        """By what each token's gradient is weighed where a server wrote it: new / old probability, cut off.

        Truncated importance sampling (Yao et al. 2025) from the weights that wrote the answer to those that
        the step begins with.
        """
        if not self.settings.servers:
            return ()
        old = generation.logprobs or ()
        cap = math.log(self.settings.importance_cap)
        return tuple(math.exp(min(new - was, cap)) for new, was in zip(logprobs, old, strict=True))

    def _values(self, samples: Sequence[AnswerSample]) -> list[Row]:
        """A critic's value of each token, where there is one."""
        return [() for _ in samples]

    def _samples(self, answers: Sequence[Judged]) -> Sequence[Sample]:
        """What the updates train on, without what says nothing."""
        raise NotImplementedError

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

    # ---- updates

    def _learn(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Updates of ``batch.global_size`` answers each, in an order that depends on the step alone."""
        metrics = {"updates": 0.0, "trained_answers": float(len(samples))}
        results: list[StepOutcome] = []
        norms: list[float] = []
        size = self.recipe.batch.global_size
        for epoch in range(self.settings.inner_epochs):
            order = epoch_order(len(samples), seed=self._step_seed, epoch=epoch)
            for start in range(0, len(samples), size):
                part = [samples[i] for i in order[start : start + size]]
                rows = self.engine.rows(part, self.recipe.batch.row_tokens)
                results.append(self.engine.forward_backward(rows, self.objective))
                norms.append(self._update())
                self._updated(part)
        if results:
            metrics |= joined(results, self.objective.summarise)
            metrics |= {"updates": float(len(results)), "grad_norm": sum(norms) / len(norms)}
        return metrics

    def _updated(self, part: Sequence[Sample]) -> None:
        """Called after each update with what it was made of."""

    # ---- the end

    def run(self) -> int:
        """As every trainer's, but a run that has not learnt anything is an error and leaves no model."""
        steps = super().run()
        if self.is_finished and (reason := self._why_nothing_learnt()):
            raise TrainingError(
                f"{self.folder}: {reason}: nothing was learnt, and no model is written",
                hint="look at the rewards in metrics.jsonl; try easier prompts, a finer reward, a larger "
                f"{self.settings.table}.group_size or max_new_tokens, or a better start",
            )
        return steps

    def _why_nothing_learnt(self) -> str:
        """Empty for a run that has made an update."""
        if any(float(state.get("step", 0)) > 0 for state in self.optimizer.state.values()):
            return ""
        return f"in none of {self._step} steps two answers to one prompt had different rewards"

    # ---- validation

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
