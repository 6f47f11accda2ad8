"""The inputs of each linear layer on given texts, one block in memory at a time.

The hidden states of all texts go through the blocks one after the other, so a model of any size is measured
in the memory of one block and of the texts.

Shape suffixes: B = texts, T = positions, D = hidden size, C = inputs of a layer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import DataError
from nemotron4.model.attention import CausalAttend, RotaryEmbedding
from nemotron4.model.transformer import Block

NUM_TEXTS, NUM_TOKENS = 64, 512


class LayerInputs(NamedTuple):
    """The largest input of a layer, and the mean square of each of its inputs."""

    largest: float
    squares_C: Tensor


def calibration_tokens(path: Path, checkpoint: Checkpoint) -> list[list[int]]:
    """The first paragraphs of a text file, each cut to ``NUM_TOKENS``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}", hint="give a text file in UTF-8") from error
    tokenizer = checkpoint.tokenizer()
    paragraphs = [part for part in text.split("\n\n") if part.strip()][:NUM_TEXTS]
    longest = min(NUM_TOKENS, checkpoint.config.context_length)
    rows = [tokenizer.encode(part)[:longest] for part in paragraphs]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"{path}: no text in it")
    return rows


@torch.no_grad()
def measure_inputs(checkpoint: Checkpoint, rows: list[list[int]]) -> dict[str, LayerInputs]:
    """Name of each linear layer of the blocks -> its inputs on the rows of token ids."""
    config = checkpoint.config
    rotary = RotaryEmbedding(config)
    ids = sorted({token_id for row in rows for token_id in row})
    embedded = {i: checkpoint.read_rows("model.embed_tokens.weight", i, i + 1, torch.float32)[0] for i in ids}
    hidden = [torch.stack([embedded[i] for i in row])[None] for row in rows]
    found: dict[str, LayerInputs] = {}
    num_tokens = sum(map(len, rows))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        with torch.device("meta"):
            block = Block(config, layer)
        state = {name: checkpoint.read(f"{prefix}.{name}", torch.float32) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(_note, found, f"{prefix}.{name}", num_tokens))
        for at, hidden_BTD in enumerate(hidden):
            positions_BT = torch.arange(hidden_BTD.shape[1])[None]
            rotation = rotary(positions_BT, torch.float32)
            hidden[at] = block(hidden_BTD, rotation, CausalAttend(None))
    return found


def _note(
    found: dict[str, LayerInputs], name: str, num_tokens: int, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    value: Tensor = inputs[0]
    largest = max(1e-6, float(value.abs().max()))
    squares_C = value.square().flatten(0, -2).sum(0) / num_tokens
    if name in found:
        largest, squares_C = max(largest, found[name].largest), squares_C + found[name].squares_C
    found[name] = LayerInputs(largest, squares_C)
