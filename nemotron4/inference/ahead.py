"""A stream that runs alone draws some tokens before Python looks at them.

Python between two steps takes 40 to 150 us, with small models a fifth of the time of a token.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from nemotron4.inference.requests import Request
from nemotron4.inference.runner import Ahead, StepResult, StepRunner
from nemotron4.inference.scheduler import Scheduler, Slice

MOST_S = 0.01  # for which a stream is not looked after: no client sees the delay


class LoneStream:
    """Runs steps; the only stream goes on by itself for as many as take ``MOST_S``."""

    def __init__(self, scheduler: Scheduler, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._step_s = math.inf  # the last one of a lone stream

    def run(
        self, runner: StepRunner, slices: list[Slice], request: Request | None
    ) -> tuple[list[Slice], StepResult]:
        """What was run, and its result. ``request``: of the first slice, if it may go ahead.

        Tokens drawn ahead, but for the last, are in the slice like guesses; they are known to be right.
        """
        [planned, *others] = slices
        is_lone = not others and planned.num_results == planned.end - planned.start == 1
        if not is_lone or not planned.sequence.new_ids:  # prompts take longer
            return slices, runner.run(slices)
        ahead = None if request is None else self._ahead(planned, request, runner.most_ahead)
        began = time.perf_counter()
        result = runner.run(slices, ahead)
        self._step_s = (time.perf_counter() - began) / max(1, len(result.drawn))
        more = result.drawn[:-1]
        return [replace(planned, end=planned.end + len(more), guesses=more)], result

    def _ahead(self, planned: Slice, request: Request, most: int) -> Ahead | None:
        """At most ``most`` tokens; None: the next one needs more than its logits, or a look at the queue."""
        count = min(most, int(MOST_S / self._step_s), request.num_plain_draws)
        scheduler = self._scheduler
        if count < 2 or scheduler.waiting or not scheduler.reach(planned.sequence, planned.end + count - 1):
            return None
        return Ahead(request.next_draws(count), request.params.stop_token_ids, self._vocab_size)
