"""Which blocks of the cache belong to whom: allocation, sharing of prompt prefixes, eviction. No tensors.

A block is free, in use by one or more sequences, or *kept*: unused, but holding a part of a prompt that a
later request may share. There are two ways to choose a free one. Compact: the first, so that no more memory
is touched than is used; half of what may be kept gives way before a block is touched for the first time.
Else neighbouring positions are put into neighbouring blocks where possible, because
attention in PyTorch then reads them without a copy; a kept block is given up to a sequence that grows into
it. When no block is free, the oldest kept ones go first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` positions, with reference counts."""

    def __init__(
        self, num_blocks: int, block_size: int, *, max_kept: int | None = None, is_compact: bool = False
    ) -> None:
        """``max_kept``: blocks that nobody uses and that may be kept; None: as many as there are."""
        self._max_kept = num_blocks if max_kept is None else max_kept
        self._first_free = list(range(num_blocks)) if is_compact else None  # a heap
        self._num_touched = 0  # where blocks begin that nobody has used yet, if compact
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_free = np.ones(num_blocks, dtype=bool)
        self._num_users = [0] * num_blocks
        self._num_free = num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def emptied(self) -> BlockPool:
        """Another pool like this one when it was new."""
        is_compact = self._first_free is not None
        return BlockPool(self.num_blocks, self.block_size, max_kept=self._max_kept, is_compact=is_compact)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones and kept ones."""
        return self._num_free + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take ``count`` blocks, if possible the ones that follow block ``after``.

        The caller has checked ``num_available``.
        """
        assert count <= self.num_available, "allocate() needs num_available >= count"
        taken: list[int] = []
        while len(taken) < count:
            if self._first_free is not None:
                is_new = self._num_free > 0 and self._first_free[0] >= self._num_touched
                if self._num_free == 0 or (is_new and len(self._kept) > self._max_kept // 2):
                    self._evict(next(iter(self._kept)))
                taken.append(heapq.heappop(self._first_free))
                self._num_touched = max(self._num_touched, taken[-1] + 1)
                self._take(taken[-1])
                continue
            block = (taken[-1] if taken else after if after is not None else -2) + 1
            if block in self._kept and self._num_free > 0:
                self._evict(block)
            elif not (0 <= block < self.num_blocks and self._is_free[block]):
                if self._num_free == 0:
                    self._evict(next(iter(self._kept)))
                block = self._roomy_start()
            self._take(block)
            taken.append(block)
        return taken

    def _take(self, block: int) -> None:
        self._is_free[block] = False
        self._num_free -= 1
        self._num_users[block] = 1

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of these digests; the caller becomes a user of each."""
        shared: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._kept.pop(block, None)
            self._num_users[block] += 1
            shared.append(block)
        return shared

    def publish(self, block: int, digest: bytes) -> None:
        """Let later requests share a block; the first block with a digest wins."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks up; published ones are kept for later requests while there is room."""
        # Last block first, so that a prefix outlives its continuation.
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if self._num_users[block] > 0:
                continue
            if block in self._digest_of:
                self._kept[block] = None
                if len(self._kept) > self._max_kept:
                    self._evict(next(iter(self._kept)))
            else:
                self._free(block)

    def withdraw(self, blocks: Sequence[int]) -> None:
        """Unpublish blocks whose content was never written, so that nobody shares them."""
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]

    def _free(self, block: int) -> None:
        self._is_free[block] = True
        self._num_free += 1
        if self._first_free is not None:
            heapq.heappush(self._first_free, block)

    def _evict(self, block: int) -> None:
        del self._kept[block]
        self.withdraw([block])
        self._free(block)

    def _roomy_start(self) -> int:
        """A free block with room to grow behind it: the most aligned one in the longest free run."""
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - starts))
        return _most_aligned(int(starts[longest]), int(ends[longest]))


def _most_aligned(start: int, end: int) -> int:
    """The multiple of the largest power of two in [start, end).

    Sequences that come one after another thus start at equal distances, halving the longest gap each time.
    """
    if start == 0:
        return 0
    power = 1
    while -(-start // (power * 2)) * power * 2 < end:
        power *= 2
    return -(-start // power) * power


def prefix_digests(token_ids: Sequence[int], block_size: int, *, salt: bytes = b"") -> list[bytes]:
    """One digest per full block of a prompt; each covers all tokens up to its end, and the salt."""
    digests: list[bytes] = []
    previous = salt
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        previous = hashlib.blake2b(previous + tokens, digest_size=16).digest()
        digests.append(previous)
    return digests
