"""What a layout costs: bytes on each GPU while a model serves or trains, and how fast it can be at best.

Serving: weights, the KV cache of the asked sequences, activations of one prefill chunk, and what the runtime
takes. Training (mixed precision as in Megatron): 16-bit weights, float32 gradients, and 12 bytes of float32
master weight and Adam moments (6 with moments of 8 bits, 4 with offloaded ones) for each trained parameter,
the last divided over the data parallel ranks; activations are the layers' inputs (everything else is
recomputed) of the micro-batches in flight.

Decode reads every weight and every cached key and value once for each step; prefill and training are counted
in operations. Rates are upper bounds: communication, kernel launches and waiting are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from nemotron4.cluster.hardware import Dtype, Gpu
from nemotron4.cluster.sizes import Shape, TensorSize, WeightBytes, num_parameters, stage_tensors
from nemotron4.json_form import JsonForm

Train = Literal["full", "lora", "qlora"]
Moments = Literal["float32", "8bit", "offloaded"]
Method = Literal["sft", "reward", "dpo", "rpo", "ppo"]

PREFILL_TOKENS = 8192  # tokens of one prefill step, vLLM's default chunk
RUNTIME_BYTES = 2 * 1000**3  # CUDA context, communication buffers, graphs: an assumption
LORA_RANK = 32
# Of one trained number on the GPU: float32 master weight and two moments; 8 bits have a float32 scale for
# each 256, and offloaded ones are in main memory.
OPTIMIZER_BYTES = {"float32": 12.0, "8bit": 4 + 2 * (1 + 4 / 256), "offloaded": 4.0}


@dataclass(frozen=True)
class ParallelSizes:
    """How a model is split: tensor x pipeline x data parallel ranks."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True)
