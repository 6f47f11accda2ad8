"""From a recipe to a finished run: model, data, reference, trainer, output. The whole, after its pieces."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemotron4 import __version__
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import ConfigError, unknown_name
from nemotron4.model.adapter_files import adapter_tensors, write_adapter
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import PRESETS
from nemotron4.training import checkpoints, data, parallel
from nemotron4.training.critic import build_critic
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import Engine
from nemotron4.training.formats import ALL_ATTRIBUTES, Kind, TextRow
from nemotron4.training.loading import Origin
from nemotron4.training.metrics import MetricsLog, OnPart, Progress, hear_nothing, open_logs
from nemotron4.training.output import write_model
from nemotron4.training.packing import Sample
from nemotron4.training.policy_trainer import PolicyTrainer
from nemotron4.training.reading import Problem, files_of, read_rows, refuse_too_many
from nemotron4.training.recipe import Recipe, RewardSection, as_plain
from nemotron4.training.reference import model_hash, with_reference
from nemotron4.training.rollouts import Connect, Generate, PromptSample
from nemotron4.training.sampler import Sampler
from nemotron4.training.samples import Samples
from nemotron4.training.sharded import Grid
from nemotron4.training.speed import StepCost, matmul_flops_per_s
from nemotron4.training.stages.interface import Stage
from nemotron4.training.stages.policy_gradient import ActorStage
from nemotron4.training.stages.preference import JudgedStage, PairStage
from nemotron4.training.stages.reward import BradleyTerryStage, RegressionStage
from nemotron4.training.stages.sft import LikelihoodStage
from nemotron4.training.stages.steerlm import WeightedStage
from nemotron4.training.trainer import Trainer

RECORD_FILE = "run.json"
Note = Callable[[str], None]
BRADLEY_TERRY = {
    "bradley_terry": "regular",
    "bradley_terry_margin": "margin",
    "bradley_terry_scaled": "scaled",
}


@dataclass(frozen=True)
class Data:
    """What the recipe's files hold, read and checked before anything trains."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    problems: Sequence[Problem]
    source_sizes: tuple[int, ...] = ()
    share_left_out: float = 0.0  # of the training rows


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


# ---- pieces


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"model.device is {name!r}; this machine has auto, cpu" + (", cuda" * torch.cuda.is_available())
        )
    return torch.device(name)


def model_config(recipe: Recipe, base: Checkpoint) -> ModelConfig:
    """The shape to train: the checkpoint's, or the preset's with the tokenizer's vocabulary."""
    if recipe.model.preset is None:
        config = base.config
    elif recipe.model.preset not in PRESETS:
        message, hint = unknown_name("preset", recipe.model.preset, PRESETS)
        raise ConfigError(message, hint=hint)
    else:
        config = PRESETS[recipe.model.preset]()
        needed = base.tokenizer().vocab_size
        if config.vocab_size < needed:
            config = _changed(config, vocab_size=-(-needed // 64) * 64)
    if recipe.stage == "reward":
        return _changed(config, num_reward_attributes=len(ALL_ATTRIBUTES))
    return config


def _changed(config: ModelConfig, **values: Any) -> ModelConfig:
    return ModelConfig(**{**config.__dict__, **values})


def build_stage(recipe: Recipe) -> Stage:
    if recipe.stage == "preference":
        assert recipe.preference is not None, "the recipe has checked it"
        kind = JudgedStage if recipe.preference.loss == "kto" else PairStage
        return kind(recipe.preference)
    if recipe.stage == "reward":
        settings = recipe.reward or RewardSection()
        if settings.objective == "regression":
            return RegressionStage(ALL_ATTRIBUTES)
        variant = BRADLEY_TERRY[settings.objective]
        return BradleyTerryStage(variant, ALL_ATTRIBUTES.index(settings.score))  # type: ignore[arg-type]
    if recipe.policy_gradient is not None:
        return ActorStage(recipe.policy_gradient)
    if recipe.steerlm is not None and recipe.steerlm.objective == "weighted":
        return WeightedStage()
    return LikelihoodStage()


def row_kind(recipe: Recipe) -> Kind:
    if recipe.stage == "preference":
        return "kto" if recipe.preference and recipe.preference.loss == "kto" else "preference"
    if recipe.stage == "reward":
        objective = (recipe.reward or RewardSection()).objective
        return "reward" if objective == "regression" else "reward_pairs"
    if recipe.stage == "policy-gradient":
        return "prompts"
    is_weighted = recipe.steerlm is not None and recipe.steerlm.objective == "weighted"
    return "steerlm_weighted" if is_weighted else recipe.stage


def build_encoder(recipe: Recipe, base: Checkpoint, config: ModelConfig) -> data.Encoder:
    if recipe.data.max_length > config.context_length:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}; the model's context is {config.context_length}"
        )
    virtual: tuple[int, ...] = ()
    if recipe.adapter is not None and recipe.adapter.kind == "p_tuning":
        virtual = tuple(range(config.vocab_size, config.vocab_size + recipe.adapter.num_virtual_tokens))
    return data.Encoder(
        base.tokenizer(),
        base.prompt_format(),
        recipe.data.max_length,
        recipe.data.over_long,
        base.bos_token_id if base.adds_bos else None,
        virtual,
        recipe.batch.row_tokens,
    )


