"""A recipe: everything that decides a training run, as frozen dataclasses read from one TOML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemotron4 import config
from nemotron4.errors import ConfigError
from nemotron4.model.adapters import AdapterConfig
from nemotron4.training.metrics import LogName
from nemotron4.training.policy_settings import PolicyGradientSection

# Names that other trainers, and older recipes, give to our settings.
SYNONYMS = {
    "recompute": "model.activation_checkpointing",
    "gradient_checkpointing": "model.activation_checkpointing",
    "model_name_or_path": "model.start",
    "base_model": "model.start",
    "pretrained": "model.start",
    "bf16": 'model.compute = "bfloat16"',
    "precision": 'model.compute = "bfloat16"',
    "torch_dtype": "model.compute",
    "dtype": "model.compute",
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.validation",
    "validation_file": "data.validation",
    "seq_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "wd": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "grad_clip": "optimizer.clip_norm",
    "batch_size": "batch.global_size",
    "global_batch_size": "batch.global_size",
    "train_batch_size": "batch.global_size",
    "gradient_accumulation_steps": "batch.global_size, which is whole whatever fits in a row",
    "micro_batch_size": "batch.row_tokens, the tokens of one packed row",
    "per_device_train_batch_size": "batch.row_tokens, the tokens of one packed row",
    "num_train_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "max_epochs": "run.epochs",
    "num_steps": "run.max_steps",
    "output_dir": "run.directory",
    "save_steps": "run.save_every",
    "save_interval": "run.save_every",
    "save_total_limit": "run.keep_checkpoints",
    "eval_steps": "run.validate_every",
    "val_check_interval": "run.validate_every",
    "logging": "run.log",
    "report_to": "run.log",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "ref_policy_kl_penalty": "preference.beta",
    "loss_type": "preference.loss",
    "num_generations": "policy_gradient.group_size",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
}

StageName = Literal["pretrain", "sft", "steerlm", "reward", "preference", "policy-gradient"]


def _check_at_least(section: str, values: dict[str, float], minimum: float) -> None:
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(f"{section}.{name} is {value}; expected {minimum:g} or more")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Where the weights come from: ``start`` (a checkpoint) or ``preset`` (fresh weights).

    ``compute`` is the type of products and activations. What trains is float32, and so are its gradients and
    optimiser; what is frozen is kept in the type of compute.
    """

    start: str | None = None
    preset: str | None = None
    tokenizer: str | None = None  # a checkpoint whose tokenizer a fresh model uses
    device: str = "auto"  # auto: the GPU if there is one
    compute: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False  # blocks keep their inputs alone and run again for the gradient

    def __post_init__(self) -> None:
        if (self.start is None) == (self.preset is None):
            raise ConfigError("model needs exactly one of start and preset")
        if self.preset is not None and self.tokenizer is None:
            raise ConfigError("model.preset has no tokenizer of its own", hint="set model.tokenizer")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Files of rows. ``max_length`` counts the tokens of one sequence, prompt and answer."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()  # pretrain: share of each training file; empty: by size
    max_length: int = 1024
    over_long: Literal["drop", "cut"] = "drop"  # cut: the end is removed, with its stop marker
    max_bad_rows: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train names no file")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"data.weights has {len(self.weights)} values for {len(self.train)} files")
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ConfigError(f"data.weights is {self.weights}; expected non-negative, not all zero")
        _check_at_least("data", {"max_length": self.max_length}, 2)


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
    schedule: Literal["constant", "cosine", "linear", "steep"] = "constant"
    warmup_steps: int = 10
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0 is off

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}; expected two numbers in [0, 1)")
        values = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "clip_norm")
        _check_at_least("optimizer", {name: getattr(self, name) for name in values}, 0)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Length, place and rhythm of the run; exactly one of ``max_steps`` and ``epochs``."""

    directory: Path
    max_steps: int | None = None
    epochs: int | None = None
    save_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 0  # 0: only at the end
    seed: int = 0
    log: tuple[LogName, ...] = ()  # besides metrics.jsonl

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError("run needs exactly one of max_steps and epochs")
        _check_at_least("run", {"save_every": self.save_every, "keep_checkpoints": self.keep_checkpoints}, 1)
        _check_at_least("run", {"length": self.max_steps or self.epochs or 0}, 1)


@dataclass(frozen=True, kw_only=True)
class SamplesSection:
    """Prompts, answered greedily after every validation: rows of ``prompt``, ``messages`` or ``text``."""

    prompts: Path
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        _check_at_least("samples", {"max_new_tokens": self.max_new_tokens}, 1)


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """``loss`` rpo is Reward-aware Preference Optimization (arXiv 2406.11704), not TRL's former rpo_alpha."""

    loss: Literal["dpo", "ipo", "rpo", "kto"]
    beta: float
    eta: float = 1.0
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    preference_weight: float = 1.0
    sft_weight: float = 0.0
    average_logprobs: bool = False  # per token instead of summed over the answer
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"preference.beta is {self.beta}; expected more than 0 (0 trains nothing)")
        if self.preference_weight == 0 and self.sft_weight == 0:
            raise ConfigError("preference.preference_weight and sft_weight are both 0: nothing would train")
        if self.loss == "kto" and self.sft_weight:
            raise ConfigError("preference.sft_weight has no meaning for kto")


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """``objective`` regression needs attributes in the rows; the Bradley-Terry ones need pairs."""

    objective: Literal["regression", "bradley_terry", "bradley_terry_margin", "bradley_terry_scaled"] = (
        "regression"
    )
    attributes: tuple[str, ...] = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    score: str = "helpfulness"  # the output that Bradley-Terry trains


