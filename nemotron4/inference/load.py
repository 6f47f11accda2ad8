"""``nemotron4.load``: a model by name or path, ready to generate."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.description import describe_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.safetensors import read_json
from nemotron4.checkpoint.shipped import AUTO, NONE, with_shipped
from nemotron4.engine import ChatFormat, ModelInfo, Tokenizer
from nemotron4.errors import CheckpointError, ConfigError, TemplateError, unknown_name
from nemotron4.inference import NUM_SPECULATIVE_TOKENS, PREFIX_CACHE_GB
from nemotron4.inference.adapters import AdapterBank
from nemotron4.inference.engine import Engine
from nemotron4.inference.native.adapters import NativeAdapters
from nemotron4.inference.native.model import FEW_ROWS, NativeCache, read_model
from nemotron4.inference.precision import CACHES, DTYPES, Precision, choose
from nemotron4.inference.runner import NativeRunner, StepRunner
from nemotron4.model.config import ModelConfig
from nemotron4.records import Message
from nemotron4.text.prompt import chosen_format

if TYPE_CHECKING:
    import torch

SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.85}


def load(
    model: str | Path | Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    kv_cache_dtype: str = "auto",
    adapter: str | Path | None = AUTO,
    force_adapter: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
    cache_gb: float | None = None,
    prefix_cache_gb: float = PREFIX_CACHE_GB,
    max_running: int = 128,
    max_waiting: int = 1024,
    max_step_tokens: int = 512,
    num_speculative_tokens: int = NUM_SPECULATIVE_TOKENS,
    memory_share: float | None = None,
    chat_template: str | None = None,
) -> Engine:
    """Load a model by pulled name, directory, ``.gguf`` file, hub id or as opened, and start its engine.

    ``quantize`` "int8" or "int4" quantises the weights while they are read (CPU). ``dtype`` "auto" takes the
    weights of a quantised GGUF file as they are stored, keeps bfloat16 weights where the processor multiplies
    them fast (a GPU, AMX), and is float32 otherwise. ``kv_cache_dtype`` "int8": keys and values in 8 bits.
    ``adapter`` is a folder that training or PEFT wrote, or NeMo's LoRA; None is none, and "auto" the one that
    ships for a pulled name (smollm2). LoRA and (IA)3 are merged into the weights as they are read, a
    bottleneck adapter runs next to them, P-tuning's table precedes prompts. ``force_adapter``: on any base.
    ``adapters`` are LoRA adapters by name that requests choose from (``SamplingParams.adapter``), next to the
    weights; an empty mapping lets them be loaded later (``Engine.load_adapter``).
    ``cache_gb`` bounds the keys and values of running requests; by default it is what ``max_running`` full
    contexts need, but at most ``memory_share`` of what is free: a quarter (CPU) or 85 % (GPU) if absent.
    ``prefix_cache_gb`` bounds what of that ended requests leave behind for prompts that begin like theirs.
    ``num_speculative_tokens`` are guessed at once, at most, while one request runs alone.
    ``chat_template`` is a format's name or a file with a Jinja template, in place of the checkpoint's own.
    """
    checkpoint, beside = _opened(*with_shipped(model, _merged(adapter, adapters)), force=force_adapter)
    where = device_name(device)
    precision = choose(
        checkpoint, where, dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype,
        has_adapter_beside=beside is not None,
    )  # fmt: skip
    size = block_bytes(checkpoint.config, precision.dtype)
    num_blocks = cache_blocks(checkpoint.config, size, where, cache_gb, max_running, memory_share)
    runner, num_virtual, tokenizer, own = _read(checkpoint, precision, where, num_blocks, beside, max_running)
    prompt_format = own if chat_template is None else chosen_format(chat_template, tokenizer)
    info, usable = checked(describe(checkpoint, precision.name, where), tokenizer, prompt_format)
    return Engine(
        runner,
        replace(info, context_length=info.context_length - num_virtual),
        tokenizer,
        usable,
        max_running=max_running,
        max_waiting=max_waiting,
        max_step_tokens=max_step_tokens,
        num_virtual_tokens=num_virtual,
        num_speculative_tokens=num_speculative_tokens,
        adapters=None if adapters is None else _bank(runner, checkpoint, adapters, force=force_adapter),
        reload=None if beside or adapters is not None else _Reload(checkpoint, precision, where),
        max_kept_blocks=int(prefix_cache_gb * 1e9) // size,
    )


class _Reload:
    """The model that runs with changed tensors, each time over those that were changed before."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, device: str) -> None:
        self._checkpoint, self._precision, self._device = checkpoint, precision, device
        self._changed: dict[str, torch.Tensor] = {}

    def __call__(self, runner: StepRunner, changed: Mapping[str, torch.Tensor]) -> StepRunner:
        from nemotron4.checkpoint.derived import UpdatedCheckpoint

        updated = UpdatedCheckpoint(self._checkpoint, self._changed | dict(changed))
        self._changed |= changed
        if isinstance(runner, NativeRunner):
            kind, cache = self._precision.kind, runner.cache
            return NativeRunner(read_model(updated, kind, cache, num_threads=_num_threads()))
        from nemotron4.inference.torch_runner import read_again

        return read_again(runner, updated, self._precision.dtype, self._device)


