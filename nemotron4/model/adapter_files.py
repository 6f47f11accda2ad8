"""Adapters on disk, in PEFT's format where PEFT has one: LoRA, and P-tuning's finished table.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Bottleneck adapters have no PEFT
form; they are kept the same way under ``peft_type`` "NEMOTRON4_BOTTLENECK", which peft refuses by name.
A reward model's head trains with its adapter and is saved whole, as PEFT's ``modules_to_save`` is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapters import PromptEmbedding, PromptTableEmbedding, adapted_modules, add_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PROMPT_KEY = "prompt_embeddings"
HEAD = "reward_head"
HEAD_PREFIX = f"{PEFT_PREFIX}{HEAD}."
IA3 = "IA3"  # merged only
PEFT_TYPES = {"lora": "LORA", "p_tuning": "PROMPT_TUNING", "bottleneck": "NEMOTRON4_BOTTLENECK"}


def adapter_tensors(model: nn.Module, config: AdapterConfig) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the file. Sharded tensors are gathered by the caller."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapted_modules(model).items():
        if isinstance(module, PromptEmbedding):
            tensors[PROMPT_KEY] = module.table().detach()
        elif isinstance(module, PromptTableEmbedding):
            tensors[PROMPT_KEY] = module.prompt_table.detach()
        else:
            for key, value in module.named_parameters():
                if key not in ("weight", "bias"):
                    tensors[f"{PEFT_PREFIX}{name}.{key}"] = value.detach()
    if not tensors:
        raise CheckpointError(f"the model has no {config.kind} adapter to save")
    tensors |= {name: parameter.detach() for name, parameter in _whole_modules(model, config).items()}
    head = getattr(model, HEAD, None)
    if head is not None:
        tensors |= {f"{HEAD_PREFIX}{name}": value.detach() for name, value in head.named_parameters()}
    return tensors


def _whole_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Parameter]:
    """Parameters of the modules that are kept whole with the adapter, by their names in the file."""
    return {
        f"{PEFT_PREFIX}{name}.{key}": parameter
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.modules_to_save
        for key, parameter in module.named_parameters()
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: AdapterConfig, *, base: str) -> None:
    """``base`` is the path or id of the model that the adapter belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(
        json.dumps(_peft_config(config, tensors, base), indent=2) + "\n", encoding="utf-8"
    )


