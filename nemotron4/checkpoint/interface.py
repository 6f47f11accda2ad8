"""What every checkpoint offers, whatever its files look like. Names and conventions are Hugging Face's.

Below the interface is what all forms share: the end of a text, the prompt format, the check of a tokenizer,
and tensors in blocks of rows, so that a conversion holds a few megabytes whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from nemotron4.errors import CheckpointError, TokenizerError
from nemotron4.model.config import ModelConfig
from nemotron4.text.prompt import card_prompt
from nemotron4.text.tokenizer import Tokenizer, check_round_trip

if TYPE_CHECKING:
    import torch

    from nemotron4.text.prompt import PromptFormat


Format = Literal["huggingface", "gguf", "nemo"]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored: ``dtype`` is the file's own word (``bfloat16``, ``Q4_1``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    num_bytes: int  # on disk, with the scales of a quantised weight


class RawTensor(NamedTuple):
    """A tensor as its file stores it: the type by ggml's name, the shape, and the bytes of each row."""

    kind: str  # "Q4_K", "Q8_0", ..., or one of PLAIN
    shape: tuple[int, ...]
    data_RX: Array  # uint8, read-only


PLAIN = ("F32", "F16", "BF16")


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

    def require_readable(self) -> None:
        """Raise CheckpointError, before a weight is read, if this package cannot expand the weights."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in memory of its own on the CPU; quantised ones come as float32 unless told.

        Raises CheckpointError naming the tensor and the file.
        """
        ...

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of one tensor, without the rest of it."""
        ...

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        """Stored bytes of rows ``start:stop`` in the order of ``read``: GGUF blocks, or plain numbers.

        None where the values are not in the file as ``read`` gives them. ``float_rows`` reads both.
        """
        ...

    def tokenizer(self) -> Tokenizer: ...

    chosen_format: PromptFormat | None

    def own_format(self) -> PromptFormat | None: ...

    def prompt_format(self) -> PromptFormat | None:
        """How a conversation becomes a prompt, or None for a base model without a template."""
        ...


class OwnOrChosenFormat:
    """The prompt format of a checkpoint: its own, or the one that was put in its place."""

    chosen_format: PromptFormat | None = None

    def own_format(self) -> PromptFormat | None:
        raise NotImplementedError

    def prompt_format(self) -> PromptFormat | None:
        return self.chosen_format or self.own_format()


BLOCK_VALUES = 2 * 1024**2  # small enough that the allocator reuses the memory of the last block


def row_ranges(start: int, stop: int, columns: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """``start:stop`` cut into ranges of at most BLOCK_VALUES values (at least one row)."""
    step = max(1, BLOCK_VALUES // max(1, math.prod(columns)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def blocks(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
    """The whole tensor, block after block."""
    shape = checkpoint.tensors[name].shape
    for start, stop in row_ranges(0, shape[0], shape[1:]):
        yield checkpoint.read_rows(name, start, stop, dtype)


def float_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Array:
    """Rows ``start:stop`` of one tensor as float32; torch is loaded for what only it can expand."""
    raw = checkpoint.raw_tensor(name, start, stop)
    values: Array
    if raw is None:
        import torch

        values = checkpoint.read_rows(name, start, stop, torch.float32).contiguous().numpy()
        return values
    if raw.kind not in PLAIN:
        from nemotron4.checkpoint.gguf_file import expand_rows

        values = expand_rows(raw.data_RX, raw.kind, name)
        return values
    stored = np.ascontiguousarray(raw.data_RX)
    if raw.kind == "BF16":
        values = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.view(np.float32 if raw.kind == "F32" else np.float16).astype(np.float32)
    return values.reshape(raw.shape)


# A Nemotron chat model ends a turn with <extra_id_1>, although its configuration declares </s> only.
NEMOTRON_ENDS = ("</s>", "<extra_id_1>")
TEMPLATE_ENDS = ("<|im_end|>", "<|eot_id|>", "<extra_id_1>")


def end_token_ids(
    declared: Iterable[int], tokenizer: Tokenizer, *, is_nemotron: bool, template: str | None
) -> tuple[int, ...]:
    """Declared ids first, then the end markers of the family and of the template that the vocabulary has."""
    declared = list(declared)
    for token_id in declared:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"the declared end of text {token_id!r} is not a token id")
    pieces = [*(NEMOTRON_ENDS if is_nemotron else ()), *template_ends(template)]
    found = [tokenizer.token_id(piece) for piece in pieces]
    return tuple(dict.fromkeys([*declared, *(token_id for token_id in found if token_id is not None)]))


def template_ends(template: str | None) -> tuple[str, ...]:
    """End-of-turn markers that a chat template writes."""
    return tuple(marker for marker in TEMPLATE_ENDS if template is not None and marker in template)


def prompt_format(
    template: str | None, tokenizer: Callable[[], Tokenizer], *, is_nemotron: bool
) -> PromptFormat | None:
    """None for a model that ships no template and whose vocabulary has no turn markers."""
    from nemotron4.text import prompt

    if template is None and is_nemotron:
        return prompt.nemotron4()
    return prompt.find_format(tokenizer(), template)


def missing_template_note(path: Path, template: str | None, *, is_nemotron: bool) -> tuple[str, ...]:
    if template is not None or not is_nemotron:
        return ()
    return (f"{path} has no chat template: conversations use the prompt format of the Nemotron-4 model card",)


def checked_tokenizer(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    """The tokenizer itself, if it returns the text it is given and every id of it has an embedding row."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids; the model has {config.vocab_size} rows",
            hint="the tokenizer files belong to another model",
        )
    try:
        check_round_trip(tokenizer, f"{card_prompt()}two  and    four spaces")
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", hint=error.hint) from error
    return tokenizer
