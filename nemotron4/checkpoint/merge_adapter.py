"""A checkpoint seen through an adapter that is linear in the weights, merged while rows are read.

LoRA: W + (alpha / rank) B A. (IA)3: rows or columns of W times a learned vector (Liu et al. 2022). Both in
float32, rounded once. An adapter of a reward model brings the head with it, so the base may be the language
model that it was trained on.

LoRA adapters of NeMo 1.x are a ``.nemo`` file or its directory: ``model_config.yaml`` has rank and alpha
in ``peft.lora_tuning``; the factors are in ``model_weights.ckpt``, in one such file for each tensor and
pipeline rank, or in a distributed checkpoint. The target ``attention_qkv`` has one A for q, k and v, and a B
whose rows are grouped like those of the fused QKV weight. Names: NeMo ``adapters/parallel_adapters.py``; how
ranks split: ``merge_lora_weights/merge.py``. Legend: R = output rows, K = rank, C = input columns.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from nemotron4.checkpoint.adapter_base import adapter_format, check_base
from nemotron4.checkpoint.derived import DerivedCheckpoint
from nemotron4.checkpoint.interface import Checkpoint, RawTensor, TensorInfo
from nemotron4.checkpoint.nemo import read_nemo_index
from nemotron4.checkpoint.nemo_config import NemoSettings, read_settings
from nemotron4.checkpoint.nemo_files import NemoFiles, NemoTensor, open_nemo_files, read_rows_into
from nemotron4.checkpoint.nemo_torch_dist import read_ckpt
from nemotron4.checkpoint.safetensors import StoredTensor, read_header, read_tensor
from nemotron4.errors import CheckpointError
from nemotron4.model.adapter_files import (
    HEAD_PREFIX,
    IA3,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    adapter_type,
    lora_from_nemo,
    read_adapter_config,
    unties,
)
from nemotron4.model.config import ModelConfig

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_FUSED = "self_attention.adapter_layer.lora_kqv_adapter"
_MODULES = {
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "self_attn.q_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "self_attn.k_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "self_attn.v_proj",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attn.o_proj",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.up_proj",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.down_proj",
}
# Layers whose input is split over tensor ranks: there A is cut by columns, elsewhere by rows.
_ROW_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
_KEY = re.compile(r"(?:model\.|module\.|language_model\.)*(?:de|en)coder\.layers\.(?:(\d+)\.)?(.+)\.weight")
_RANK_FILE = re.compile(
    r"(?:(?:mp|tp)_rank_(?P<tensor>\d+)(?:_pp_rank_(?P<pipeline>\d+))?/)?model_weights\.ckpt"
)


@dataclass(frozen=True)
class NemoLora:
    """``factors``: weight name -> (A [rank, in], B [out, rank]); the update is ``scale`` B A."""

    scale: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def is_nemo_adapter(path: Path) -> bool:
    return path.suffix == ".nemo" or (path / "model_config.yaml").is_file()


def read_nemo_lora(path: Path, config: ModelConfig) -> NemoLora:
    """The whole adapter, which is small. CheckpointError for other kinds and for another model's."""
    files = open_nemo_files(path)
    settings = read_settings(files)
    peft = settings.section("peft")
    scheme, tuning = peft.get("peft_scheme"), peft.section("lora_tuning")
    if scheme != "lora":
        raise CheckpointError(
            f"{path}: peft_scheme is {scheme!r}; only 'lora' can be merged into the weights",
            hint="a whole model is opened as MODEL, not as an adapter" if scheme is None else None,
        )
    rank = tuning.integer("adapter_dim")
    alpha = tuning.number("alpha") if tuning.get("alpha") is not None else rank
    parts = _stored_parts(files, settings)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for (layer, module), pair in parts.items():
        if pair.keys() != {"linear_in", "linear_out"}:
            raise CheckpointError(f"{path}: layer {layer}, {module}: only {', '.join(pair)} is there")
        down_KC, up_RK = pair["linear_in"], pair["linear_out"]
        if down_KC.shape[0] != rank or up_RK.shape[1] != rank:
            raise CheckpointError(
                f"{path}: layer {layer}, {module}: factors {list(up_RK.shape)} and {list(down_KC.shape)}; "
                f"adapter_dim is {rank}"
            )
        prefix = f"model.layers.{layer}"
        if module == _FUSED:
            split = lora_from_nemo(
                down_KC,
                up_RK,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
            factors |= {f"{prefix}.self_attn.{name}.weight": pair for name, pair in split.items()}
        elif module in _MODULES:
            factors[f"{prefix}.{_MODULES[module]}.weight"] = (down_KC, up_RK)
        else:
            raise CheckpointError(f"{path}: {module} is not a LoRA of a Nemotron layer")
    if not factors:
        raise CheckpointError(f"{path}: no LoRA factors are in it")
    return NemoLora(alpha / rank, factors)


_Parts = dict[tuple[int, str], dict[str, torch.Tensor]]


def _stored_parts(files: NemoFiles, settings: NemoSettings) -> _Parts:
    """(layer, NeMo's module name) -> its two factors, whole."""
    ranks = {
        (int(match["tensor"] or 0), int(match["pipeline"] or 0)): name
        for name in files.names
        if (match := _RANK_FILE.fullmatch(name))
    }
    if not ranks:
        return _from_distributed(files)
    num_tensor, num_stages = (max(axis) + 1 for axis in zip(*ranks, strict=True))
    if len(ranks) != num_tensor * num_stages:
        raise CheckpointError(
            f"{files.source}: {len(ranks)} rank files of {num_tensor} tensor x {num_stages} pipeline ranks"
        )
    layers_per_stage = settings.integer("num_layers", 0) // num_stages
    pieces: dict[tuple[int, str], dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for (_, stage), name in sorted(ranks.items()):
        for key, tensor in read_ckpt(files, name).items():
            layer, module, factor = _split_key(files, key)
            if layer is None:
                raise CheckpointError(f"{files.source}: {name}: {key} names no layer")
            pieces[layer + stage * layers_per_stage, module][factor].append(tensor)
    return {
        (layer, module): {
            factor: torch.cat(tensors, dim=int(factor == "linear_in" and module.endswith(_ROW_PARALLEL)))
            for factor, tensors in pair.items()
        }
        for (layer, module), pair in pieces.items()
    }


def _from_distributed(files: NemoFiles) -> _Parts:
    parts: _Parts = defaultdict(dict)
    for key, stored in read_nemo_index(files).items():
        layer, module, factor = _split_key(files, key)
        if layer is not None:
            parts[layer, module][factor] = _matrix(files, stored, ())
        else:  # stacked over the layers
            for number in range(stored.shape[0]):
                parts[number, module][factor] = _matrix(files, stored, (number,))
    return parts


def _matrix(files: NemoFiles, stored: NemoTensor, index: tuple[int, ...]) -> torch.Tensor:
    shape = stored.shape[len(index) :]
    if len(shape) != 2:
        raise CheckpointError(f"{files.source}: {stored.key} has shape {list(stored.shape)}")
    rows_RC = torch.empty(shape, dtype=stored.dtype)
    read_rows_into(files, stored, index, 0, rows_RC)
    return rows_RC


def _split_key(files: NemoFiles, key: str) -> tuple[int | None, str, str]:
    match = _KEY.fullmatch(key)
    module, _, factor = match[2].rpartition(".") if match else ("", "", "")
    if match is None or factor not in ("linear_in", "linear_out"):
        raise CheckpointError(f"{files.source}: tensor {key!r} is not a factor of a LoRA adapter")
    return None if match[1] is None else int(match[1]), module, factor


Read = Callable[[], torch.Tensor]


class _Update(Protocol):
    """Changes rows ``start:stop`` of one weight, which are float32, in place."""

    def __call__(self, rows_RC: torch.Tensor, start: int, stop: int) -> None: ...


@dataclass(frozen=True)
class _Product:
    """LoRA's update; the factors are read when they are needed."""

    scale: float
    down_KC: Read
    up_RK: Read
    length_R: Read | None = None  # DoRA: the length of each row

    def __call__(self, rows_RC: torch.Tensor, start: int, stop: int) -> None:
        rows_RC.addmm_(self.up_RK()[start:stop].float(), self.down_KC().float(), alpha=self.scale)
        if self.length_R is not None:
            rows_RC.mul_((self.length_R()[start:stop].float() / rows_RC.norm(dim=1))[:, None])


@dataclass(frozen=True)
class _Factor:
    """(IA)3's update: a factor for every row [R, 1] (of a bias [R]), or for every column [1, C]."""

    factor: Read
    is_for_rows: bool

    def __call__(self, rows_RC: torch.Tensor, start: int, stop: int) -> None:
        factor = self.factor().float()
        if self.is_for_rows:
            factor = factor[start:stop].view(-1, *[1] * (rows_RC.dim() - 1))
        rows_RC.mul_(factor)


@dataclass(frozen=True)
class _Adapter:
    """Weight name -> its update, and the whole tensors that it brings: a reward head, modules_to_save.

    ``unties``: one of two modules that share a weight is among them, and the other keeps the base's.
    """

    file: Path
    updates: Mapping[str, _Update]
    head: Mapping[str, StoredTensor] = field(default_factory=dict)
    unties: bool = False


class MergedCheckpoint(DerivedCheckpoint):
    """The base with the adapter in its weights. See ``interface.Checkpoint``."""

    def __init__(self, base: Checkpoint, path: Path, *, force: bool = False) -> None:
        check_base(path, base, force=force)
        super().__init__(base)
        self.adapter_path = path
        self._adapter = _nemo(path, base) if is_nemo_adapter(path) else _peft(path, base)
        if self._adapter.head:
            self._put_whole()

    def _put_whole(self) -> None:
        """Whole tensors of the adapter; a reward head in place of the output layer."""
        head = {
            name: TensorInfo(
                name,
                stored.shape,
                str(stored.dtype).removeprefix("torch."),
                self._adapter.file,
                stored.num_bytes,
            )
            for name, stored in self._adapter.head.items()
        }
        if "reward_head.weight" not in head:
            if self._adapter.unties:
                self.config = replace(self.config, tie_embeddings=False)
                head.setdefault(OUTPUT, replace(self.base.tensors[EMBEDDING], name=OUTPUT))
            self.tensors = {**self.tensors, **head}
            return
        kept = {name: info for name, info in self.tensors.items() if name != "lm_head.weight"}
        self.tensors = kept | head
        self.config = replace(self.config, num_reward_attributes=head["reward_head.weight"].shape[0])

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._adapter.head:
            rows_RC = read_tensor(self._adapter.file, self._adapter.head[name])[start:stop]
        else:
            rows_RC = self.base.read_rows(self._of_base(name), start, stop)
        update = self._adapter.updates.get(name)
        stored = rows_RC.dtype
        if update is not None:
            rows_RC = rows_RC.float()
            update(rows_RC, start, stop)
        return rows_RC.to(stored if dtype is None else dtype)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        is_changed = name in self._adapter.head or name in self._adapter.updates
        return None if is_changed else self.base.raw_tensor(self._of_base(name), start, stop)

    def _of_base(self, name: str) -> str:
        return EMBEDDING if name == OUTPUT and self._adapter.unties else name

    def own_format(self) -> PromptFormat | None:
        return adapter_format(self.adapter_path, self.tokenizer()) or self.base.prompt_format()


def is_mergeable(path: Path) -> bool:
    """False for an adapter that works next to the weights."""
    return is_nemo_adapter(path) or adapter_type(path) == IA3 or read_adapter_config(path).kind == "lora"


def adapter_hash(path: Path) -> str:
    """SHA-256 of the adapter's weights: whether two conversions merged the same."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _nemo(path: Path, base: Checkpoint) -> _Adapter:
    lora = read_nemo_lora(path, base.config)
    for weight, (down_KC, up_RK) in lora.factors.items():
        _check(path, base, weight, tuple(up_RK.shape), tuple(down_KC.shape))
    updates = {
        weight: _Product(lora.scale, partial(_given, down_KC), partial(_given, up_RK))
        for weight, (down_KC, up_RK) in lora.factors.items()
    }
    return _Adapter(path, updates)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _peft(folder: Path, base: Checkpoint) -> _Adapter:
    """Every tensor of the adapter belongs to a weight and fits it."""
    file = folder / WEIGHTS_FILE
    if adapter_type(folder) == IA3:
        return _Adapter(file, _factors(file, base))
    config = read_adapter_config(folder)
    if config.kind != "lora":
        raise CheckpointError(
            f"{folder}: a {config.kind} adapter cannot be merged into the weights: it is not linear in them",
            hint="serve it next to the weights with --adapter",
        )
    stored = dict(read_header(file))
    head = {
        name.removeprefix(PEFT_PREFIX): stored.pop(name)
        for name in list(stored)
        if name.startswith(HEAD_PREFIX) or name.split(".")[-2] in config.modules_to_save
    }
    found: dict[str, _Update] = {}
    for name, down_KC in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        up_RK = stored.get(name.replace(".lora_A.", ".lora_B."))
        if up_RK is None:
            raise CheckpointError(f"{file}: {module} has no lora_B")
        _check(file, base, f"{module}.weight", up_RK.shape, down_KC.shape)
        own = config.of(module)
        if (rank := down_KC.shape[0]) != own.rank:
            raise CheckpointError(f"{file}: {module} has rank {rank}; adapter_config.json says {own.rank}")
        length_R = stored.get(name.replace(".lora_A.weight", ".lora_magnitude_vector"))
        found[f"{module}.weight"] = _Product(
            own.scale,
            partial(read_tensor, file, down_KC),
            partial(read_tensor, file, up_RK),
            None if length_R is None else partial(read_tensor, file, length_R),
        )
    left = len(stored) - (3 if config.use_dora else 2) * len(found)
    if not found or left:
        other = next((name for name in stored if ".lora_" not in name), "some")
        raise CheckpointError(f"{file}: {left} of {len(stored)} tensors are not LoRA factors: {other}")
    return _Adapter(file, found, head, base.config.tie_embeddings and unties(folder))


def _factors(file: Path, base: Checkpoint) -> dict[str, _Update]:
    """(IA)3: a layer's output is scaled with its weight's rows and bias, a layer's input with the columns."""
    found: dict[str, _Update] = {}
    for name, stored in read_header(file).items():
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".ia3_l")
        weight = base.tensors.get(f"{module}.weight")
        shape = () if weight is None else weight.shape
        fitting = ((shape[0], 1), (1, shape[1])) if len(shape) == 2 else ()
        if not name.endswith(".ia3_l") or stored.shape not in fitting:
            what = f"the weight's is {list(shape)}" if shape else f"{base.path} has no such weight"
            raise CheckpointError(
                f"{file}: {name!r} is no (IA)3 vector: its shape is {list(stored.shape)}, {what}",
                hint="the adapter belongs to another model",
            )
        is_for_rows = stored.shape[1] == 1
        update = _Factor(partial(read_tensor, file, stored), is_for_rows)
        found[f"{module}.weight"] = update
        if is_for_rows and f"{module}.bias" in base.tensors:
            found[f"{module}.bias"] = update
    if not found:
        raise CheckpointError(f"{file}: no (IA)3 vectors are in it")
    return found


def _check(file: Path, base: Checkpoint, weight: str, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    expected = base.tensors[weight].shape if weight in base.tensors else None
    if (up[0], down[-1]) != expected or up[1:] != down[:1]:
        what = f"do not make {list(expected)}" if expected else f"are of no weight of {base.path}"
        raise CheckpointError(
            f"{file}: {weight}: factors {list(up)} and {list(down)} {what}",
            hint="the adapter belongs to another model",
        )