def _peft_config(config: AdapterConfig, tensors: dict[str, Tensor], base: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "peft_type": PEFT_TYPES[config.kind],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    saved = list(config.modules_to_save)
    if any(name.startswith(HEAD_PREFIX) for name in tensors):
        values["task_type"] = "SEQ_CLS"
        saved.append(HEAD)
    if saved:
        values["modules_to_save"] = saved
    if config.kind == "lora":
        targets = sorted({name.split(".")[-3] for name in tensors if name.endswith(".lora_A.weight")})
        alpha = config.rank if config.alpha is None else config.alpha
        return values | {
            "r": config.rank,
            "lora_alpha": _short(alpha),
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": {key: _short(value) for key, value in config.alpha_pattern.items()},
            "lora_dropout": config.dropout,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": False,
        }
    if config.kind == "p_tuning":
        num_tokens, size = tensors[PROMPT_KEY].shape
        return values | {"num_virtual_tokens": num_tokens, "token_dim": size, "num_transformer_submodules": 1}
    return values | {"rank": config.rank}


def _short(number: float) -> float:
    return int(number) if number == int(number) else number


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The adapter's kind and size; CheckpointError for a form this package cannot serve exactly."""
    path = folder / CONFIG_FILE
    values = read_values(path)
    kinds = {peft: kind for kind, peft in PEFT_TYPES.items()}
    kind = kinds.get(str(values.get("peft_type")))
    if kind is None:
        raise CheckpointError(
            f"{path}: peft_type is {values.get('peft_type')!r}; expected one of {', '.join(sorted(kinds))}"
        )
    if kind == "p_tuning":
        return AdapterConfig(kind="p_tuning", num_virtual_tokens=values["num_virtual_tokens"])
    if kind == "bottleneck":
        return AdapterConfig(kind="bottleneck", rank=values["rank"])
    _refuse_unsupported_lora(values, path)
    targets = values["target_modules"]
    if isinstance(targets, str):
        if targets != "all-linear":
            raise CheckpointError(
                f"{path}: target_modules is the pattern {targets!r}; expected a list of names"
            )
        targets = ["all"]
    names = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in targets))
    try:
        return AdapterConfig(
            kind="lora",
            rank=values["r"],
            alpha=float(values.get("lora_alpha", values["r"])),
            targets=names,
            rank_pattern=_pattern(values, "rank_pattern", path),
            alpha_pattern=_pattern(values, "alpha_pattern", path),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            modules_to_save=tuple(_saved_besides_the_head(values)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def _pattern(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: {name} is {pattern!r}; expected an object")
    return pattern


def adapter_type(folder: Path) -> str | None:
    """PEFT's own word for the adapter, also of kinds that only merging knows."""
    kind = read_values(folder / CONFIG_FILE).get("peft_type")
    return kind if isinstance(kind, str) else None


def has_reward_head(folder: Path) -> bool:
    """True for the adapter of a reward model, which brings the head that its base lacks."""
    if not folder.is_dir():
        return False  # NeMo's .nemo holds LoRA factors alone
    return HEAD in (read_values(folder / CONFIG_FILE).get("modules_to_save") or ())


def unties(folder: Path) -> bool:
    """Whether embedding or output layer is a module of its own in it, as PEFT keeps one of two that share."""
    values = read_values(folder / CONFIG_FILE)
    saved = {name.rsplit(".", 1)[-1] for name in values.get("modules_to_save") or ()}
    return bool(saved & {"embed_tokens", "lm_head"}) and not values.get("ensure_weight_tying")


def read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", hint="an adapter is a folder with this file"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _saved_besides_the_head(values: dict[str, Any]) -> list[str]:
    return [name for name in values.get("modules_to_save") or () if name != HEAD]


def _refuse_unsupported_lora(values: dict[str, Any], path: Path) -> None:
    for name in (
        "layers_to_transform",
        "lora_bias",
        "layer_replication",
        "alora_invocation_tokens",
        "target_parameters",
    ):
        if values.get(name):
            raise CheckpointError(f"{path}: {name} is {values[name]!r}, which is not supported")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, whose update is of another base",
            hint="save it in PEFT with path_initial_model_for_weight_conversion, or merge it there",
        )
    if values.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {values['bias']!r}; only 'none' is supported")


def load_adapter(model: nn.Module, folder: Path) -> AdapterConfig:
    """Put a saved adapter into a model whose base weights are loaded; every tensor used exactly once."""
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    slots = _head_slots(model, tensors)
    if config.kind == "p_tuning":
        _load_table(model, {name: tensors.pop(name) for name in tensors.keys() - slots.keys()}, path)
    else:
        add_adapter(model, config, seed=0)
        slots |= {
            f"{PEFT_PREFIX}{name}.{key}": parameter
            for name, module in adapted_modules(model).items()
            for key, parameter in module.named_parameters()
            if key not in ("weight", "bias")
        }
        slots |= _whole_modules(model, config)
    missing, surplus = sorted(slots.keys() - tensors.keys()), sorted(tensors.keys() - slots.keys())
    if missing or surplus:
        what = f"tensor {missing[0]!r} is missing" if missing else f"tensor {surplus[0]!r} has no place"
        raise CheckpointError(f"{path}: {what} ({len(missing)} missing, {len(surplus)} surplus)")
    with torch.no_grad():
        for name, parameter in slots.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}; "
                    f"the model expects {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
    model.requires_grad_(False)
    return config


def _head_slots(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a saved head fills; none where the adapter has no head of its own."""
    head = getattr(model, HEAD, None)
    if head is None or not any(name.startswith(HEAD_PREFIX) for name in tensors):
        return {}
    return {f"{HEAD_PREFIX}{name}": parameter for name, parameter in head.named_parameters()}


def _load_table(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    if set(tensors) != {PROMPT_KEY}:
        raise CheckpointError(f"{path}: has {sorted(tensors)}; expected {PROMPT_KEY!r} alone")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "embed_tokens" and isinstance(child, nn.Embedding):
                if tensors[PROMPT_KEY].shape[1] != child.embedding_dim:
                    raise CheckpointError(
                        f"{path}: virtual tokens of width {tensors[PROMPT_KEY].shape[1]}; "
                        f"the model's is {child.embedding_dim}"
                    )
                setattr(parent, name, PromptTableEmbedding(child, tensors[PROMPT_KEY]))
                return
    raise CheckpointError("the model has no embed_tokens to put virtual tokens in")


def lora_from_nemo(
    linear_in_RD: Tensor, linear_out: Tensor, *, num_heads: int, num_kv_heads: int, head_dim: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """NeMo's fused QKV LoRA as separate (A, B) for q_proj, k_proj and v_proj.

    The fused form shares A; the rows of its B are grouped like those of the fused QKV weight: for each
    key/value head its query heads, then its key, then its value.
    """
    group = num_heads // num_kv_heads
    rows = num_kv_heads * (group + 2) * head_dim
    if linear_out.shape[0] != rows:
        raise CheckpointError(f"fused LoRA output has {linear_out.shape[0]} rows; the model's QKV has {rows}")
    grouped = linear_out.view(num_kv_heads, group + 2, head_dim, -1)
    parts = {
        "q_proj": grouped[:, :group],
        "k_proj": grouped[:, group : group + 1],
        "v_proj": grouped[:, group + 1 :],
    }
    return {name: (linear_in_RD.clone(), part.flatten(0, 2).clone()) for name, part in parts.items()}
