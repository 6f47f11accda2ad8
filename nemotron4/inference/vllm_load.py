"""Start vLLM on a checkpoint: which settings it gets, on one node or as a part of several."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.inference.load import cache_blocks, checked, describe, find_device
from nemotron4.inference.precision import find_dtype
from nemotron4.inference.sent_weights import SentWeights, source_of
from nemotron4.inference.vllm_engine import VllmEngine
from nemotron4.inference.vllm_plugin import LOAD_FORMAT, PLUGIN_GROUP, PLUGIN_NAME
from nemotron4.model.config import ModelConfig
from nemotron4.model.kv_cache import KVCache
from nemotron4.text.prompt import chosen_format

INSTALL_HINT = "pip install 'vllm>=0.30', or scripts/vllm-env for a CPU build in an environment of its own"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on devices. Ranks are vLLM's: tensor parallel inside pipeline stages, node by node."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    nodes: int = 1
    node_rank: int = 0
    leader_host: str = "127.0.0.1"
    leader_port: int = 29501  # torch.distributed's rendezvous; only used with several nodes

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.num_devices % self.nodes:
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} x pipeline_parallel {self.pipeline_parallel} = "
                f"{self.num_devices} devices do not divide by {self.nodes} nodes"
            )

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def devices_per_node(self) -> int:
        return self.num_devices // self.nodes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What vLLM is told about memory, and which revision of a hub id is meant."""

    max_running: int
    cache_gb: float | None = None
    revision: str | None = None
    context: int | None = None  # tokens of a request; the model's if absent
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None

    def of(self, context_length: int) -> int:
        """The tokens of a request; ConfigError if the model has fewer positions."""
        if self.context is not None and self.context > context_length:
            raise ConfigError(
                f"context is {self.context}; the model has {context_length} positions",
                hint=f"use --context {context_length} or less",
            )
        return self.context or context_length


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def load_vllm(
    model: str | Path,
    layout: Layout | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | None = None,
    max_running: int = 128,
    max_waiting: int = 1024,
    start_timeout_s: float | None = None,
    chat_template: str | None = None,
    **limits: Any,
) -> VllmEngine:
    """Start vLLM with the model, on this node as the leader of ``layout``, and wait until it can generate.

    A Hugging Face directory is read by vLLM itself; NeMo and GGUF files, and a model with an adapter, by our
    reader inside vLLM's processes. ``limits`` are the other fields of ``Limits``: ``cache_gb`` is for keys
    and values on all devices together; by default vLLM takes what a GPU has left, and on a CPU it is what the
    built-in engine would take.
    """
    layout, limit = layout or Layout(), Limits(max_running=max_running, **limits)
    _require_vllm()
    checkpoint = _opened(model, adapter, limit.revision)
    chosen = _device(device, layout)
    chosen_dtype = find_dtype(dtype, chosen)
    folder = tempfile.TemporaryDirectory(prefix="nemotron4-vllm-")
    weights = SentWeights(checkpoint, adapter, Path(folder.name))
    try:
        settings = _settings(checkpoint, layout, chosen, chosen_dtype, adapter, limit, Path(folder.name))
        _prepare_environment(chosen, layout)
        tokenizer = checkpoint.tokenizer()
        info, prompt_format = checked(
            describe(checkpoint, chosen_dtype, chosen),
            tokenizer,
            checkpoint.prompt_format() if chat_template is None else chosen_format(chat_template, tokenizer),
        )
        info = replace(info, context_length=limit.of(info.context_length))
        if layout.num_devices > 1:
            info = replace(info, device=f"{layout.num_devices} x {chosen}")

        def start(logger: Any) -> Any:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings), stat_loggers=[logger])

        return VllmEngine(
            start,
            info,
            tokenizer,
            prompt_format,
            max_running=max_running,
            max_waiting=max_waiting,
            weights=weights if layout.nodes == 1 else None,
            cleanup=folder.cleanup,
            start_timeout_s=start_timeout_s,
        )
    except BaseException:
        folder.cleanup()
        raise


def join_vllm(
    model: str | Path,
    layout: Layout,
    *,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | None = None,
    max_running: int = 128,
    **limits: Any,
) -> None:
    """Lend this node's devices to the leader of ``layout``; returns when one of its workers has ended.

    The settings must be the leader's. vLLM calls this a headless node.
    """
    _require_vllm()
    limit = Limits(max_running=max_running, **limits)
    checkpoint = _opened(model, adapter, limit.revision)
    chosen = _device(device, layout)
    with tempfile.TemporaryDirectory(prefix="nemotron4-vllm-") as folder:
        chosen_dtype = find_dtype(dtype, chosen)
        settings = _settings(checkpoint, layout, chosen, chosen_dtype, adapter, limit, Path(folder))
        _prepare_environment(chosen, layout)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        config = AsyncEngineArgs(**settings).create_engine_config(headless=True)
        executor = MultiprocExecutor(config, monitor_workers=False)
        executor.start_worker_monitor(inline=True)


