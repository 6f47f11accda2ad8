"""Folders of torch.distributed.checkpoint, as trainers leave them: torchtitan's names, or NeMo-RL's.

Such a folder has weights alone; ``config.json`` and the tokenizer of the model that was trained go next to
them. NeMo-RL has Hugging Face's names below a prefix. torchtitan turns neighbouring rows of q and k together,
as Meta's Llama does; here they are put into halves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron4.checkpoint.nemo_files import NemoFiles, NemoTensor, open_nemo_files, read_rows_into
from nemotron4.checkpoint.nemo_torch_dist import read_torch_dist_index
from nemotron4.errors import CheckpointError

TITAN_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
TITAN_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_STATE = re.compile(r"(optim|optimizer|lr_scheduler|scheduler|dataloader|train_state|rng)\b.*")


@dataclass(frozen=True)
class DcpTensor:
    """One tensor in the pieces of its ranks; see ``quantized.QuantizedWeight`` for what it offers."""

    files: NemoFiles
    stored: NemoTensor
    head_dim: int | None  # of a tensor whose rows turn in neighbouring pairs

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def word(self) -> str:
        return str(self.stored.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.stored.dtype.itemsize

    @property
    def file(self) -> Path:
        return self.files.source

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.head_dim is None:
            return self._plain(start, stop)
        first, last = start // self.head_dim * self.head_dim, -(-stop // self.head_dim) * self.head_dim
        rows = self._plain(first, last)
        pairs = rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).flatten(0, 2)[start - first : stop - first]

    def _plain(self, start: int, stop: int) -> torch.Tensor:
        columns = self.shape[1] if len(self.shape) == 2 else 1
        rows_RC = torch.empty((stop - start, columns), dtype=self.stored.dtype)
        read_rows_into(self.files, self.stored, (), start, rows_RC)
        return rows_RC if len(self.shape) == 2 else rows_RC[:, 0]


def dcp_tensors(folder: Path, *, head_dim: int) -> dict[str, DcpTensor]:
    """Every weight by its Hugging Face name; states of the optimizer and of the data are left out."""
    files = open_nemo_files(folder)
    found: dict[str, DcpTensor] = {}
    for key, stored in read_torch_dist_index(files, "").items():
        if OTHER_STATE.fullmatch(key) or ".exp_avg" in key:
            continue
        name, turns_in_pairs = _hugging_face_name(key, folder)
        if name in found:
            raise CheckpointError(f"{folder}: {key} and {found[name].stored.key} are the same tensor")
        found[name] = DcpTensor(files, stored, head_dim if turns_in_pairs else None)
    return found


def _hugging_face_name(key: str, folder: Path) -> tuple[str, bool]:
    """The name, and whether rows turn in neighbouring pairs there."""
    short = key.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    while short.startswith(("model.", "module.", "policy.")):
        short = short.partition(".")[2]
    stem, _, kind = short.rpartition(".")
    if stem in TITAN_NAMES:
        return f"{TITAN_NAMES[stem]}.{kind}", False
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", stem):
        if match[2] in TITAN_LAYER_NAMES:
            own = TITAN_LAYER_NAMES[match[2]]
            return f"model.layers.{match[1]}.{own}.{kind}", own.endswith(("q_proj", "k_proj"))
        return f"model.{short}", False
    if stem == "embed_tokens":
        return f"model.{short}", False
    if stem in ("lm_head", "reward_head"):
        return short, False
    raise CheckpointError(
        f"{folder}: tensor {key!r} has neither torchtitan's nor Hugging Face's name of a weight",
        hint="export the weights alone, without other states",
    )
