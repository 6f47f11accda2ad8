"""Keys and values of running sequences in preallocated blocks, and attention through them.

A forward pass of the engine packs rows of many sequences side by side. ``CachedAttend`` writes their keys
and values into the cache and lets each row see exactly its own sequence. How a row is computed depends on
its own sequence alone, never on what else is in the batch: prompt positions go in tiles that start at
multiples of ``TILE``, later positions one by one with the number of keys rounded up. On a CPU a row's result
is therefore the same bits in any batch, after any chunking of the prompt and after pre-emption.

Shape suffixes: N = packed rows, H = query heads, K = key/value heads, G = H / K, E = head dim, P = cache
positions, S = keys seen (rounded up), b = rows of one group, t = rows of one tile.
"""

from __future__ import annotations

import itertools
import mmap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron4.model.config import ModelConfig

TILE = 32  # positions per block, and most prompt positions per attention call
KEYS_ROUNDING = 64  # a single row sees its number of keys rounded up to a multiple of this
# torch's CPU attention gives each thread a piece of one buffer; only if the number of query rows is a
# multiple of 8 are all pieces equally aligned, and results independent of the thread that computes them.
QUERY_ROUNDING = 8
MAX_GATHERED = 32768  # cache positions copied together at most, where blocks do not lie side by side


