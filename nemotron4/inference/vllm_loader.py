"""Weights for vLLM from any checkpoint of this package: NeMo, GGUF, or a model with an adapter merged in.

Later a trainer's tensors too. Imported inside vLLM's processes only. Each process reads the tensors of its
own pipeline stage, one at a time, and vLLM cuts out the part that its rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.errors import CheckpointError


class CheckpointLoader(BaseModelLoader):  # type: ignore[misc]
    """vLLM's ``load_format`` "nemotron4"; ``model_loader_extra_config`` names the checkpoint."""

    def download_model(self, model_config: Any) -> None:
        """The checkpoint is on this machine."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        checkpoint = opened(self.load_config.model_loader_extra_config)
        load: Any = model.load_weights
        loaded = load(
            (name, checkpoint.read(name, model_config.dtype)) for name in tensor_names(checkpoint, model)
        )
        missing = {name for name, _ in model.named_parameters()} - loaded
        if missing:
            raise CheckpointError(f"{checkpoint.path}: gives no values for {', '.join(sorted(missing)[:5])}")


class WeightsExtension:
    """Mixed into vLLM's worker (``worker_extension_cls``), to take a trainer's weights from files."""

    model_runner: Any

    def take_sent_weights(self, source: Mapping[str, str | None], files: Sequence[str]) -> None:
        """Compute with the tensors of ``files``, the last one that has a name, and of the checkpoint."""
        checkpoint = opened(source)
        sent: dict[str, str] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                sent |= dict.fromkeys(file.keys(), path)
        model = self.model_runner.get_model()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in tensor_names(checkpoint, model):
                if name in sent:
                    with safe_open(sent[name], framework="pt") as file:
                        yield name, file.get_tensor(name)
                else:
                    yield name, checkpoint.read(name, self.model_runner.model_config.dtype)

        self.model_runner.reload_weights(weights_iterator=tensors())


def opened(source: Mapping[str, str | None]) -> Checkpoint:
    """The checkpoint that ``source`` names by its path, with the adapter it names merged in."""
    checkpoint = open_checkpoint(str(source["model"]))
    return MergedCheckpoint(checkpoint, Path(source["adapter"])) if source["adapter"] else checkpoint


def tensor_names(checkpoint: Checkpoint, model: torch.nn.Module) -> list[str]:
    """Those of this process's pipeline stage; what vLLM makes itself is left out."""
    is_tied = checkpoint.config.tie_embeddings
    return [
        name
        for name in checkpoint.tensors
        if not name.endswith("rotary_emb.inv_freq")
        and not (is_tied and name == "lm_head.weight")
        and not is_pp_missing_parameter(name, model)
    ]
