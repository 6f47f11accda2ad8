"""Log-probabilities under the reference model: computed once, kept with the data, checked when reused.

The cache is keyed by the model's weights and by each row's tokens and mask, which cover tokenizer and
template. It holds numbers only, as JSON lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from nemotron4.errors import TrainingError
from nemotron4.model.adapters import PromptEmbedding, adapters_off
from nemotron4.model.quantized_weight import quantized_weights
from nemotron4.runs import RowLog
from nemotron4.training.encoding import sample_hash
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.metrics import OnPart, Part, hear_nothing
from nemotron4.training.samples import Sample, Segment
from nemotron4.training.scorer import segment_logprobs

NUM_CHECKED = 32
BLOCK_ROWS = 256
Given = TypeVar("Given", bound=Sample)
# Nats for each trained token: other hardware and other packing round differently, most of all in 16 bits.
TOLERANCE, TOLERANCE_16 = 1e-3, 5e-2


def model_hash(model: nn.Module) -> str:
    """A hash of every frozen-at-start weight: names, shapes and values; adapters do not count."""
    digests = {}
    for name, tensor in model.named_parameters():
        if not any(part in name for part in ("lora_", "adapter_", "prompt_")):
            digests[name] = hash_values(tuple(tensor.shape), [tensor.detach().float().cpu()])
    for name, weight in quantized_weights(model).items():
        digests[name] = hash_values(weight.shape, [weight.whole(torch.float32).cpu()])
    return combined_hash(digests)


def hash_values(shape: tuple[int, ...], blocks: Iterable[Tensor]) -> str:
    """A hash of a float32 tensor that comes in blocks of rows; how it is cut makes no difference."""
    digest = hashlib.sha256(f"{shape}".encode())
    for block in blocks:
        digest.update(block.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combined_hash(digests: Mapping[str, str]) -> str:
    """The model's hash from those of its tensors."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:32]


def with_reference(
    samples: Sequence[Sample],
    engine: TrainingEngine,
    *,
    cache: Path,
    row_tokens: int,
    is_writer: bool = True,
    note: Callable[[str], None] = lambda text: None,
    on_part: OnPart = hear_nothing,
) -> list[Sample]:
    """The samples with their reference log-probabilities; only rows the cache lacks are computed.

    With adapters the reference is the base: the engine's model with its adapters switched off, and without
    the virtual prompt of P-tuning. What is computed is kept block by block, so an interrupted pass goes on
    where it was.
    """
    hashes = [sample_hash(sample) for sample in samples]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_kept(cache)) if is_writer else None
        # As the first process sees it: the others could read while it writes, and wait for rows it has.
        rows = {} if log is None else {str(row["row"]): tuple(row["logprobs"]) for row in log.rows}
        known = engine.gathered(rows)[0]
        missing = [i for i, key in enumerate(hashes) if key not in known]
        cached = [i for i, key in enumerate(hashes) if key in known]
        checked = random.Random(0).sample(cached, min(NUM_CHECKED, len(cached)))
        tolerance = TOLERANCE if engine.compute == torch.float32 else TOLERANCE_16
        for i, values in zip(checked, _score([samples[i] for i in checked], engine, row_tokens), strict=True):
            _compare(samples[i], known[hashes[i]], values, cache, tolerance)
        if missing:
            note(f"reference log-probabilities: {len(missing)} rows to compute, {len(cached)} in {cache}")
        for start in range(0, len(missing), BLOCK_ROWS):
            on_part(Part("reference log-probabilities", start, len(missing)))
            block = missing[start : start + BLOCK_ROWS]
            computed = _score([samples[i] for i in block], engine, row_tokens)
            new = {hashes[i]: values for i, values in zip(block, computed, strict=True)}
            if log is not None:
                log.append(*({"row": key, "logprobs": values} for key, values in new.items()))
            known |= new
    return [replace(s, reference=known[key]) for s, key in zip(samples, hashes, strict=True)]


def _kept(cache: Path) -> RowLog:
    cache.parent.mkdir(parents=True, exist_ok=True)
    return RowLog(cache, key=itemgetter("row"))


@contextlib.contextmanager
def as_base(engine: TrainingEngine) -> Iterator[None]:
    """The engine's model without its adapter, if it has one. P-tuning is left out by ``base_samples``."""
    with adapters_off(engine.scorer.net) if engine.has_adapters else contextlib.nullcontext():
        yield


def base_samples(samples: Sequence[Given], engine: TrainingEngine) -> list[Given]:
    """The samples as the base reads them: without P-tuning's virtual prompt before each segment."""
    embedding = engine.scorer.net.model.embed_tokens
    if not isinstance(embedding, PromptEmbedding):
        return list(samples)
    num = embedding.num_virtual_tokens
    for sample in samples:
        if any(segment.is_trained[num] for segment in sample.segments):
            raise TrainingError(
                f"{sample.where}: the first token is trained; without the virtual prompt nothing predicts it",
                hint="give the row a prompt that is not empty",
            )
    return [
        replace(s, segments=tuple(Segment(seg.tokens[num:], seg.is_trained[num:]) for seg in s.segments))
        for s in samples
    ]


def _score(samples: Sequence[Sample], engine: TrainingEngine, row_tokens: int) -> list[tuple[float, ...]]:
    """Every sample's log-probabilities, on every process."""
    if not samples:
        return []
    samples = base_samples(samples, engine)
    offsets: dict[int, int] = {}
    start = 0
    for sample in samples:
        offsets[id(sample)] = start
        start += len(sample.segments)
    flat = [0.0] * start
    with as_base(engine):
        rows = engine.rows(samples, row_tokens)
        for row, scores in zip(rows, engine.scores(rows), strict=True):
            sums = segment_logprobs(scores, row).tolist()
            at = 0
            for sample in row.samples:
                count = len(sample.segments)
                flat[offsets[id(sample)] : offsets[id(sample)] + count] = sums[at : at + count]
                at += count
    flat = engine.add_up(flat)
    return [tuple(flat[offsets[id(s)] : offsets[id(s)] + len(s.segments)]) for s in samples]


def _compare(
    sample: Sample, cached: Sequence[float], fresh: Sequence[float], cache: Path, tolerance: float
) -> None:
    for segment, old, new in zip(sample.segments, cached, fresh, strict=True):
        if abs(old - new) > tolerance * max(1, segment.num_trained):
            raise TrainingError(
                f"{cache}: the cached reference log-probability of {sample.where} is {old:.4f}, "
                f"but the model gives {new:.4f}",
                hint="delete the cache; it was made by other weights or other code",
            )