def _require_vllm() -> None:
    if not is_installed():
        raise ConfigError("engine is 'vllm', but vLLM is not installed here", hint=INSTALL_HINT)
    if not any(entry.name == PLUGIN_NAME for entry in entry_points(group=PLUGIN_GROUP)):
        raise ConfigError(
            "vLLM's processes cannot find this package",
            hint="install it with pip into vLLM's environment; a PYTHONPATH is not enough",
        )


def _opened(model: str | Path, adapter: str | Path | None, revision: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(model, revision=revision)
    if checkpoint.config.num_reward_attributes:
        raise CheckpointError(
            f"{checkpoint.path}: a reward model; vLLM is used for text only",
            hint="serve it with the built-in engine",
        )
    return checkpoint if adapter is None else MergedCheckpoint(checkpoint, Path(adapter))


def _device(device: str, layout: Layout) -> torch.device:
    chosen = find_device(device)
    if chosen.type == "cuda" and torch.cuda.device_count() < layout.devices_per_node:
        raise ConfigError(
            f"the layout needs {layout.devices_per_node} GPUs on each node; this one has "
            f"{torch.cuda.device_count()}",
            hint="nemotron4 plan MODEL --gpu KIND prints the layouts that fit",
        )
    return chosen


def _settings(
    checkpoint: Checkpoint,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    adapter: str | Path | None,
    limits: Limits,
    folder: Path,
) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs``."""
    config = checkpoint.config
    context = limits.of(config.context_length)
    settings: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": layout.tensor_parallel,
        "pipeline_parallel_size": layout.pipeline_parallel,
        "distributed_executor_backend": "mp",
        "nnodes": layout.nodes,
        "node_rank": layout.node_rank,
        "master_addr": layout.leader_host,
        "master_port": layout.leader_port,
        # One position more than the model has: vLLM always draws a token, also behind a full context that
        # is only scored.
        "max_model_len": context + 1,
        "hf_overrides": {"max_position_embeddings": config.context_length + 1, **_yarn_settings(config)},
        "max_num_seqs": limits.max_running,
        "max_logprobs": -1,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the checkpoint: every request has its own
        "disable_log_stats": True,
        "enable_log_requests": False,
        "seed": 0,
        "kv_cache_dtype": limits.kv_cache_dtype,
        "worker_extension_cls": "nemotron4.inference.vllm_loader.WeightsExtension",
    }
    if limits.gpu_memory_utilization is not None:
        settings["gpu_memory_utilization"] = limits.gpu_memory_utilization
    is_vllms = checkpoint.format == "huggingface" and any(checkpoint.path.glob("*.safetensors"))
    if is_vllms and adapter is None:
        settings["model"] = str(checkpoint.path)
    else:
        values = config_json(config, dtype=dtype)
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        settings |= {"model": str(folder), "load_format": LOAD_FORMAT}
        settings["model_loader_extra_config"] = source_of(checkpoint, adapter)
    if limits.cache_gb is not None or device.type == "cpu":
        one_block = KVCache.bytes_per_block(config, dtype)
        blocks = cache_blocks(config, one_block, device.type, limits.cache_gb, limits.max_running)
        total = blocks * one_block
        settings["kv_cache_memory_bytes"] = max(1, total // layout.num_devices)
    if device.type == "cpu" and layout.pipeline_parallel > 1:
        # Without compilation vLLM's CPU build skips the pass in which later stages make their buffers; this
        # asks for compilation by a backend that compiles nothing.
        settings["compilation_config"] = {"mode": 2, "backend": "eager"}
    elif device.type == "cpu":
        settings["enforce_eager"] = True  # compiling for a CPU takes minutes
    return settings


def _yarn_settings(config: ModelConfig) -> dict[str, Any]:
    """YaRN in full: what the file leaves to be computed, such as its factor, vLLM does not compute."""
    if config.rope_scaling is None or config.rope_scaling.kind != "yarn":
        return {}
    values = config_json(config, dtype=torch.float32)
    shared = {name: values[name] for name in ("rope_theta", "partial_rotary_factor")}
    return {"rope_parameters": {**shared, **values["rope_scaling"]}}


def _prepare_environment(device: torch.device, layout: Layout) -> None:
    """Settings that vLLM takes from the environment only; what the user has set there stays."""
    values = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if device.type == "cpu":
        # vLLM binds one rank to each NUMA node and keeps cores for itself, which small machines have not.
        threads = max(1, len(os.sched_getaffinity(0)) // layout.devices_per_node)
        values |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "TORCHDYNAMO_DISABLE": "1",
        }
    for name, value in values.items():
        os.environ.setdefault(name, value)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [allowed, PLUGIN_NAME]))
