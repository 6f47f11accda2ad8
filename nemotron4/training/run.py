"""From a recipe to a finished run: model, data, reference, trainer, output. The whole, after its pieces."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import ConfigError
from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.model.adapter_files import adapter_tensors
from nemotron4.runs import write_file, write_json
from nemotron4.training import checkpoints, parallel
from nemotron4.training.composing import write_result
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.inputs import (
    RECORD_FILE,
    Data,
    build_encoder,
    encoded,
    model_config,
    open_start,
    read_data,
)
from nemotron4.training.loading import Origin
from nemotron4.training.metrics import (
    METRICS_FILE,
    MetricsLog,
    OnPart,
    StepCost,
    StepRecord,
    hear_nothing,
    matmul_flops_per_s,
    open_logs,
    products_note,
)
from nemotron4.training.model_card import model_card
from nemotron4.training.output import (
    DTYPES,
    continued_fingerprint,
    result_dtype,
    run_facts,
    write_model,
    write_record,
    write_start,
)
from nemotron4.training.prompts import PromptKind
from nemotron4.training.reading import HUB, TrainingSource, files_of, refuse_too_many
from nemotron4.training.recipe import Recipe, as_plain
from nemotron4.training.reference import model_hash, with_reference
from nemotron4.training.rewards import connect as connect_rewards
from nemotron4.training.rollouts import Connect, PromptSample
from nemotron4.training.sampler import Sampler, Samples
from nemotron4.training.samples import Sample
from nemotron4.training.schedule import learning_rate
from nemotron4.training.sharded import Grid
from nemotron4.training.trainer import Trainer

Note = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What a finished (or stopped) run reports."""

    steps: int
    num_steps: int
    output: Path | None
    num_samples: int
    num_problems: int
    directory: Path
    is_writer: bool = True  # False on all but the first process


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"model.device is {name!r}; this machine has auto, cpu" + (", cuda" * torch.cuda.is_available())
        )
    return torch.device(name)


def train(
    recipe: Recipe,
    *,
    note: Note = lambda text: None,
    on_progress: Callable[[StepRecord], None] = lambda progress: None,
    on_part: OnPart = hear_nothing,
    connect: Connect = connect_rewards,
    opened: tuple[Checkpoint, Data] | None = None,
) -> Summary:
    """Run the recipe, or continue it; SIGTERM saves and stops. Every process of a launch calls this.

    ``connect`` gives policy-gradient stages their engine and judges. ``on_progress`` is called with each
    step, ``on_part`` with what else takes long: answers, validation, reference log-probabilities.
    ``opened``: the start and the rows, where both have been read before.
    """
    device = pick_device(recipe.model.device)
    base, read = opened or open_all(recipe)
    with parallel.process_group(recipe.parallel, device) as grid:
        is_writer = parallel.is_first()
        tell: Note = note if is_writer else lambda text: None
        tell(
            f"{len(read.train)} training samples, {len(read.validation)} for validation, "
            f"{len(read.problems)} rows left out"
        )
        for line in (*read.ignored, *(products_note(recipe.model.compute, device) if is_writer else ())):
            tell(line)
        origin = Origin(recipe, base, model_config(recipe, base))
        engine = parallel.build(origin, grid, device)
        weights = _hash_of_start(origin, engine, grid)
        shown = on_part if is_writer else hear_nothing
        read = _with_reference(recipe, read, engine, weights, is_writer=is_writer, note=tell, on_part=shown)
        used = base.prompt_format()
        facts = run_facts(recipe, read, weights, None if used is None else used.date)
        run_fingerprint = continued_fingerprint(recipe.run.directory, facts)
        special = recipe.kind.trainer(recipe.settings)
        trainer = _trainer(
            Trainer if special is None else special(origin, grid, device, connect),
            origin,
            engine,
            read,
            fingerprint=run_fingerprint,
            on_progress=on_progress if is_writer else lambda progress: None,
            on_part=shown,
            is_writer=is_writer,
        )
        if is_writer:
            for line in trainer.plan.notes:
                tell(line)
            _say_new_rate(trainer, tell)
            write_record(recipe, read, trainer, weights, facts, run_fingerprint)
            write_start(recipe, base, origin.config)
        with stopping_on_sigterm(trainer):
            steps = trainer.run()
        output = None
        if trainer.is_finished:
            output = _write_output(recipe, trainer, base, is_writer=is_writer, note=tell)
            if grid is not None:
                parallel.wait_for_all()  # the next stage of a chain opens what this one has written
        counts = len(read.train), len(read.problems)
        return Summary(steps, trainer.plan.num_steps, output, *counts, recipe.run.directory, is_writer)


def _hash_of_start(origin: Origin, engine: TrainingEngine, grid: Grid | None) -> str:
    """The same for every layout; read again where memory holds a part of the weights, or 16 bits of them."""
    is_as_read = grid is None and engine.compute == torch.float32
    return model_hash(engine.scorer.net) if is_as_read else origin.hash()


def open_all(recipe: Recipe) -> tuple[Checkpoint, Data]:
    """The start, and every row read and encoded."""
    base = open_start(recipe)
    return base, read_data(recipe, build_encoder(recipe, base, model_config(recipe, base)))


