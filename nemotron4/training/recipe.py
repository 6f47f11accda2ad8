"""A recipe: everything that decides a training run, as frozen dataclasses read from one TOML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nemotron4 import config
from nemotron4.errors import ConfigError, Problems, raise_together, unknown_name
from nemotron4.model.adapter_config import AdapterConfig, Codes
from nemotron4.training import stage
from nemotron4.training.reading import TrainingSource
from nemotron4.training.stage import Stage
from nemotron4.training.synonyms import synonyms


def _check_at_least(section: str, values: dict[str, float], minimum: float) -> None:
    raise_together(
        [
            ConfigError(f"{section}.{name} is {value}; expected {minimum:g} or more")
            for name, value in values.items()
            if not minimum <= value < math.inf
        ]
    )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Where the weights come from: ``start`` (a checkpoint) or ``preset`` (fresh weights).

    ``compute`` is the type of products and activations. What trains is float32, and so are its gradients and
    optimiser; what is frozen is kept in the type of compute.
    """

    start: str | None = None
    adapter: str | None = None  # in the weights of start: ours, PEFT's, or NeMo's
    preset: str | None = None
    shape: str | None = None  # the preset that start has, for a dry run where start is not there
    tokenizer: str | None = None  # a checkpoint whose tokenizer a fresh model uses
    prompt_format: str | None = None  # nemotron4, chatml or a file with a Jinja template, for the start's own
    device: str = "auto"  # auto: the GPU if there is one
    compute: Literal["float32", "bfloat16"] = "float32"
    new_tokens: tuple[str, ...] = ()  # behind the vocabulary, with rows of their own
    quantize: Codes | None = None  # of frozen weights in blocks, under an adapter (QLoRA)
    activation_checkpointing: bool = False  # blocks keep their inputs alone and run again for the gradient

    def __post_init__(self) -> None:
        if (self.start is None) == (self.preset is None):
            raise ConfigError("model needs exactly one of start and preset")
        if self.preset is not None and self.tokenizer is None:
            raise ConfigError("model.preset has no tokenizer of its own", hint="set model.tokenizer")
        if self.adapter is not None and self.start is None:
            raise ConfigError("model.adapter needs model.start, the model that it is on")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Rows: files, folders, patterns or ``hub:ORG/NAME:split``, or tables with ``path`` and more.

    ``max_length`` counts the tokens of one sequence, prompt and answer.
    """

    train: tuple[TrainingSource | str, ...]
    validation: tuple[TrainingSource | str, ...] = ()
    weights: tuple[float, ...] = ()  # share of each source of train; empty: by size
    max_length: int = 1024
    cross_documents: bool = False  # pretrain: whether a window's documents see those before them
    over_long: Literal["drop", "cut"] = "drop"  # cut: the end is removed, with its stop marker
    max_bad_rows: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train names no file")
        given = [source.weight is not None for source in self.sources[0]]
        if any(given) and (self.weights or not all(given)):
            raise ConfigError("data.train has sources with a weight and others; give all of them one")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"data.weights has {len(self.weights)} values for {len(self.train)} files")
        shares = self.shares
        if shares and (min(shares) < 0 or sum(shares) <= 0):
            raise ConfigError(f"data.weights is {shares}; expected non-negative, not all zero")
        _check_at_least("data", {"max_length": self.max_length}, 2)
        _check_at_least("data", {"max_bad_rows": self.max_bad_rows}, 0)

    @property
    def sources(self) -> tuple[tuple[TrainingSource, ...], tuple[TrainingSource, ...]]:
        """Those of train and of validation."""
        groups = (self.train, self.validation)
        train, validation = (
            tuple(TrainingSource(path=each) if isinstance(each, str) else each for each in group)
            for group in groups
        )
        return train, validation

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each source of train; empty: by size."""
        return self.weights or tuple(s.weight for s in self.sources[0] if s.weight is not None)


