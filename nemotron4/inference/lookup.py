"""Guesses of a request's next tokens: what followed its last two when they came before, in prompt or answer.

Of an answer that repeats (a quotation, a rewritten text, code, a list, a loop) most guesses are right.
The engine computes guesses together with the last token, for which the weights are read anyway, and keeps
those that it would have drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# Two tokens find nearly as much as the longest match of up to four does, and need one table.
NUM_MATCHED = 2
# A second row costs up to 24 % of a step, so a guess pays if one of four is right. Where fewer are, the next
# PAUSE tokens are not guessed; then two wrong ones in a row end the trial: 1.4 % of the time at most.
LEAST_RATE = 0.25
TRIAL_RATE = 0.3
PAUSE = 32
RECENT = 8  # guesses over which the rate is taken, about


class Lookup:
    """What is guessed for one request, and how well that went."""

    def __init__(self, max_new_tokens: int, *, most: int) -> None:
        """``most``: tokens guessed at once."""
        self._max_new_tokens, self._most = max_new_tokens, most
        self._ids: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # place of what came after, the last time
        self._num_indexed = NUM_MATCHED
        self._rate = 0.5
        self._num_right = 0  # guesses since the last wrong one
        self._paused_until = 0  # new tokens

    def propose(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> tuple[int, ...]:
        """As many tokens as were right in a row, at least one; none that needs no computing."""
        num_new = len(new_ids)
        if num_new < self._paused_until:
            return ()
        ids = self._ids
        ids += prompt_ids[len(ids) :]
        ids += new_ids[len(ids) - len(prompt_ids) :]
        for place in range(self._num_indexed, len(ids)):
            self._following[tuple(ids[place - NUM_MATCHED : place])] = place
        self._num_indexed = max(self._num_indexed, len(ids))
        start = self._following.get(tuple(ids[-NUM_MATCHED:]), len(ids))
        count = min(max(1, self._num_right), self._most, self._max_new_tokens - num_new - 1)
        return tuple(itertools.islice(itertools.cycle(ids[start : start + count]), max(0, count)))

    def learn(self, num_guessed: int, num_right: int, num_new: int) -> None:
        """How many of the last guesses were drawn, and how many new tokens there are now."""
        self._num_right = self._num_right + num_right if num_right == num_guessed else 0
        self._rate += (num_right / num_guessed - self._rate) / RECENT
        if self._rate < LEAST_RATE:
            self._rate = TRIAL_RATE
            self._paused_until = num_new + PAUSE
