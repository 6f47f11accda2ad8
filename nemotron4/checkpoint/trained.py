"""A training run's checkpoint folder as a model: the weights of ``step-...`` with the tokenizer of its run.

The shards are float32 safetensors, one for each process and part; rows are read whatever the layout was.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from nemotron4.checkpoint.hf_config import model_config
from nemotron4.checkpoint.huggingface import HuggingFaceCheckpoint
from nemotron4.checkpoint.interface import TensorInfo
from nemotron4.checkpoint.safetensors import read_json
from nemotron4.errors import CheckpointError

STATE_FILE = "state.json"
WEIGHTS = "model."  # before the name of each trained parameter
RUN_FILES = "tokenizer"  # in the run's folder: configuration and tokenizer of what it trains


class SavedWeights:
    """The trained weights of a checkpoint on disk, by the model's own names, some rows at a time."""

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for index, stored in metadata.storage_data.items():
            if index.fqn.startswith(WEIGHTS):
                name = index.fqn.removeprefix(WEIGHTS)
                whole = metadata.state_dict_metadata[index.fqn]
                assert isinstance(whole, TensorStorageMetadata), "safetensors hold tensors only"
                self.shapes[name] = tuple(whole.size)
                self._parts.setdefault(name, []).append((stored.relative_path, tuple(index.offset)))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of a tensor, float32."""
        from safetensors import safe_open

        rows = torch.empty((stop - start, *self.shapes[name][1:]))
        for file, offset in self._parts[name]:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_slice(WEIGHTS + name)
                shape = part.get_shape()
                low, high = max(start, offset[0]), min(stop, offset[0] + shape[0])
                if low < high:
                    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True))
                    rows[(slice(low - start, high - start), *columns)] = part[
                        low - offset[0] : high - offset[0]
                    ]
        return rows


class TrainedCheckpoint(HuggingFaceCheckpoint):
    """See ``interface.Checkpoint``. ``path`` has the run's configuration and tokenizer."""

    def __init__(self, step: Path) -> None:
        self.path = step.absolute().parent.parent / RUN_FILES
        if not (self.path / "config.json").is_file():
            raise CheckpointError(
                f"{step}: the run keeps no configuration of a whole model: it trains an adapter, or is of an "
                "earlier version",
                hint='repeat its train command with run.result = "best" or a step, which writes that one',
            )
        self.name = step.absolute().parent.parent.name
        self._values = read_json(self.path / "config.json")
        self.config, notes = model_config(self._values, self.path / "config.json")
        self.quantization = None
        self._weights = SavedWeights(step)
        self.tensors = {
            name: TensorInfo(name, shape, "float32", step, 4 * math.prod(shape))
            for name, shape in self._weights.shapes.items()
        }
        self._notes = (*notes, f"the weights are those of {step.name}")

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> None:
        return None

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        self._info(name)
        rows = self._weights.read_rows(name, start, stop)
        return rows if dtype is None else rows.to(dtype)