@dataclass(frozen=True, kw_only=True)
class SteerlmSection:
    """``conditioned``: the likelihood of labelled answers. ``weighted``: SteerLM 2.0, on weighted samples."""

    objective: Literal["conditioned", "weighted"] = "conditioned"


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Processes = data x tensor x pipeline; all 1 needs no process group."""

    data: int = 1
    replicas: int = 1  # of the data processes: weights are sharded within a replica and repeated over them
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        _check_at_least("parallel", dataclasses.asdict(self), 1)
        if self.data % self.replicas:
            raise ConfigError(
                f"parallel.replicas is {self.replicas}; expected a divisor of parallel.data ({self.data})"
            )

    @property
    def num_processes(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage of training."""

    stage: StageName
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    run: RunSection
    batch: BatchSection = field(default_factory=BatchSection)
    preference: PreferenceSection | None = None
    reward: RewardSection | None = None
    steerlm: SteerlmSection | None = None
    policy_gradient: PolicyGradientSection | None = None
    adapter: AdapterConfig | None = None
    samples: SamplesSection | None = None
    parallel: ParallelSection = field(default_factory=ParallelSection)

    def __post_init__(self) -> None:
        if self.stage == "preference" and self.preference is None:
            raise ConfigError("stage preference needs a table [preference] with loss and beta")
        if self.stage == "policy-gradient":
            self._check_policy_gradient()
        for name in ("preference", "reward", "steerlm", "policy_gradient"):
            if getattr(self, name) is not None and self.stage.replace("-", "_") != name:
                raise ConfigError(f"table [{name}] has no meaning in stage {self.stage}")
        if self.data.max_length > self.batch.row_tokens:
            raise ConfigError(
                f"data.max_length ({self.data.max_length}) is above "
                f"batch.row_tokens ({self.batch.row_tokens})",
                hint="a packed row holds at least one sequence",
            )
        if self.samples is not None:
            self._check_samples()
        if self.data.weights and self.stage != "pretrain":
            raise ConfigError(f"data.weights has no meaning in stage {self.stage}")

    def _check_samples(self) -> None:
        if self.stage == "reward":
            raise ConfigError("table [samples] has no meaning in stage reward, whose model writes no text")
        if not self.data.validation:
            raise ConfigError(
                "table [samples] needs data.validation: its prompts are answered after each one"
            )

    def _check_policy_gradient(self) -> None:
        settings = self.policy_gradient
        if settings is None:
            raise ConfigError(
                "stage policy-gradient needs a table [policy_gradient] with algorithm and rewards"
            )
        if self.batch.ramp:
            raise ConfigError("batch.ramp has no meaning in stage policy-gradient")
        if settings.max_new_tokens >= self.data.max_length:
            raise ConfigError(
                f"policy_gradient.max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt in "
                f"data.max_length ({self.data.max_length})"
            )

    def samples_at(self, samples_seen: int) -> int:
        """Samples that the next step takes from the data; for policy-gradient these are prompts."""
        if self.policy_gradient is not None:
            return self.policy_gradient.num_prompts
        return self.batch.size_after(samples_seen)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``dotted.name=value`` overrides; paths are relative to the working folder."""
    values, source = config.read(path, overrides)
    return build(values, source=source)


def build(values: Mapping[str, Any], *, source: config.Source | None = None) -> Recipe:
    """The recipe of plain values, every key checked; ``source`` is named in errors."""
    source = source or config.Source("recipe")
    return config.build(Recipe, values, source=dataclasses.replace(source, synonyms=SYNONYMS))


def as_plain(value: Any) -> Any:
    """The resolved recipe as plain values, for the run's record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {
            f.name: as_plain(getattr(value, f.name)) for f in fields if getattr(value, f.name) is not None
        }
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
