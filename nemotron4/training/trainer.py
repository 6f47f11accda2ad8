"""The training loop: batch, gradients, checks, update, record. Every stage runs through it.

A run's folder holds ``recipe.json`` (the resolved recipe and what it was run with), ``metrics.jsonl`` (one
line for each step and validation) and ``checkpoints/``. The same call continues an interrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from nemotron4.errors import ConfigError
from nemotron4.training import checkpoints
from nemotron4.training.checkpoints import SavedState
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.metrics import (
    JsonLines,
    MetricsLog,
    OnPart,
    Part,
    StepCost,
    StepRecord,
    hear_nothing,
    peak_memory_bytes,
)
from nemotron4.training.optimizer import apply_gradients, build_optimizer, finite_norm
from nemotron4.training.recipe import Recipe
from nemotron4.training.samples import Sample
from nemotron4.training.schedule import learning_rate, plan_steps
from nemotron4.training.stage import Objective
from nemotron4.training.stopping import StepStoppedError, StopSwitch

HIGHER_IS_BETTER = frozenset(("reward", "accuracy", "margin_beta", "reward_correlation", "score_margin"))


class Trainer:
    """Runs a recipe on an engine. ``fingerprint`` identifies data, model and settings of the run.

    With ``cost`` and the measured ``peak_flops_per_s`` of all processes together each step records its MFU.
    ``logs`` receive what ``metrics.jsonl`` does, which the writer alone has. ``constants`` are written with
    the numbers of every step.
    """

    changeable = "data, model or settings"  # of which another fingerprint says that they have changed
    has_own_validation = True  # False: a kind of training that begins with a validation by itself

    def __init__(
        self,
        recipe: Recipe,
        engine: TrainingEngine,
        objective: Objective,
        train: Dataset,
        validation: Sequence[Sample] = (),
        *,
        fingerprint: str = "",
        on_progress: Callable[[StepRecord], None] = lambda progress: None,
        on_part: OnPart = hear_nothing,
        is_writer: bool = True,
        logs: Sequence[MetricsLog] = (),
        cost: StepCost | None = None,
        peak_flops_per_s: float = 0.0,
        constants: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.objective = objective
        self.train = train
        self.validation = tuple(validation)
        self.fingerprint = fingerprint
        self.on_progress = on_progress
        self.on_part = on_part
        self.is_writer = is_writer
        self.logs = [*([JsonLines(recipe.run.directory)] if is_writer else []), *logs]
        self.cost = cost
        self.peak_flops_per_s = peak_flops_per_s
        self.constants = constants
        self.plan = plan_steps(recipe, len(train))
        self.optimizer = build_optimizer(engine.trainable, recipe.optimizer)
        self.stop_requested = StopSwitch()
        result = recipe.run.result
        self._writer = checkpoints.Writer(
            self.checkpoints,
            keep=recipe.run.keep_checkpoints,
            kept_step=result if isinstance(result, int) else None,
        )
        self._step = 0
        self._seen = 0
        self._best: float | None = None
        self._best_step: int | None = None
        self._num_stale = 0
        self._owes_validation = False  # of the last step done
        self._is_saved = True
        self._has_metric = not recipe.run.metric  # whether it is known that validation measures it
        self.rates = replace(recipe.optimizer, warmup_steps=self.plan.warmup_steps)

    @property
    def folder(self) -> Path:
        return self.recipe.run.directory

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def batch(self, step: int, seen: int) -> list[Sample]:
        """The samples of a step, by their global positions."""
        return [self.train.at(position) for position in range(seen, seen + self.plan.sizes[step])]

    def run(self) -> int:
        """Train to the end, or until ``stop_requested``; saves in both cases. Returns the steps done."""
        self._resume()
        for log in self.logs:
            log.begin(self._step)
        try:
            self._run()
        finally:
            self._writer.wait()
        for log in self.logs:
            log.close()
        return self._step

    def _run(self) -> None:
        settings = self.recipe.run
        is_stopping = self._is_stopping()
        if self._step == 0 and self.recipe.samples is not None and self.has_own_validation:
            self._validate_start()  # what the start answers, so that there is a before and an after
        while not self.is_finished and not is_stopping:
            is_best = False
            try:
                if not self._owes_validation:
                    self._train_step()
                    self._is_saved, self._owes_validation = False, self._is_validation_due()
                if self._owes_validation:
                    is_best = self._validate()
                    self._is_saved, self._owes_validation = False, False
            except StepStoppedError:
                is_stopping = True
            is_stopping = is_stopping or self._is_stopping()
            is_due = self._step % settings.save_every == 0 or self._step == settings.result
            if not self._is_saved and (self.is_finished or is_best or is_due or is_stopping):
                self._save()

    def _is_validation_due(self) -> bool:
        every = self.recipe.run.validate_every
        is_last = self._step == self.plan.num_steps
        return bool(self.validation) and (is_last or bool(every and self._step % every == 0))

    def _validate_start(self) -> None:
        """The start may stay the best, so it is kept where the best is the result."""
        self._best = self._best_step = None  # also where a checkpoint of step 0 has it
        self._num_stale = 0
        self._validate()
        if self.recipe.run.result == "best":
            self._save()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._step

    @property
    def is_finished(self) -> bool:
        """At the last step, or stopped early because validation has not become better."""
        limit = self.recipe.run.early_stop_after
        is_at_end = self._step >= self.plan.num_steps or bool(limit and self._num_stale >= limit)
        return is_at_end and not self._owes_validation

    @property
    def result_step(self) -> int:
        """The step whose model the run leaves."""
        result = self.recipe.run.result
        if result == "best":
            if self._best_step is None:
                raise ConfigError(
                    f"{self.folder}: no step is the best: run.metric has changed since, or was no number",
                    hint="undo the change, or take run.result = STEP",
                )
            return self._best_step
        return self._step if result == "last" else result

    def kept(self, step: int) -> Path:
        """The folder of a kept checkpoint."""
        path = checkpoints.step_folder(self.checkpoints, step)
        if not path.is_dir():
            kept = ", ".join(str(int(each.name[5:])) for each in sorted(self.checkpoints.glob("step-*")))
            raise ConfigError(f"{path}: there is no such checkpoint", hint=f"kept are the steps {kept}")
        return path

    def load(self, step: int) -> None:
        """Put the parameters of a kept checkpoint into the model."""
        checkpoints.load(self.kept(step), self.tensors())

    def _is_stopping(self) -> bool:
        """Whether any process was told to stop or could not write: all of them stop after the same step."""
        return self.engine.any_process(self.stop_requested.is_set() or self._writer.has_failed())

    def _train_step(self) -> None:
        started = time.perf_counter()
        torch.manual_seed(self._step_seed)
        samples = self.batch(self._step, self._seen)
        rows = self.engine.rows(samples, self.recipe.batch.row_tokens)
        result = self.engine.forward_backward(rows, self.objective)
        if not self._has_metric:
            self._check_metric(self.objective.names(result.totals))
        norm = self._update()
        self._seen += self.plan.sizes[self._step]
        self._step += 1
        seconds = time.perf_counter() - started
        self._write(
            {
                "loss": result.loss,
                **self.objective.summarise(result.totals),
                **self.constants,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "grad_norm": norm,
                "tokens": float(result.num_tokens),
                "tokens_per_s": result.num_tokens / seconds,
                "seconds": seconds,
                "samples_seen": float(self._seen),
                "memory_gb": peak_memory_bytes(self.engine.device) / 1e9,
                **self._mfu(samples, seconds),
            },
            "train",
        )

    @property
    def _step_seed(self) -> int:
        """What a step draws (dropout) depends on the step alone: a resumed run needs no generator state."""
        return self.recipe.run.seed * 1_000_003 + self._step

    def _mfu(self, samples: Sequence[Sample], seconds: float) -> dict[str, float]:
        """The share of the machine's measured matrix-product speed that went into the model."""
        if self.cost is None or not self.peak_flops_per_s:
            return {}
        return {"mfu": self.cost.flops(samples) / seconds / self.peak_flops_per_s}

    def _update(self) -> float:
        norm = finite_norm(self.engine, self._step + 1)
        rate = learning_rate(self._step, self.plan.num_scheduled, self.rates)
        apply_gradients(self.engine, self.optimizer, norm, rate, self.recipe.optimizer.clip_norm)
        return norm

    def _validate(self) -> bool:
        """Record the validation loss; True if it is the lowest yet, whose checkpoint is kept."""
        rows = self.engine.rows(self.validation, self.recipe.batch.row_tokens)
        result = self.engine.evaluate(
            rows, self.objective, on_row=lambda done: self.on_part(Part("validation rows", done, len(rows)))
        )
        values = {"loss": result.loss, **self.objective.summarise(result.totals)}
        self._write(values, "validation")
        return self._is_best(values, self.recipe.run.metric or "loss")

    def _is_best(self, values: Mapping[str, float], metric: str) -> bool:
        """Keep count of what is best; True for a value that is better than all before."""
        self._check_metric(values)
        value = -values[metric] if metric in HIGHER_IS_BETTER else values[metric]
        is_best = not math.isnan(value) and (self._best is None or value < self._best)
        self._num_stale = 0 if is_best else self._num_stale + 1
        if is_best:
            self._best, self._best_step = value, self._step
        return is_best

    def _check_metric(self, measured: Collection[str]) -> None:
        metric = self.recipe.run.metric
        if metric and metric not in measured:
            raise ConfigError(
                f"run.metric is {metric!r}, which validation does not measure",
                hint=f"it measures {', '.join(sorted(measured))}",
            )
        self._has_metric = True

    def _write(self, values: Mapping[str, float], kind: str) -> None:
        progress = StepRecord(self._step, self.plan.num_steps, values, kind)
        for log in self.logs:
            log.write(progress)
        self.on_progress(progress)

    # ---- checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        return checkpoints.plain_tensors(self.engine.trainable, self.optimizer)

    def _save(self) -> None:
        state = SavedState(
            self._step,
            self._seen,
            self.fingerprint,
            self._best,
            self._best_step,
            self._num_stale,
            self.recipe.run.metric,
            self._owes_validation,
        )
        self._writer.save(self.tensors(), state)
        self._is_saved = True

    def saved_state(self) -> SavedState | None:
        """What the run goes on from; ConfigError where it cannot."""
        path = checkpoints.newest(self.checkpoints)
        if path is None:
            return None
        state = checkpoints.read_state(path)
        if state.fingerprint != self.fingerprint:
            raise ConfigError(
                f"{path}: the checkpoint belongs to another run: {self.changeable} have changed",
                hint="give the changed run a new run.directory, or undo the change to continue this one",
            )
        if state.step > self.plan.num_steps:
            raise ConfigError(
                f"{self.folder}: {state.step} steps are done, and the recipe asks for {self.plan.num_steps}",
                hint=f"ask for {state.step} or more, or give the shorter run a new run.directory; "
                "run.result = STEP takes the model of an earlier step",
            )
        return state

    def _resume(self) -> None:
        if self.is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
        state = self.saved_state()
        if state is None:
            return
        self.load(state.step)
        self._step, self._seen = state.step, state.samples_seen
        self._owes_validation = state.owes_validation
        if state.metric == self.recipe.run.metric:  # values of another are no measure for this one's
            self._best, self._best_step = state.best_validation, state.best_step
            self._num_stale = state.num_stale