def _merged(adapter: str | Path | None, adapters: Mapping[str, str | Path] | None) -> str | Path | None:
    """The adapter that is merged: under named ones is the bare model."""
    if adapters is None:
        return adapter
    if adapter not in (None, AUTO, NONE):
        raise ConfigError("adapter is merged, adapters run next to the weights", hint="name them all")
    return NONE


def _bank(
    runner: StepRunner, checkpoint: Checkpoint, adapters: Mapping[str, str | Path], *, force: bool
) -> AdapterBank:
    """Room for adapters next to the weights, with the first of them."""
    bank: AdapterBank
    if isinstance(runner, NativeRunner):
        bank = NativeAdapters(checkpoint)
    else:
        from nemotron4.inference.torch_runner import room_for_adapters

        bank = room_for_adapters(runner, checkpoint)
    for name, path in adapters.items():
        bank.load(name, path, force=force)
    return bank


def _opened(
    model: str | Path | Checkpoint, path: Path | None, *, force: bool
) -> tuple[Checkpoint, Path | None]:
    """The checkpoint with the adapter merged in, or the adapter that has to run next to it."""
    checkpoint, beside = open_checkpoint(model), None
    if path is not None:
        from nemotron4.checkpoint.adapter_base import check_base
        from nemotron4.checkpoint.merge_adapter import MergedCheckpoint, is_mergeable

        if is_mergeable(path):
            checkpoint = MergedCheckpoint(checkpoint, path, force=force)
        else:
            check_base(path, checkpoint, force=force)
            beside = path
    if checkpoint.config.num_reward_attributes:
        raise CheckpointError(
            f"{checkpoint.path}: a reward model, which scores and writes no text",
            hint="load it with nemotron4.inference.reward.load_reward, or serve it and POST /score",
        )
    return checkpoint, beside


def _read(
    checkpoint: Checkpoint,
    precision: Precision,
    device: str,
    num_blocks: int,
    adapter: Path | None,
    max_running: int,
) -> tuple[StepRunner, int, Tokenizer, ChatFormat | None]:
    """The model, the number of virtual tokens that precede every prompt, the vocabulary and the template."""
    # In a thread of its own: the vocabulary is read meanwhile, and the OpenMP workers that torch starts for a
    # thread end with it. Were they left to the caller's thread, the engine's own workers would be more than
    # there are processors, and OpenMP would then put them to sleep after every product.
    with ThreadPoolExecutor(max_workers=1) as pool:
        if precision.is_native:
            weights = pool.submit(_native_runner, checkpoint, precision, num_blocks, max_running)
        else:
            from nemotron4.inference.torch_runner import read_runner

            weights = pool.submit(read_runner, checkpoint, precision.dtype, device, num_blocks, adapter)
        tokenizer, trained_in = checkpoint.tokenizer(), None
        if adapter is not None:
            from nemotron4.checkpoint.adapter_base import adapter_format

            trained_in = adapter_format(adapter, tokenizer)
        return *weights.result(), tokenizer, trained_in or checkpoint.prompt_format()


def _native_runner(
    checkpoint: Checkpoint, precision: Precision, num_blocks: int, max_running: int
) -> tuple[StepRunner, int]:
    cache = NativeCache(checkpoint.config, num_blocks, CACHES[precision.dtype])
    is_for_few = 0 < max_running <= FEW_ROWS
    model = read_model(checkpoint, precision.kind, cache, num_threads=_num_threads(), is_for_few=is_for_few)
    return NativeRunner(model), 0


