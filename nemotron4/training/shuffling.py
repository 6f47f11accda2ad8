"""Permutations that are computed place by place, so that shuffling a corpus of any size needs no memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy
from numpy.typing import NDArray

Places = NDArray[numpy.uint64]
ROUNDS = 6
_FACTOR_1, _FACTOR_2 = numpy.uint64(0xBF58476D1CE4E5B9), numpy.uint64(0x94D049BB133111EB)


def key_of(*parts: object) -> int:
    """64 bits that anything printable decides: a seed, an epoch, a name."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Permutation:
    """A permutation of ``range(size)`` that ``key`` decides: a Feistel network over just enough bits.

    Each round adds a hash of one half to the other, which can be undone. A value that falls behind ``size``
    goes through the network again (cycle walking; less than one more time on average).
    """

    size: int
    key: int

    def __call__(self, places: Places) -> Places:
        """What is at each place."""
        return self._walked(places, range(ROUNDS))

    def inverse(self, values: Places) -> Places:
        """At which place each value is."""
        return self._walked(values, range(ROUNDS - 1, -1, -1))

    def __getitem__(self, place: int) -> int:
        return int(self(numpy.array([place], numpy.uint64))[0])

    @cached_property
    def _bits(self) -> tuple[int, int]:
        """Of the low and of the high half."""
        bits = max(2, (self.size - 1).bit_length())
        return bits // 2, bits - bits // 2

    @cached_property
    def _keys(self) -> list[numpy.uint64]:
        return [numpy.uint64(key_of(self.key, number)) for number in range(ROUNDS)]

    def _walked(self, values: Places, rounds: range) -> Places:
        found = self._network(values.astype(numpy.uint64), rounds)
        while (outside := found >= self.size).any():
            found[outside] = self._network(found[outside], rounds)
        return found

    def _network(self, values: Places, rounds: range) -> Places:
        low_bits, high_bits = (numpy.uint64(bits) for bits in self._bits)
        one = numpy.uint64(1)
        low, high = values & ((one << low_bits) - one), values >> low_bits
        for number in rounds:
            if number % 2:
                low ^= _mixed(high, self._keys[number]) & ((one << low_bits) - one)
            else:
                high ^= _mixed(low, self._keys[number]) & ((one << high_bits) - one)
        return (high << low_bits) | low


def _mixed(values: Places, key: numpy.uint64) -> Places:
    """The finaliser of SplitMix64 (Steele et al. 2014), modulo 2**64."""
    with numpy.errstate(over="ignore"):
        mixed = values + key
        mixed ^= mixed >> numpy.uint64(30)
        mixed *= _FACTOR_1
        mixed ^= mixed >> numpy.uint64(27)
        mixed *= _FACTOR_2
    return mixed ^ (mixed >> numpy.uint64(31))
