"""What every checkpoint offers, whatever its files look like. Names and conventions are Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from nemotron4.model.config import ModelConfig
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from nemotron4.text.prompt import PromptFormat

Format = Literal["huggingface", "gguf", "nemo"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored: ``dtype`` is the file's own word (``bfloat16``, ``Q4_1``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


class Checkpoint(Protocol):
    """An opened checkpoint: configuration and index are in memory, weights are still on disk.

    Tensor names are Hugging Face's (``model.layers.0.self_attn.q_proj.weight``), and so are the values:
    LayerNorm1P weights are gamma - 1, and q and k rows are in rotate-half order.
    """

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> Format: ...

    @property
    def name(self) -> str:
        """What a server calls the model: the pulled name, else the directory's or file's name."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions made where the files are silent, one sentence each, for the user to read."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool:
        """True when the model was trained with a BOS token before every text."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn, the checkpoint's own first."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in memory of its own on the CPU; quantised ones come as float32 unless told.

        Raises CheckpointError naming the tensor and the file.
        """
        ...

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of one tensor, without the rest of it."""
        ...

    def tokenizer(self) -> Tokenizer: ...

    def prompt_format(self) -> PromptFormat | None:
        """How a conversation becomes a prompt, or None for a base model without a template."""
        ...