class KVCache:
    """``num_blocks`` blocks of ``TILE`` positions: per layer two tensors (P, K, E).

    On a CPU the memory is taken from the system only when a block is first written.
    """

    block_size = TILE
    is_read_in_place = False

    def __init__(
        self, config: ModelConfig, num_blocks: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        # The last rows are never allocated: rounding up may read past the last block.
        shape = (num_blocks * TILE + KEYS_ROUNDING, config.num_kv_heads, config.head_dim)
        self.keys = [zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.values = [zeros(shape, dtype, device) for _ in range(config.num_layers)]

    @staticmethod
    def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
        return TILE * config.kv_bytes_per_token(dtype.itemsize)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that reads as zeros; on a CPU the system gives each page when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes the pages; an anonymous mapping reads as zeros and costs nothing until used.
    count = int(np.prod(shape))
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(shape)


@dataclass(frozen=True)
class CacheSegment:
    """The rows of one sequence in a packed pass: positions ``start`` to ``end`` (excluded)."""

    blocks: Sequence[int]  # block ids of the sequence's positions, in order
    start: int
    end: int
    num_prompt: int  # positions below it go in tiles, the others one by one


@dataclass(frozen=True)
class _Tile:
    """Neighbouring prompt rows of one sequence; they see every key up to the last of them."""

    rows: slice
    keys: slice | Tensor  # cache positions
    mask_tS: Tensor  # 0 where seen, -inf where not


@dataclass(frozen=True)
class _Group:
    """Single rows that see the same (rounded) number of keys; side by side in memory or gathered."""

    rows: slice | Tensor
    first_position: int  # of the first row's keys, where ``stride`` is given
    stride: int | None  # cache positions between the keys of neighbouring rows; None: gather ``positions``
    positions: Tensor | None  # (b * S,)
    mask_b11S: Tensor


class CachedAttend:
    """Attention of one packed forward pass through the cache; built once, called for every layer.

    Rows behind those of the segments are padding: nothing is written for them and they attend to nothing.
    """

    def __init__(self, cache: KVCache, segments: Sequence[CacheSegment], *, dtype: torch.dtype) -> None:
        self._cache = cache
        self._device = cache.keys[0].device
        self._dtype = dtype
        self._tiles: list[_Tile] = []
        self._query_buffers: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        singles: dict[int, list[tuple[int, CacheSegment, int]]] = defaultdict(list)
        written: list[np.ndarray] = []
        row = 0
        for segment in segments:
            written.append(_cache_positions(segment.blocks, segment.start, segment.end))
            prompt_end = max(segment.start, min(segment.end, segment.num_prompt))
            for start in range(segment.start, prompt_end, TILE):
                self._add_tile(row, segment, start, min(start + TILE, prompt_end))
                row += min(start + TILE, prompt_end) - start
            for position in range(prompt_end, segment.end):
                singles[_rounded(position + 1, KEYS_ROUNDING)].append((row, segment, position))
                row += 1
        self._num_rows = row
        self._written_N = self._tensor(np.concatenate(written))
        self._groups = [
            group for num_keys, members in singles.items() for group in self._grouped(num_keys, members)
        ]

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        keys_PKE, values_PKE = self._cache.keys[layer], self._cache.values[layer]
        if k_NKE.shape[0] != self._num_rows:
            k_NKE, v_NKE = k_NKE[: self._num_rows], v_NKE[: self._num_rows]
        keys_PKE.index_copy_(0, self._written_N, k_NKE)
        values_PKE.index_copy_(0, self._written_N, v_NKE)
        is_padded = q_NHE.shape[0] != self._num_rows
        out_NHE = (torch.zeros if is_padded else torch.empty)(
            q_NHE.shape, dtype=q_NHE.dtype, device=self._device
        )
        for tile in self._tiles:
            k_1KSE = keys_PKE[tile.keys].transpose(0, 1)[None]
            v_1KSE = values_PKE[tile.keys].transpose(0, 1)[None]
            q_1HtE = self._padded(q_NHE[tile.rows].transpose(0, 1)[None], TILE)
            out_1HtE = F.scaled_dot_product_attention(
                q_1HtE, k_1KSE, v_1KSE, attn_mask=tile.mask_tS, enable_gqa=True
            )
            out_NHE[tile.rows] = out_1HtE[0].transpose(0, 1)[: tile.rows.stop - tile.rows.start]
        # The G query heads of one key head are where the query positions would be.
        num_kv_heads, head_dim = k_NKE.shape[1:]
        num_grouped = q_NHE.shape[1] // num_kv_heads
        out_NKGE = out_NHE.view(-1, num_kv_heads, num_grouped, head_dim)
        for group in self._groups:
            q_bKGE = q_NHE[group.rows].reshape(-1, num_kv_heads, num_grouped, head_dim)
            k_bKSE, v_bKSE = self._seen(keys_PKE, group), self._seen(values_PKE, group)
            out_bKGE = F.scaled_dot_product_attention(
                self._padded(q_bKGE, QUERY_ROUNDING), k_bKSE, v_bKSE, attn_mask=group.mask_b11S
            )
            out_NKGE[group.rows] = out_bKGE[:, :, :num_grouped]
        return out_NHE

    def _padded(self, q: Tensor, multiple: int) -> Tensor:
        """Query rows (dim 2) up to a multiple, in a buffer that all layers use in turn."""
        num_padded = _rounded(q.shape[2], multiple)
        if num_padded == q.shape[2]:
            return q
        if q.shape not in self._query_buffers:
            buffer = q.new_zeros((*q.shape[:2], num_padded, q.shape[3]))
            self._query_buffers[q.shape] = buffer, buffer[:, :, : q.shape[2]]
        buffer, used = self._query_buffers[q.shape]
        used.copy_(q)
        return buffer

    def _seen(self, cached_PKE: Tensor, group: _Group) -> Tensor:
        """(b, K, S, E): a view where the group's keys lie at equal distances, else a copy."""
        num_rows, num_keys = group.mask_b11S.shape[0], group.mask_b11S.shape[-1]
        num_kv_heads, head_dim = cached_PKE.shape[1:]
        if group.stride is None:
            assert group.positions is not None
            gathered = cached_PKE.index_select(0, group.positions)
            return gathered.view(num_rows, num_keys, num_kv_heads, head_dim).transpose(1, 2)
        width = num_kv_heads * head_dim
        return cached_PKE.as_strided(
            (num_rows, num_kv_heads, num_keys, head_dim),
            (group.stride * width, head_dim, width, 1),
            group.first_position * width,
        )

    def _add_tile(self, row: int, segment: CacheSegment, start: int, end: int) -> None:
        keys: slice | Tensor
        if _is_run(segment.blocks, end):
            first = segment.blocks[0] * TILE
            keys = slice(first, first + end)
        else:
            keys = self._tensor(_cache_positions(segment.blocks, 0, end))
        mask_tS = torch.zeros(TILE, end, dtype=self._dtype, device=self._device)
        mask_tS[: end - start, start:].fill_(-torch.inf).triu_(1)
        self._tiles.append(_Tile(slice(row, row + end - start), keys, mask_tS))

    def _grouped(self, num_keys: int, members: list[tuple[int, CacheSegment, int]]) -> list[_Group]:
        side_by_side: list[tuple[int, int, int]] = []  # (first cache position, row, position)
        scattered: list[tuple[int, CacheSegment, int]] = []
        for row, segment, position in members:
            if _is_run(segment.blocks, position + 1):
                side_by_side.append((segment.blocks[0] * TILE, row, position))
            else:
                scattered.append((row, segment, position))
        groups = [self._strided(num_keys, run) for run in _equal_strides(sorted(side_by_side))]
        step = max(1, MAX_GATHERED // num_keys)
        for i in range(0, len(scattered), step):
            groups.append(self._gathered(num_keys, scattered[i : i + step]))
        return groups

    def _strided(self, num_keys: int, run: list[tuple[int, int, int]]) -> _Group:
        firsts, rows, positions = zip(*run, strict=True)
        stride = firsts[1] - firsts[0] if len(run) > 1 else 0
        return _Group(self._rows(rows), firsts[0], stride, None, self._mask(positions, num_keys))

    def _gathered(self, num_keys: int, members: list[tuple[int, CacheSegment, int]]) -> _Group:
        # Masked keys still need finite values: rounding up repeats the first position.
        positions = np.zeros((len(members), num_keys), dtype=np.int64)
        for i, (_, segment, position) in enumerate(members):
            positions[i, : position + 1] = _cache_positions(segment.blocks, 0, position + 1)
        rows = tuple(row for row, _, _ in members)
        mask = self._mask(tuple(position for _, _, position in members), num_keys)
        return _Group(self._rows(rows), 0, None, self._tensor(positions.ravel()), mask)

    def _mask(self, positions: Sequence[int], num_keys: int) -> Tensor:
        last_b1 = self._tensor(np.asarray(positions, dtype=np.int64))[:, None]
        hidden_bS = torch.arange(num_keys, device=self._device) > last_b1
        zeros_bS = torch.zeros(hidden_bS.shape, dtype=self._dtype, device=self._device)
        return zeros_bS.masked_fill_(hidden_bS, -torch.inf)[:, None, None]

    def _rows(self, rows: Sequence[int]) -> slice | Tensor:
        if all(later == row + 1 for row, later in itertools.pairwise(rows)):
            return slice(rows[0], rows[-1] + 1)
        return self._tensor(np.asarray(rows, dtype=np.int64))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _cache_positions(blocks: Sequence[int], start: int, end: int) -> np.ndarray:
    """Cache positions of a sequence's positions ``start`` to ``end`` (excluded)."""
    first_block = start // TILE
    used = np.asarray(blocks[first_block : -(-end // TILE)], dtype=np.int64)
    return (used[:, None] * TILE + np.arange(TILE)).ravel()[
        start - first_block * TILE : end - first_block * TILE
    ]


def _is_run(blocks: Sequence[int], count: int) -> bool:
    """True if the blocks of the first ``count`` positions lie side by side."""
    used = -(-count // TILE)
    return all(blocks[i + 1] == blocks[i] + 1 for i in range(used - 1))


def _equal_strides(sorted_runs: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Cut a list sorted by its first item into pieces whose first items have equal differences."""
    pieces: list[list[tuple[int, int, int]]] = []
    for item in sorted_runs:
        last = pieces[-1] if pieces else []
        if last and (len(last) == 1 or item[0] - last[-1][0] == last[1][0] - last[0][0]):
            last.append(item)
        else:
            pieces.append([item])
    return pieces


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
