"""Where a run's numbers go: always JSON lines, and TensorBoard or Weights & Biases where the recipe asks.

A resumed run forgets what was written after its checkpoint and writes it again, so no step is there twice.
"""

from __future__ import annotations

import json
import resource
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from nemotron4.errors import import_optional
from nemotron4.model.config import ModelConfig
from nemotron4.runs import write_file
from nemotron4.training.samples import Sample

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-id.txt"


@dataclass(frozen=True)
class StepRecord:
    """One line of the run's record."""

    step: int  # from 1
    num_steps: int
    values: Mapping[str, float]
    kind: str = "train"  # or validation

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **self.values}


@dataclass(frozen=True)
class Part:
    """How far a long part within a step, or before the first one, is. It is shown and not recorded."""

    name: str
    done: int
    total: int
    num_tokens: int = 0


OnPart = Callable[[Part], None]


def hear_nothing(part: Part) -> None:
    """For callers who want no progress of parts."""


class MetricsLog(Protocol):
    """``begin`` is called once, with the step that the run continues after (0: a new run)."""

    def begin(self, step: int) -> None: ...

    def write(self, progress: StepRecord) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``metrics.jsonl``: one object for each step and validation."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE

    def begin(self, step: int) -> None:
        if step == 0:
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            forget_after(self._path, step)

    def write(self, progress: StepRecord) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(progress.to_json()) + "\n")

    def close(self) -> None:
        """Every line is on its way to the disk already."""


def forget_after(path: Path, step: int) -> None:
    """Keep the lines of a file of JSON lines whose ``step`` is not after this one."""
    kept = [line + "\n" for line in path.read_text("utf-8").splitlines() if _is_until(line, step)]
    write_file(path, "".join(kept))


def _is_until(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError):
        return False  # the line that was being written when the process was killed


class TensorBoard:
    """Event files in ``tensorboard/``; names are ``train/loss``, ``validation/loss``."""

    def __init__(self, folder: Path) -> None:
        import_optional("tensorboard", "run.log")  # without it torch's writer does not import
        self._open = import_optional("torch.utils.tensorboard", "run.log").SummaryWriter
        self._folder = folder / "tensorboard"

    def begin(self, step: int) -> None:
        self._writer = self._open(str(self._folder), purge_step=step + 1)

    def write(self, progress: StepRecord) -> None:
        for name, value in progress.values.items():
            self._writer.add_scalar(f"{progress.kind}/{name}", value, progress.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``nemotron4``. Its id is in the folder, so that a resumed run continues it.

    Steps are a column of their own: W&B drops what is logged under a number below its latest, and a resumed
    run repeats the steps after its checkpoint.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._wandb = import_optional("wandb", "run.log")
        self._folder = folder
        self._recipe = dict(recipe)

    def begin(self, step: int) -> None:
        file = self._folder / WANDB_ID_FILE
        if step == 0 or not file.exists():
            file.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        self._run = self._wandb.init(
            project="nemotron4",
            id=file.read_text("utf-8").strip(),
            name=self._folder.name,
            resume="allow",
            dir=str(self._folder),
            config=self._recipe,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, progress: StepRecord) -> None:
        named = {f"{progress.kind}/{name}": value for name, value in progress.values.items()}
        self._run.log({"step": progress.step, **named})

    def close(self) -> None:
        self._run.finish()


def open_logs(folder: Path, names: Sequence[str], recipe: Mapping[str, Any]) -> list[MetricsLog]:
    """What the recipe asks for besides JSON lines; ConfigError if a package is missing."""
    logs: list[MetricsLog] = []
    if "tensorboard" in names:
        logs.append(TensorBoard(folder))
    if "wandb" in names:
        logs.append(WeightsAndBiases(folder, recipe))
    return logs


# ---- What a step costs in operations, and how fast this machine multiplies: the two sides of MFU.


@dataclass(frozen=True)
class StepCost:
    """Operations that a step needs, however it is packed; what is computed twice counts once.

    Two for each weight of the blocks and token, two for each weight of the output layer and trained token,
    and ``2 * length^2`` for each layer's heads (causal attention). The backward pass costs twice the forward
    pass; once, where only an adapter trains and most weights have no gradient.
    """

    block_weights: int
    output_weights: int
    attention_width: int  # heads x head dimension x layers
    num_passes: int

    @classmethod
    def of(cls, config: ModelConfig, *, has_adapter: bool) -> StepCost:
        output = config.vocab_size * config.hidden_size
        is_reward = bool(config.num_reward_attributes)
        matrices = 1 if is_reward or config.tie_embeddings else 2
        return cls(
            block_weights=config.num_parameters - matrices * output,
            output_weights=0 if is_reward else output,
            attention_width=config.num_heads * config.head_dim * config.num_layers,
            num_passes=2 if has_adapter else 3,
        )

    def flops(self, samples: Sequence[Sample]) -> float:
        """Operations of one step on these samples."""
        forward = 0.0
        for sample in samples:
            for segment in sample.segments:
                length = len(segment.tokens)
                forward += 2.0 * self.block_weights * length
                forward += 2.0 * self.output_weights * segment.num_trained
                forward += 2.0 * self.attention_width * length * length
            shared, more = sample.num_shared, len(sample.segments) - 1
            forward -= more * 2.0 * (self.block_weights * shared + self.attention_width * shared * shared)
        return self.num_passes * forward


@cache
def matmul_flops_per_s(device: torch.device | str = "cpu", size: int = 1024, rounds: int = 25) -> float:
    """The best of many float32 matrix products: what MFU and estimates are measured against.

    Measured once in a process.
    """
    x = torch.ones(size, size, device=device)
    return 2 * size**3 / min(_product_seconds(x) for _ in range(rounds))


@cache
def products_note(compute: str, device: torch.device) -> tuple[str, ...]:
    """A line that says so where products of 16 bits are slower here than float32's, else none."""
    if compute == "float32" or device.type != "cpu":
        return ()
    wide = torch.ones(512, 512)
    narrow = wide.to(getattr(torch, compute))
    # In turns, because other programs slow both, and for a while, because each takes a millisecond, or half a
    # second on a processor that has no instructions for it.
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + 0.3
    while len(rounds) < 2 or time.perf_counter() < end:
        rounds.append((_product_seconds(wide), _product_seconds(narrow)))
    ratio = min(seconds for seconds, _ in rounds) / min(seconds for _, seconds in rounds)
    if ratio >= 1:
        return ()
    return (
        f"matrix products in {compute} have {ratio:.2g} of float32's speed on this processor: "
        'with model.compute = "float32" a step is faster, and takes more memory',
    )


def _product_seconds(x: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ x
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was held so far: of the GPU's memory, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