def read_data(recipe: Recipe, encoder: data.Encoder) -> Data:
    """Every row read and encoded; DataError if more rows are bad than the recipe allows."""
    if recipe.stage == "pretrain":
        return _read_texts(recipe, encoder)
    train, problems, total = _read_samples(recipe, encoder, recipe.data.train)
    refuse_too_many(problems, total, recipe.data.max_bad_rows)
    share = len(problems) / total if total else 0.0
    validation, more, total = _read_samples(recipe, encoder, recipe.data.validation)
    refuse_too_many(more, total, recipe.data.max_bad_rows)
    return Data(train, validation, [*problems, *more], share_left_out=share)


def _read_samples(
    recipe: Recipe, encoder: data.Encoder, paths: Sequence[Path]
) -> tuple[list[Sample], list[Problem], int]:
    kind = row_kind(recipe)
    rows, problems = read_rows(paths, kind)
    total = len(rows) + len(problems)
    if kind == "kto":
        samples, more = data.judged_samples(rows, encoder)
        return samples, [*problems, *more], total
    samples, more = data.build_samples(rows, encoder, sample_builder(recipe, encoder))
    return samples, [*problems, *more], total


def sample_builder(recipe: Recipe, encoder: data.Encoder) -> data.Build:
    """How one row of the recipe's stage becomes a sample."""
    if recipe.stage == "preference":
        needs = recipe.preference is not None and recipe.preference.loss == "rpo"
        return data.pair_sample(encoder, needs_rewards=needs)
    if recipe.stage == "reward":
        settings = recipe.reward or RewardSection()
        if settings.objective == "regression":
            return data.scored_sample(encoder, ALL_ATTRIBUTES, trained=settings.attributes)
        needs = settings.objective != "bradley_terry"
        return data.reward_pair_sample(encoder, needs_strength=needs)
    if recipe.policy_gradient is not None:
        rewards = recipe.policy_gradient.rewards
        return data.prompt_sample(
            encoder,
            num_new=recipe.policy_gradient.max_new_tokens,
            needs_messages=any(reward.needs_messages for reward in rewards),
            row_fields=[name for reward in rewards for name in reward.row_fields],
        )
    if recipe.steerlm is not None and recipe.steerlm.objective == "weighted":
        return data.weighted_sample(encoder)
    return data.sft_sample(encoder)


def _read_texts(recipe: Recipe, encoder: data.Encoder) -> Data:
    separator = encoder.tokenizer.eos_id if encoder.tokenizer.bos_id is None else encoder.tokenizer.bos_id
    if separator is None:
        raise ConfigError("the tokenizer has neither BOS nor EOS to stand between documents")
    problems: list[Problem] = []

    def windows(path: Path) -> data.TextWindows:
        rows, bad = read_rows([path], "pretrain")
        refuse_too_many(bad, len(rows) + len(bad), recipe.data.max_bad_rows)
        problems.extend(bad)
        texts = [read.row.text for read in rows if isinstance(read.row, TextRow)]
        ids = [encoder.tokenizer.encode(text, parse_special=False) for text in texts]
        return data.TextWindows(ids, separator, recipe.data.max_length, encoder.virtual_ids)

    train = [windows(path) for path in recipe.data.train]
    validation = [windows(path) for path in recipe.data.validation]
    return Data(data.Joined(train), data.Joined(validation), problems, tuple(len(w) for w in train))