class RankBytes(JsonForm):
    """What lies on one GPU."""

    weights: int
    kv_cache: int = 0
    activations: int = 0
    gradients: int = 0
    optimizer: int = 0
    rollouts: int = 0
    runtime: int = RUNTIME_BYTES
    also_written: ClassVar = {"total": "total"}

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def serving_bytes(
    shape: Shape,
    layout: ParallelSizes,
    stage: int,
    *,
    weights: WeightBytes,
    context: int,
    concurrency: int,
    kv_bytes: int = 2,
) -> RankBytes:
    """One rank of a stage with the cache of ``concurrency`` full sequences of ``context`` tokens."""
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    tokens = min(PREFILL_TOKENS, context * concurrency)
    q = shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    # Residual stream, norm output and the widest intermediate of a block, two bytes each.
    widths = 3 * shape.hidden_size + max((q + 2 * kv) // tp, shape.ffn_hidden_size // tp)
    logits = 4 * concurrency * shape.vocab_size // tp if stage == pp - 1 else 0
    return RankBytes(
        weights=_weights(shape, layout, stage, weights),
        kv_cache=concurrency * context * kv_bytes_per_token(shape, layout, kv_bytes),
        activations=2 * tokens * widths + logits,
    )


def training_bytes(
    shape: Shape,
    layout: ParallelSizes,
    stage: int,
    *,
    train: Train,
    method: Method,
    context: int,
    moments: Moments = "float32",
) -> RankBytes:
    """One rank of a stage. The references of ``dpo`` and ``rpo`` are numbers on disk.

    ``ppo`` trains a whole critic of the same size and keeps a frozen reference, unless that is the policy
    with its adapter off; of several ranks each gathers the whole policy for its rollouts.
    """
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    weights = policy = _weights(shape, layout, stage, WeightBytes("bf16"))
    if train == "qlora":
        weights = sum(_quantized_bytes(t, tp) for t in stage_tensors(shape, stage, pp))
    if train == "full":
        trained = policy // 2
    else:
        trained = sum(_lora_parameters(t, tp) for t in stage_tensors(shape, stage, pp))
        weights += 2 * trained
    rollouts = 0
    if method == "ppo":
        trained += policy // 2
        weights += policy * (2 if train == "full" else 1)
        rollouts = _weights(shape, ParallelSizes(1, 1), 0, WeightBytes("bf16")) if layout.num_gpus > 1 else 0
    layers = shape.num_layers // pp
    in_flight = min(pp, pp - stage)  # one forward one backward: the first stage holds the most
    inputs = 2 * context * shape.hidden_size * layers * in_flight // tp
    q = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    block = 2 * context * (6 * shape.hidden_size + 2 * (q + 2 * shape.ffn_hidden_size)) // tp
    logits = 6 * context * shape.vocab_size // tp if stage == pp - 1 else 0
    return RankBytes(
        weights=weights,
        activations=inputs + max(block, logits),
        gradients=4 * trained,
        optimizer=math.ceil(OPTIMIZER_BYTES[moments] * trained / layout.data_parallel),
        rollouts=rollouts,
    )


def kv_bytes_per_token(shape: Shape, layout: ParallelSizes, kv_bytes: int = 2) -> int:
    """Keys and values of one position on one rank. Heads that do not divide are repeated."""
    heads = max(1, shape.num_kv_heads // layout.tensor_parallel)
    return 2 * (shape.num_layers // layout.pipeline_parallel) * heads * shape.head_dim * kv_bytes


def _weights(shape: Shape, layout: ParallelSizes, stage: int, weights: WeightBytes) -> int:
    tensors = stage_tensors(shape, stage, layout.pipeline_parallel)
    return sum(weights.of(tensor, layout.tensor_parallel) for tensor in tensors)


def _quantized_bytes(tensor: TensorSize, tensor_parallel: int) -> int:
    """A frozen weight of a block in four bits, with two 16-bit numbers for 32 of them; else 16 bits."""
    count = math.prod(tensor.local_shape(tensor_parallel))
    return count * 5 // 8 if tensor.is_linear else 2 * count


def _lora_parameters(tensor: TensorSize, tensor_parallel: int) -> int:
    """A [rank, columns] and B [rows, rank] of every linear layer; the split side is split too."""
    if not tensor.is_linear:
        return 0
    rows, columns = tensor.local_shape(tensor_parallel)
    return LORA_RANK * (rows + columns)


def largest(ranks: list[RankBytes]) -> RankBytes:
    """The rank that needs the most."""
    return max(ranks, key=lambda rank: rank.total)


DECODE_FORMULA = (
    "step_s = sum over pipeline stages of max(operations / rate, (weights + kv cache) / bandwidth); "
    "tokens/s = sequences / step_s"
)
PREFILL_FORMULA = "tokens/s = GPUs * rate / (2 * P_nonemb + 2 * s * a * L), a = heads * head_dim, causal"
MFU_FORMULA = "MFU = 3 * (2*T*(P_nonemb + V*d) + 4*B*s^2*d*L) / (GPUs * peak * seconds), T = B*s"


@dataclass(frozen=True)
class ServingRates(JsonForm):
    """Upper bounds of a layout."""

    decode_step_s: float
    decode_tokens_per_s: float  # all sequences together
    prefill_tokens_per_s: float | None  # None where the GPU's rate is not known
    decode_bound: str  # "bandwidth" or "compute"
    decode_formula: ClassVar = DECODE_FORMULA
    prefill_formula: ClassVar = PREFILL_FORMULA
    also_written: ClassVar = {"decode_formula": "decode_formula", "prefill_formula": "prefill_formula"}


def non_embedding_parameters(shape: Shape) -> int:
    """Blocks and final norm, without embedding and output layer."""
    matrices = 1 if shape.tie_embeddings else 2
    return num_parameters(shape) - matrices * shape.vocab_size * shape.hidden_size


def serving_rates(
    shape: Shape,
    layout: ParallelSizes,
    gpu: Gpu,
    ranks: list[RankBytes],
    *,
    dtype: Dtype,
    context: int,
    concurrency: int,
) -> ServingRates | None:
    """Decode of ``concurrency`` full sequences, prefill of a full context. ``ranks``: one for each stage.

    None where the GPU's bandwidth is not known.
    """
    rate, bandwidth = gpu.rate(dtype), gpu.bandwidth_bytes_per_s
    if bandwidth is None:
        return None
    width = shape.num_heads * shape.head_dim
    linear = 2 * (non_embedding_parameters(shape) + shape.vocab_size * shape.hidden_size)
    operations = concurrency * (linear + 4 * context * width * shape.num_layers)
    compute_s = 0.0 if rate is None else operations / layout.num_gpus / rate  # of one stage
    read_s = [(rank.weights + rank.kv_cache) / bandwidth for rank in ranks]
    step_s = sum(max(compute_s, seconds) for seconds in read_s)
    per_token = 2 * non_embedding_parameters(shape) + 2 * context * width * shape.num_layers
    return ServingRates(
        decode_step_s=step_s,
        decode_tokens_per_s=concurrency / step_s,
        prefill_tokens_per_s=None if rate is None else layout.num_gpus * rate / per_token,
        decode_bound="bandwidth" if max(read_s) > compute_s else "compute",
    )


def training_operations(shape: Shape, *, batch: int, context: int) -> float:
    """Operations of a step over ``batch`` sequences: full attention, no recomputation, no input embedding."""
    tokens = batch * context
    matrices = non_embedding_parameters(shape) + shape.vocab_size * shape.hidden_size
    attention = 4 * batch * context**2 * shape.hidden_size * shape.num_layers
    return 3.0 * (2 * tokens * matrices + attention)
