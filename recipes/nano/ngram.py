"""An interpolated 5-gram model with modified Kneser-Ney smoothing, over the tokens that a training run saw.

The formula is Chen and Goodman's (1999): three discounts for each order from its counts of counts; lower
orders count in how many contexts a word was seen. It is the yardstick for a small model trained from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The n-grams of one order: sorted keys, discounted counts, and what each context keeps back."""

    keys: Keys  # all n tokens, the first one highest
    discounted: NDArray[np.float64]
    contexts: Keys  # the first n - 1 tokens
    totals: NDArray[np.float64]
    kept_back: NDArray[np.float64]


class KneserNey:
    """``tokens`` are documents in one stream. A token must fit in 12 bits, so that five of them fit in 64."""

    BITS = 12

    def __init__(self, tokens: Sequence[int], *, vocab_size: int, order: int = 5) -> None:
        assert vocab_size <= 1 << self.BITS, "five tokens are packed into one 64-bit key"
        assert order * self.BITS < 64, "five tokens are packed into one 64-bit key"
        self.vocab_size = vocab_size
        self.order = order
        stream = np.asarray(tokens, dtype=np.int64)
        keys, counts = np.unique(self._packed(stream, order), return_counts=True)
        orders = []
        for n in range(order, 0, -1):
            orders.append(self._order(keys, counts))
            # A shorter n-gram counts once for each different token seen before it.
            keys, counts = np.unique(keys & ((1 << self.BITS * (n - 1)) - 1), return_counts=True)
        self.orders = orders[::-1]  # unigrams first

    def _packed(self, stream: NDArray[np.int64], n: int) -> Keys:
        """The n-gram that ends at each position from n - 1 on."""
        packed = np.zeros(len(stream) - n + 1, dtype=np.int64)
        for i in range(n):
            packed = (packed << self.BITS) | stream[i : len(stream) - n + 1 + i]
        return packed

    def _order(self, keys: Keys, counts: NDArray[np.int64]) -> Order:
        num_with = [float((counts == k).sum()) for k in range(5)]
        base = num_with[1] / (num_with[1] + 2 * num_with[2])
        discounts = np.array([0.0] + [k - (k + 1) * base * num_with[k + 1] / num_with[k] for k in (1, 2, 3)])
        discount = discounts[np.minimum(counts, 3)]
        contexts, start = np.unique(keys >> self.BITS, return_index=True)
        totals = np.add.reduceat(counts, start).astype(np.float64)
        return Order(keys, counts - discount, contexts, totals, np.add.reduceat(discount, start) / totals)

    def probabilities(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """P(token | the ones before it, as many as the order uses) for every token but the first."""
        stream = np.asarray(tokens, dtype=np.int64)
        found = np.full(len(stream), 1.0 / self.vocab_size)
        for n, order in enumerate(self.orders, start=1):
            if len(stream) < n:
                break
            packed = self._packed(stream, n)
            context = _find(order.contexts, packed >> self.BITS)
            seen = context >= 0
            place = _find(order.keys, packed)
            own = np.where(place >= 0, order.discounted[place], 0.0)
            lower = found[n - 1 :]
            mixed = own / order.totals[context] + order.kept_back[context] * lower
            found[n - 1 :] = np.where(seen, mixed, lower)
        return found[1:]


def _find(keys: Keys, wanted: Keys) -> NDArray[np.int64]:
    """The place of each wanted key, -1 where it is not."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)