def _num_threads() -> int:
    """As many as torch would take, without loading it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def describe(checkpoint: Checkpoint, dtype: torch.dtype | str, device: torch.device | str) -> ModelInfo:
    """What an engine tells about the checkpoint it has loaded."""
    found = describe_checkpoint(checkpoint)
    config = found.config
    return ModelInfo(
        name=found.name,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        num_parameters=config.num_parameters,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        eos_token_ids=checkpoint.eos_token_ids,
        adds_bos=checkpoint.adds_bos,
        notes=(*checkpoint.notes, *_unread_sampling(checkpoint.path / "generation_config.json")),
        checkpoint=found.summary,
    )


def _unread_sampling(file: Path) -> tuple[str, ...]:
    """A note for those who come from vLLM, which samples by this file where a request says nothing."""
    values = read_json(file) if file.is_file() else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = [f"{name} {values[name]}" for name in names if values.get(name) not in (None, 0, 1)]
    told = f"{file.name} asks for {', '.join(given)}, which is not used: a request brings its own"
    return (told,) if given else ()


def checked(
    info: ModelInfo, tokenizer: Tokenizer, prompt_format: ChatFormat | None
) -> tuple[ModelInfo, ChatFormat | None]:
    """Without what every request would stumble over: a note says what was dropped and why.

    That is an end-of-text id that the vocabulary does not have, and a chat template that cannot write a plain
    question.
    """
    size = min(info.vocab_size, tokenizer.vocab_size)
    ends = tuple(token_id for token_id in info.eos_token_ids if token_id < size)
    notes = [
        f"the checkpoint ends texts with id {token_id}, which its vocabulary of {size} does not have; ignored"
        for token_id in info.eos_token_ids
        if token_id not in ends
    ]
    if prompt_format is not None:
        try:
            prompt_format.encode(tokenizer, [Message("user", "Hello")])
        except TemplateError as error:
            notes.append(f"the chat template cannot write a plain question and is ignored: {error.message}")
            prompt_format = None
    return replace(info, eos_token_ids=ends, notes=(*info.notes, *notes)), prompt_format


def device_name(wanted: str) -> str:
    """The processor or the GPU; torch is asked only where a driver of NVIDIA's is running."""
    if wanted not in ("auto", "cpu", "cuda"):
        message, hint = unknown_name("device", wanted, ("auto", "cpu", "cuda"))
        raise ConfigError(message, hint=hint)
    if wanted == "cpu" or (wanted == "auto" and not Path("/dev/nvidiactl").exists() and os.name == "posix"):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError("device is 'cuda', but torch sees no CUDA device", hint="use device 'cpu'")
    return "cpu"


def find_device(wanted: str) -> torch.device:
    """The same, for what PyTorch computes."""
    import torch

    return torch.device(device_name(wanted))


def block_bytes(config: ModelConfig, dtype: str) -> int:
    """Of keys and values in ``dtype``; eight bits have a float32 scale for each position and head."""
    if dtype == "int8":
        per_token = config.kv_bytes_per_token(1) // config.head_dim * (config.head_dim + 4)
    else:
        per_token = config.kv_bytes_per_token(DTYPES[dtype])
    return NativeCache.block_size * per_token


def cache_blocks(
    config: ModelConfig,
    one_block: int,
    device: str,
    cache_gb: float | None,
    max_running: int,
    share: float | None = None,
) -> int:
    """How many blocks of keys and values, of ``one_block`` bytes each, there is memory for."""
    if cache_gb is not None:
        num_blocks = int(cache_gb * 1e9) // one_block
    else:
        blocks_per_context = -(-config.context_length // NativeCache.block_size)
        affordable = int(_free_bytes(device) * (share or SHARE_OF_FREE_MEMORY[device])) // one_block
        num_blocks = min(max_running * blocks_per_context, affordable)
    if num_blocks < 2:
        raise ConfigError(
            f"{num_blocks * one_block / 1e6:.0f} MB of cache hold no request; one block is "
            f"{one_block / 1e6:.1f} MB",
            hint="give more memory with cache_gb",
        )
    return num_blocks


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
