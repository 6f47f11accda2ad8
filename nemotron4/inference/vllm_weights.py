"""A trainer's weights in vLLM: what its workers learn besides their own methods, over vLLM's own RPC.

Imported inside vLLM's workers only (``worker_extension_cls``). The tensors lie in files of this machine; each
worker cuts out the part that its rank holds, as when it started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

from nemotron4.inference.vllm_loader import opened, tensor_names


class WeightsExtension:
    """Mixed into vLLM's worker, whose ``model_runner`` has the model."""

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
