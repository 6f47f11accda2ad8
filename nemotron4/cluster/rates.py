"""How fast a layout can be at best, and which share of the peak a training step reached.

Decode reads every weight and every cached key and value once for each step; prefill and training are counted
in operations. These are upper bounds: communication, kernel launches and waiting are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemotron4.cluster.hardware import Dtype, Gpu
from nemotron4.cluster.memory import Layout, RankBytes
from nemotron4.cluster.sizes import Shape, num_parameters

DECODE_FORMULA = (
    "step_s = sum over pipeline stages of max(operations / rate, (weights + kv cache) / bandwidth); "
    "tokens/s = sequences / step_s"
)
PREFILL_FORMULA = "tokens/s = GPUs * rate / (2 * P_nonemb + 2 * s * a * L), a = heads * head_dim, causal"
MFU_FORMULA = "MFU = 3 * (2*T*(P_nonemb + V*d) + 4*B*s^2*d*L) / (GPUs * peak * seconds), T = B*s"


@dataclass(frozen=True)
class ServingRates:
    """Upper bounds of a layout."""

    decode_step_s: float
    decode_tokens_per_s: float  # all sequences together
    prefill_tokens_per_s: float
    decode_bound: str  # "bandwidth" or "compute"

    def to_json(self) -> dict[str, float | str]:
        return {
            "decode_step_s": self.decode_step_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "decode_bound": self.decode_bound,
            "decode_formula": DECODE_FORMULA,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "prefill_formula": PREFILL_FORMULA,
        }


def non_embedding_parameters(shape: Shape) -> int:
    """Blocks and final norm, without embedding and output layer."""
    matrices = 1 if shape.tie_embeddings else 2
    return num_parameters(shape) - matrices * shape.vocab_size * shape.hidden_size


def serving_rates(
    shape: Shape,
    layout: Layout,
    gpu: Gpu,
    ranks: list[RankBytes],
    *,
    dtype: Dtype,
    context: int,
    concurrency: int,
) -> ServingRates:
    """Decode of ``concurrency`` full sequences, prefill of a full context. ``ranks``: one for each stage."""
    rate = gpu.rate(dtype)
    width = shape.num_heads * shape.head_dim
    linear = 2 * (non_embedding_parameters(shape) + shape.vocab_size * shape.hidden_size)
    operations = concurrency * (linear + 4 * context * width * shape.num_layers)
    compute_s = operations / layout.num_gpus / rate  # of one stage
    read_s = [(rank.weights + rank.kv_cache) / gpu.bandwidth_bytes_per_s for rank in ranks]
    step_s = sum(max(compute_s, seconds) for seconds in read_s)
    per_token = 2 * non_embedding_parameters(shape) + 2 * context * width * shape.num_layers
    return ServingRates(
        decode_step_s=step_s,
        decode_tokens_per_s=concurrency / step_s,
        prefill_tokens_per_s=layout.num_gpus * rate / per_token,
        decode_bound="bandwidth" if max(read_s) > compute_s else "compute",
    )


def training_operations(shape: Shape, *, batch: int, context: int) -> float:
    """Operations of a step over ``batch`` sequences: full attention, no recomputation, no input embedding."""
    tokens = batch * context
    matrices = non_embedding_parameters(shape) + shape.vocab_size * shape.hidden_size
    attention = 4 * batch * context**2 * shape.hidden_size * shape.num_layers
    return 3.0 * (2 * tokens * matrices + attention)


def mfu(shape: Shape, *, num_gpus: int, peak: float, batch: int, context: int, seconds: float) -> float:
    """Share of the peak rate that a training step of ``seconds`` reached."""
    return training_operations(shape, batch=batch, context=context) / (num_gpus * peak * seconds)
