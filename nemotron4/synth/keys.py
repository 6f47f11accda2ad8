"""Deterministic identities: records, calls, seeds and configurations are hashes of what made them."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

ID_BYTES = 16


def canonical(value: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def digest(*parts: Any) -> bytes:
    return hashlib.blake2b(canonical(parts), digest_size=ID_BYTES).digest()


def record_id(stage: str, parent: bytes | None, ordinal: int) -> bytes:
    """Where a record comes from, not what it says: equal texts stay two records."""
    return digest("record", stage, None if parent is None else parent.hex(), ordinal)


def call_key(request: Any, record: bytes, sample: int) -> bytes:
    """A call is what goes over the wire (model, messages, sampling), for one record and one sample index."""
    return digest("call", request, record.hex(), sample)


def call_seed(run_seed: int, record: bytes, stage: str, sample: int) -> int:
    """The sampling seed of one call, in [0, 2^31)."""
    return int.from_bytes(digest("seed", run_seed, record.hex(), stage, sample)[:4], "big") >> 1


def shard_of(root: bytes, num_shards: int) -> int:
    return int.from_bytes(root[:8], "big") % num_shards