@dataclass(frozen=True, kw_only=True)
class BatchSection:
    """``global_size`` samples make one step, however they are cut into rows of ``row_tokens``."""

    global_size: int = 64
    row_tokens: int = 4096
    ramp: tuple[tuple[int, int], ...] = ()  # (samples seen, global size) from then on, ascending

    def __post_init__(self) -> None:
        _check_at_least("batch", {"global_size": self.global_size, "row_tokens": self.row_tokens}, 1)
        seen = [entry[0] for entry in self.ramp]
        if any(len(entry) != 2 or min(entry) < 0 or entry[1] < 1 for entry in self.ramp) or seen != sorted(
            seen
        ):
            raise ConfigError(f"batch.ramp is {self.ramp}; expected [[samples seen, size], ...], ascending")

    def size_after(self, samples_seen: int) -> int:
        size = self.global_size
        for threshold, ramped in self.ramp:
            if samples_seen >= threshold:
                size = ramped
        return size


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW. Norms and biases have no weight decay. The defaults are NeMo-Aligner's."""

    learning_rate: float
    min_learning_rate: float = 0.0
    schedule: Literal["constant", "cosine", "linear", "steep", "wsd"] = "constant"
    warmup_steps: int = 10
    decay_steps: int = 0  # wsd: the last steps, in which the rate falls linearly; before them it is constant
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0 is off
    # 8bit: a quarter of AdamW's memory, through torchao; offloaded: float32 in main memory, next to a GPU
    moments: Literal["float32", "8bit", "offloaded"] = "float32"

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}; expected two numbers in [0, 1)")
        if (self.schedule == "wsd") != bool(self.decay_steps):
            raise ConfigError("optimizer.schedule wsd needs decay_steps, and no other schedule has them")
        rates = ("learning_rate", "min_learning_rate", "weight_decay", "clip_norm", "eps")
        steps = ("warmup_steps", "decay_steps")
        _check_at_least("optimizer", {name: getattr(self, name) for name in (*rates, *steps)}, 0)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Length, place and rhythm of the run; exactly one of ``max_steps`` and ``epochs``."""

    directory: Path
    max_steps: int | None = None
    epochs: int | None = None
    extend: int = 0  # steps after those, at the rate that the schedule ends with
    save_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 0  # 0: only at the end
    result: int | Literal["last", "best"] = "last"  # the checkpoint whose model is written
    result_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: that of the start
    metric: str = ""  # of validation, which says what is best; empty: the reward of a policy, else the loss
    early_stop_after: int = 0  # validations without a better one; 0: never
    seed: int = 0
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()  # besides metrics.jsonl

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError("run needs exactly one of max_steps and epochs")
        _check_at_least("run", {"save_every": self.save_every, "keep_checkpoints": self.keep_checkpoints}, 1)
        length = "epochs" if self.max_steps is None else "max_steps"
        _check_at_least("run", {length: getattr(self, length)}, 1)
        others = ("extend", "validate_every", "early_stop_after")
        _check_at_least("run", {name: getattr(self, name) for name in others}, 0)
        if isinstance(self.result, int) and not 1 <= self.result <= self.extend + (
            self.max_steps or self.result
        ):
            raise ConfigError(f"run.result is step {self.result} of a run of {self.max_steps} steps")
        if self.early_stop_after and not self.validate_every:
            raise ConfigError("run.early_stop_after needs run.validate_every")


@dataclass(frozen=True, kw_only=True)
class SamplesSection:
    """Prompts, answered greedily after every validation: rows of ``prompt``, ``messages`` or ``text``."""

    prompts: str
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        _check_at_least("samples", {"max_new_tokens": self.max_new_tokens}, 1)


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Processes = data x tensor x pipeline; all 1 needs no process group."""

    data: int = 1
    replicas: int = 1  # of the data processes: weights are sharded within a replica and repeated over them
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        _check_at_least("parallel", vars(self), 1)
        if self.data % self.replicas:
            raise ConfigError(
                f"parallel.replicas is {self.replicas}; expected a divisor of parallel.data ({self.data})"
            )

    @property
    def num_processes(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage of training. ``settings`` is the stage's own table, which in a file has the stage's name."""

    stage: str
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    run: RunSection
    batch: BatchSection = field(default_factory=BatchSection)
    settings: Any = None
    adapter: AdapterConfig | None = None
    samples: SamplesSection | None = None
    parallel: ParallelSection = field(default_factory=ParallelSection)

    def __post_init__(self) -> None:
        if self.data.max_length > self.batch.row_tokens:
            raise ConfigError(
                f"data.max_length ({self.data.max_length}) is above "
                f"batch.row_tokens ({self.batch.row_tokens})",
                hint="a packed row holds at least one sequence",
            )
        if self.adapter is not None and self.model.preset is not None:
            raise ConfigError(
                "[adapter] on the fresh weights of model.preset, which no file keeps",
                hint="train the whole model without [adapter], or name a checkpoint as model.start",
            )
        if self.adapter is not None and self.adapter.compose == "continue" and self._needs_start():
            raise ConfigError(
                f'adapter.compose = "continue" is not for stage {self.stage}: it compares with the start, '
                "which would be the model without its adapter, or has a head of its own",
                hint="leave it out: the result is one LoRA of both",
            )
        if self.adapter is not None and self.adapter.use_dora and self.parallel.tensor > 1:
            raise ConfigError("adapter.use_dora needs whole rows of a weight", hint="set parallel.tensor = 1")
        if self.optimizer.moments != "float32" and self.parallel.num_processes > 1:
            raise ConfigError(
                f"optimizer.moments = {self.optimizer.moments} is for one process",
                hint="shard float32 moments instead",
            )
        if self.run.extend and self.end_rate == 0:
            raise ConfigError(
                f"run.extend trains {self.run.extend} steps at the rate 0, with which schedule "
                f"{self.optimizer.schedule} ends",
                hint="set optimizer.min_learning_rate before the run, or start another from its model",
            )
        needs_validation = self.run.result == "best" or self.run.metric or self.run.early_stop_after
        if needs_validation and not self.data.validation:
            raise ConfigError("run.result best, metric and early_stop_after need data.validation")
        if self.samples is not None:
            self._check_samples()
        if self.settings is not None or self.kind.section is None:  # else its own problem is told
            self.kind.check(self)

    def _needs_start(self) -> bool:
        kind, settings = self.kind, self.settings
        is_told = settings is None and kind.section is not None  # of the table's own problem
        compares = not is_told and (kind.has_reference(settings) or kind.rollouts(settings) is not None)
        return compares or kind.has_reward_head

    @cached_property
    def kind(self) -> Stage:
        """What the stage is."""
        return stage.find(self.stage)

    @property
    def output_folder(self) -> Path:
        """Where the run leaves its model or adapter."""
        return self.run.directory / ("model" if self.adapter is None else "adapter")

    @property
    def end_rate(self) -> float:
        """The rate that the schedule ends with."""
        settings = self.optimizer
        return settings.learning_rate if settings.schedule == "constant" else settings.min_learning_rate

    def _check_samples(self) -> None:
        if self.kind.has_reward_head:
            raise ConfigError(
                f"table [samples] has no meaning in stage {self.stage}, whose model writes no text"
            )
        if not self.data.validation:
            raise ConfigError(
                "table [samples] needs data.validation: its prompts are answered after each one"
            )

    def samples_at(self, samples_seen: int) -> int:
        """Samples that the next step takes from the data; for policy-gradient these are prompts."""
        return self.kind.num_samples(self.settings) or self.batch.size_after(samples_seen)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``dotted.name=value`` overrides; paths are relative to the working folder."""
    values, source = config.read(path)
    override(values, overrides)
    return build(values, source=source)


def override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``dotted.name=value``; a length of the run replaces the one of the file, of either kind."""
    for each in overrides:
        config.apply_override(values, each)
    given = {each.partition("=")[0].strip() for each in overrides} & {"run.max_steps", "run.epochs"}
    if len(given) == 1:
        values["run"].pop("epochs" if given == {"run.max_steps"} else "max_steps", None)


def build(values: Mapping[str, Any], *, source: config.Source | None = None) -> Recipe:
    """The recipe of plain values, every key checked; ``source`` is named in errors."""
    source = source or config.Source("recipe")
    name = values.get("stage")
    if not isinstance(name, str):
        raise ConfigError(f"{source.name}: stage is {name!r}; expected one of {', '.join(stage.names())}")
    try:
        kind = stage.find(name)
    except ConfigError as error:
        raise ConfigError(f"{source.at('stage')}: {error.message}", hint=error.hint) from error
    source = dataclasses.replace(source, synonyms={**_own_names(kind), **synonyms(kind.table)})
    common = {key: value for key, value in values.items() if key != kind.table}
    problems = Problems()
    for other in (name.replace("-", "_") for name in stage.names()):
        with problems.kept():
            if common.pop(other, None) is not None:
                raise ConfigError(f"{source.at(other)}: table [{other}] has no meaning in stage {name}")
    with problems.kept():
        if "settings" in common:
            known = [field.name for field in dataclasses.fields(Recipe)]
            message, hint = unknown_name("key", "settings", known)
            raise ConfigError(f"{source.at('settings')}: {message}", hint=hint)
    common["settings"] = None
    with problems.kept():
        common["settings"] = _settings(kind, values, source)
    with problems.kept():
        made = config.build(Recipe, common, source=source)
    problems.tell()
    return made


def _own_names(kind: Stage) -> dict[str, str]:
    """Every setting's full name, for one that is in another table or in none."""
    sections: dict[str, Any] = {
        kind.table: kind.section, "adapter": AdapterConfig, "batch": BatchSection, "data": DataSection,
        "run": RunSection, "optimizer": OptimizerSection, "model": ModelSection,
    }  # fmt: skip
    return {
        field.name: f"{table}.{field.name}"
        for table, section in sections.items()
        for field in (dataclasses.fields(section) if section is not None else ())
        if field.name != "kind"
    }


def _settings(kind: Stage, values: Mapping[str, Any], source: config.Source) -> Any:
    """The stage's own table."""
    table = values.get(kind.table)
    if kind.section is None:
        if table is not None:
            raise ConfigError(f"{source.name}: stage {kind.name} has no table of its own")
        return None
    if table is None and kind.needed:
        raise ConfigError(f"stage {kind.name} needs a table [{kind.table}] with {kind.needed}")
    if table is not None and not isinstance(table, Mapping):
        raise ConfigError(f"{source.at(kind.table)}: {kind.table} is {table!r}; expected a table")
    return config.build(kind.section, table or {}, source=source, prefix=f"{kind.table}.")


def as_plain(value: Any) -> Any:
    """The resolved recipe as plain values, for the run's record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        named = {f.name: getattr(value, f.name) for f in fields if getattr(value, f.name) is not None}
        if isinstance(value, Recipe) and "settings" in named:
            named[value.kind.table] = named.pop("settings")
        return {name: as_plain(entry) for name, entry in named.items()}
    if isinstance(value, dict):
        return {name: as_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