# ---- the run


def fingerprint(recipe: Recipe, samples: Data, weights: str) -> str:
    """Changes with anything that changes the loss curve; not with the layout or the length of the run."""
    plain = as_plain(recipe)
    for name in ("run", "parallel", "samples"):
        plain.pop(name, None)
    plain["seed"] = recipe.run.seed
    texts = [json.dumps(plain, sort_keys=True), weights]
    texts += [data.fingerprint(samples.train), data.fingerprint(samples.validation)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def train(
    recipe: Recipe,
    *,
    note: Note = lambda text: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_part: OnPart = hear_nothing,
    connect: Connect | None = None,
    generator: Callable[[Checkpoint], Generate] | None = None,
) -> Summary:
    """Run the recipe, or continue it; SIGTERM saves and stops. Every process of a launch calls this.

    ``connect`` gives policy-gradient stages their engine and judges, ``generator`` the samples of every
    validation their engine (both in ``nemotron4.feedback``). ``on_progress`` hears of each step, ``on_part``
    of what is long beside it: answers, validation, reference log-probabilities.
    """
    device = pick_device(recipe.model.device)
    base = open_checkpoint(recipe.model.start or recipe.model.tokenizer or "")
    config = model_config(recipe, base)
    read = read_data(recipe, build_encoder(recipe, base, config))
    with parallel.process_group(recipe.parallel, device, compute=recipe.model.compute) as grid:
        is_writer = parallel.is_first()
        tell: Note = note if is_writer else lambda text: None
        tell(
            f"{len(read.train)} training samples, {len(read.validation)} for validation, "
            f"{len(read.problems)} rows left out"
        )
        origin = Origin(recipe, base, config)
        engine = parallel.build(origin, grid, device)
        weights = model_hash(engine.scorer.net) if grid is None else origin.hash()
        shown = on_part if is_writer else hear_nothing
        read = _with_reference(recipe, read, engine, weights, is_writer=is_writer, note=tell, on_part=shown)
        make: Callable[..., Trainer] = Trainer
        if recipe.policy_gradient is not None:
            make = policy_trainer(origin, grid, device, connect)
        trainer = make(
            recipe,
            engine,
            build_stage(recipe),
            Dataset(read.train, recipe.run.seed, read.source_sizes, _weights(recipe, read)),
            list(read.validation),
            fingerprint=fingerprint(recipe, read, weights),
            on_progress=on_progress if is_writer else lambda progress: None,
            on_part=shown,
            is_writer=is_writer,
            logs=_logs(origin, engine, generator, is_writer=is_writer, on_part=shown),
            cost=StepCost.of(config, has_adapter=recipe.adapter is not None),
            peak_flops_per_s=matmul_flops_per_s(device) * recipe.parallel.num_processes,
            constants={"share_left_out": read.share_left_out} if recipe.stage == "preference" else {},
        )
        if is_writer:
            write_record(recipe, read, trainer, weights)
        with stopping_on_sigterm(trainer):
            steps = trainer.run()
        output = None
        if steps == trainer.plan.num_steps:
            output = _write_output(recipe, trainer, base, config, is_writer=is_writer)
            if grid is not None:
                parallel.wait_for_all()  # the next stage of a chain opens what this one has written
        return Summary(
            steps,
            trainer.plan.num_steps,
            output,
            len(read.train),
            len(read.problems),
            recipe.run.directory,
            is_writer,
        )


def _logs(
    origin: Origin,
    engine: Engine,
    generator: Callable[[Checkpoint], Generate] | None,
    *,
    is_writer: bool,
    on_part: OnPart,
) -> list[MetricsLog]:
    recipe = origin.recipe
    logs = open_logs(recipe.run.directory, recipe.run.log, as_plain(recipe)) if is_writer else []
    if recipe.samples is None:
        return logs
    if generator is None:
        raise ConfigError(
            "table [samples] needs an engine", hint="pass generator=nemotron4.feedback.generator"
        )
    num_new = recipe.samples.max_new_tokens
    encoder = build_encoder(recipe, origin.base, origin.config)
    rows, problems = read_rows([recipe.samples.prompts], "prompts")
    build = data.prompt_sample(encoder, num_new=num_new, needs_messages=False, row_fields=())
    prompts, more = data.build_samples(rows, encoder, build)
    refuse_too_many([*problems, *more], len(rows) + len(problems), 0)
    found = [prompt for prompt in prompts if isinstance(prompt, PromptSample)]
    sampler = Sampler(engine, generator(origin.base), origin.policy, on_part)
    return [*logs, Samples(recipe.run.directory, found, sampler, num_new, is_writer)]


def policy_trainer(
    origin: Origin,
    grid: Grid | None,
    device: torch.device,
    connect: Connect | None,
) -> Callable[..., PolicyTrainer]:
    """A trainer with judges, and with the reference and critic that the recipe asks for."""
    recipe, base = origin.recipe, origin.base
    settings = recipe.policy_gradient
    assert settings is not None, "only policy-gradient recipes come here"
    if connect is None:
        raise ConfigError(
            "stage policy-gradient needs an engine and judges", hint="pass connect=nemotron4.feedback.connect"
        )
    reference = None
    if settings.kl_coefficient and recipe.adapter is None:
        reference = parallel.build(origin, grid, device, is_frozen=True)
    outside = connect(recipe, base)
    identity = [outside.judge.identity]
    critic = None
    if settings.has_critic:
        scorer = build_critic(recipe, base, origin.config)
        identity.append(model_hash(scorer.net))
        critic = parallel.distribute(scorer.to(device), grid, device, compute=origin.compute)
    return partial(
        PolicyTrainer,
        outside=outside,
        identity=identity,
        skeleton=origin.policy,
        reference=reference,
        critic=critic,
    )


def _weights(recipe: Recipe, read: Data) -> tuple[float, ...]:
    return recipe.data.weights if recipe.stage == "pretrain" else ()


def _with_reference(
    recipe: Recipe,
    read: Data,
    engine: Engine,
    weights: str,
    *,
    is_writer: bool = True,
    note: Note = lambda text: None,
    on_part: OnPart = hear_nothing,
) -> Data:
    if recipe.stage != "preference":
        return read
    cache = recipe.data.train[0].parent / f".reference-{weights}.jsonl"
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


def with_reference_of(recipe: Recipe, samples: Sequence[Sample], engine: Engine, weights: str) -> Data:
    """The given samples alone, with their reference log-probabilities."""
    return _with_reference(recipe, Data(samples, (), ()), engine, weights)


def write_record(recipe: Recipe, read: Data, trainer: Trainer, weights: str) -> None:
    """The resolved recipe, and what it was run with."""
    folder = recipe.run.directory
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": as_plain(recipe),
        "fingerprint": trainer.fingerprint,
        "start_weights": weights,
        "num_steps": trainer.plan.num_steps,
        "num_samples": len(read.train),
        "num_rows_left_out": len(read.problems),
        "inputs": {
            str(file): _file_hash(file)
            for path in (*recipe.data.train, *recipe.data.validation)
            for file in files_of(path)
        },
        "versions": {
            "nemotron4": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        },
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    """The commit of the package's own checkout, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


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


def output_folder(recipe: Recipe) -> Path:
    """Where the run leaves its model or adapter."""
    return recipe.run.directory / ("model" if recipe.adapter is None else "adapter")


def _write_output(
    recipe: Recipe, trainer: Trainer, base: Checkpoint, config: ModelConfig, *, is_writer: bool
) -> Path:
    folder = output_folder(recipe)
    if recipe.adapter is not None:
        own = adapter_tensors(trainer.engine.scorer.net, recipe.adapter)
        tensors = dict(trainer.engine.whole_tensors(own))
        if is_writer:
            write_adapter(folder, tensors, recipe.adapter, base=recipe.model.start or "")
    elif is_writer:
        # From the last checkpoint: no process could hold the whole of a large model.
        last = checkpoints.newest(trainer.checkpoints)
        assert last is not None, "a finished run has saved its last step"
        write_model(
            folder, checkpoints.SavedWeights(last), config, base, dtype=torch.float32,
            fingerprint=f"{trainer.fingerprint} {trainer.plan.num_steps}",
        )  # fmt: skip
    return folder