def _trainer(
    make: Callable[..., Trainer],
    origin: Origin,
    engine: TrainingEngine,
    read: Data,
    *,
    fingerprint: str,
    on_progress: Callable[[StepRecord], None],
    on_part: OnPart,
    is_writer: bool,
) -> Trainer:
    recipe = origin.recipe
    has_reference = recipe.kind.has_reference(recipe.settings)
    trainer = make(
        recipe,
        engine,
        recipe.kind.objective(recipe.settings),
        Dataset(read.train, recipe.run.seed, read.source_sizes, recipe.data.shares, read.orders),
        list(read.validation),
        fingerprint=fingerprint,
        on_progress=on_progress,
        on_part=on_part,
        is_writer=is_writer,
        logs=_logs(origin, engine, is_writer=is_writer, on_part=on_part),
        cost=StepCost.of(origin.config, has_adapter=recipe.adapter is not None),
        peak_flops_per_s=matmul_flops_per_s(engine.device) * recipe.parallel.num_processes,
        constants={"share_left_out": read.share_left_out} if has_reference else {},
    )
    trainer.saved_state()  # a refusal comes before anything is written
    return trainer


def _logs(
    origin: Origin,
    engine: TrainingEngine,
    *,
    is_writer: bool,
    on_part: OnPart,
) -> list[MetricsLog]:
    recipe = origin.recipe
    logs = open_logs(recipe.run.directory, recipe.run.log, as_plain(recipe)) if is_writer else []
    if recipe.samples is None:
        return logs
    num_new = recipe.samples.max_new_tokens
    encoder = build_encoder(recipe, origin.base, origin.config)
    prompts = encoded(TrainingSource(path=recipe.samples.prompts), PromptKind(num_new), encoder)
    refuse_too_many(prompts.problems, len(prompts) + len(prompts.problems), 0)
    found = [prompt for prompt in prompts[:] if isinstance(prompt, PromptSample)]
    sampler = Sampler(engine, RolloutEngine(origin.base), origin.policy, on_part)
    return [*logs, Samples(recipe.run.directory, found, sampler, num_new, is_writer)]


def _with_reference(
    recipe: Recipe,
    read: Data,
    engine: TrainingEngine,
    weights: str,
    *,
    is_writer: bool = True,
    note: Note = lambda text: None,
    on_part: OnPart = hear_nothing,
) -> Data:
    if not recipe.kind.has_reference(recipe.settings):
        return read
    cache = _reference_cache(recipe, weights)
    done = [
        with_reference(
            samples,
            engine,
            cache=cache,
            row_tokens=recipe.batch.row_tokens,
            is_writer=is_writer,
            note=note,
            on_part=on_part,
        )
        for samples in (read.train, read.validation)
    ]
    return replace(read, train=done[0], validation=done[1])


def _reference_cache(recipe: Recipe, weights: str) -> Path:
    """Next to the first file of rows, where other runs on them find it, or else in the run's folder."""
    first = recipe.data.sources[0][0].path
    folder = recipe.run.directory if first.startswith(HUB) else files_of(first)[0].parent
    if not os.access(folder, os.W_OK):
        folder = recipe.run.directory
    return folder / f".reference-{weights}.jsonl"


def with_reference_of(
    recipe: Recipe, samples: Sequence[Sample], engine: TrainingEngine, weights: str
) -> Data:
    """The given samples alone, with their reference log-probabilities."""
    return _with_reference(recipe, Data(samples, (), ()), engine, weights)


@contextmanager
def stopping_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """SIGTERM asks for a save and a stop after the step; not in a thread, which gets no signals."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: trainer.stop_requested.set())
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_output(recipe: Recipe, trainer: Trainer, base: Checkpoint, *, is_writer: bool, note: Note) -> Path:
    folder = recipe.output_folder
    step = trainer.result_step
    record = json.loads((trainer.folder / RECORD_FILE).read_text("utf-8")) if is_writer else {}
    card = model_card(record, trainer.folder / METRICS_FILE, step) if is_writer else ""
    if is_writer:
        write_json(trainer.folder / RECORD_FILE, record | {"result_step": step}, indent=2)
    if recipe.adapter is not None:
        if step != trainer.step:
            trainer.load(step)
        own = adapter_tensors(trainer.engine.scorer.net, recipe.adapter)
        tensors = dict(trainer.engine.whole_tensors(own))
        if is_writer:
            dtype = DTYPES.get(recipe.run.result_dtype, torch.float32)
            write_result(folder, tensors, recipe.adapter, base, recipe.model.start or "", note, dtype=dtype)
            write_file(folder / "README.md", card)
    elif is_writer:
        # From a checkpoint: no process could hold the whole of a large model.
        path = trainer.kept(step)
        dtype = result_dtype(recipe, base)
        whole = f"{trainer.fingerprint} {step} {dtype}"
        write_model(folder, path, dtype=dtype, fingerprint=whole, card=card)
        note(f"the result is written in {str(dtype).removeprefix('torch.')}")
    if step != trainer.step or recipe.run.result != "last":
        note(f"the result is the model after step {step}")
    return folder


def _say_new_rate(trainer: Trainer, note: Note) -> None:
    """What a longer run does to the rate of one that was planned shorter."""
    record = trainer.folder / RECORD_FILE
    last = checkpoints.newest(trainer.checkpoints)
    if last is None or not record.is_file():
        return
    step, values = checkpoints.read_state(last).step, json.loads(record.read_text("utf-8"))
    planned = values["num_steps"] - values["recipe"]["run"].get("extend", 0)
    num_steps = trainer.plan.num_scheduled
    if planned == num_steps or step >= num_steps:
        return
    before, after = (learning_rate(min(step, n - 1), n, trainer.rates) for n in (planned, num_steps))
    if before != after:
        note(
            f"the run was planned for {planned} steps and now has {num_steps}: after step {step} the rate "
            f"goes from {before:.3g} to {after:.3g} (run.extend would keep the rate, and schedule wsd "
            "repeats only its last steps)"
        )
