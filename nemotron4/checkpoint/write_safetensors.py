"""Sharded safetensors from streams of rows: headers are known before the first weight is read.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nemotron4.checkpoint.convert_files import Blocks, OutputFile, json_file
from nemotron4.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, WORD_OF_DTYPE

SHARD_BYTES = 5 * 1000**3


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors made by one pass over the source, written one after the other: a weight and its scale."""

    entries: tuple[Entry, ...]
    blocks: Callable[[], Blocks]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def safetensors_files(groups: Sequence[Group], *, shard_bytes: int = SHARD_BYTES) -> list[OutputFile]:
    """One file, or shards of about ``shard_bytes`` and their index."""
    shards = list(_shards(groups, shard_bytes))
    if len(shards) == 1:
        return [_file(SINGLE_FILE, shards[0])]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [_file(name, shard) for name, shard in zip(names, shards, strict=True)]
    weight_map = {
        entry.name: name
        for name, shard in zip(names, shards, strict=True)
        for group in shard
        for entry in group.entries
    }
    total = sum(group.num_bytes for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return [*files, json_file(INDEX_FILE, index)]


def _shards(groups: Sequence[Group], shard_bytes: int) -> Iterator[list[Group]]:
    shard: list[Group] = []
    filled = 0
    for group in groups:
        if shard and filled + group.num_bytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(group)
        filled += group.num_bytes
    yield shard


def _file(name: str, groups: Sequence[Group]) -> OutputFile:
    header = _header([entry for group in groups for entry in group.entries])

    def blocks() -> Blocks:
        facts: dict[str, object] = {}
        yield header
        for group in groups:
            facts |= (yield from group.blocks()) or {}
        return facts

    return OutputFile(name, len(header) + sum(group.num_bytes for group in groups), blocks)


def _header(entries: Sequence[Entry]) -> bytes:
    values: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        values[entry.name] = {
            "dtype": WORD_OF_DTYPE[str(entry.dtype).removeprefix("torch.")],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.num_bytes],
        }
        position += entry.num_bytes
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
