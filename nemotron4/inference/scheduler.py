"""Who runs in the next forward pass, with which positions. No tensors.

First come, first served. Each step gives one position to every sequence that is generating, then fills the
rest of the token budget with prompts, cut at block boundaries. When blocks run out, the sequence that was
admitted last goes back to the head of the queue; its tokens are kept and its positions computed again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nemotron4.inference.blocks import BlockPool, prefix_digests
from nemotron4.inference.lookup import Lookup


@dataclass(eq=False)
class Sequence:
    """One request's tokens and how far they are computed."""

    prompt_ids: tuple[int, ...]
    max_shared: int | None = None  # positions before the first whose output is wanted; None: only the last is
    new_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    adapter: object = None  # what the runner computes its positions with, besides the model
    salt: bytes = b""  # only sequences with the same one share prefixes
    num_reused: int = 0  # positions found in the cache at the last admission and not yet counted
    lookup: Lookup | None = None  # guesses the tokens to come; None: they are not guessed

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.new_ids)

    def take_reused(self) -> int:
        """Positions found in the cache since the last call."""
        count, self.num_reused = self.num_reused, 0
        return count

    def token_ids(self, start: int, end: int) -> list[int]:
        num_prompt = len(self.prompt_ids)
        from_prompt = list(self.prompt_ids[start:end])
        return from_prompt + self.new_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]


@dataclass(frozen=True)
class Slice:
    """Positions ``start`` to ``end`` (excluded) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int
    guesses: tuple[int, ...] = ()  # the tokens of the last positions, where they are not known yet

    @property
    def completes(self) -> bool:
        """True if the last known token is computed, so that the next one can be drawn."""
        return self.num_results > 0

    @property
    def num_results(self) -> int:
        """Rows, the last ones, whose logits are wanted: of the last known token and of each guess."""
        num_guesses = len(self.guesses)
        return 1 + num_guesses if self.end - num_guesses == self.sequence.length else 0

    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids(self.start, self.end), *self.guesses]


class Scheduler:
    """Queue, admission and pre-emption.

    The caller computes each planned slice, then sets ``num_computed`` to the end of what holds and appends
    the drawn tokens. What was computed for wrong guesses is written over by later steps.
    """

    # Sequences up to which tokens are guessed. With quantised weights a step of four rows takes 1.5 to 1.9
    # times as long as one of two: two sequences together lose more by it than they win.
    max_guessing = 1

    def __init__(self, pool: BlockPool, *, max_running: int, max_step_tokens: int) -> None:
        self.pool = pool
        self.max_running = max_running
        self.max_step_tokens = max(max_step_tokens, pool.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in order of admission
        self.num_preemptions = 0

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of that length could ever run."""
        return self._blocks_for(num_tokens) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            del self.running[sequence]
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self, *, admits: bool = True) -> list[Slice]:
        """The slices of the next step; empty only if nothing runs and nothing that waits may begin."""
        budget = self.max_step_tokens
        slices: list[Slice] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # pre-empted a moment ago
            remaining = sequence.length - sequence.num_computed
            count = self._cut(sequence, min(remaining, budget))
            if count == 0 or not self._grow(sequence, sequence.num_computed + count):
                continue
            slices.append(Slice(sequence, sequence.num_computed, sequence.num_computed + count))
            budget -= count
        slices = [planned for planned in slices if planned.sequence in self.running]
        for planned in slices:
            self._publish(planned)
        if len(slices) <= self.max_guessing:
            slices = [self._with_guesses(planned) for planned in slices]
        return slices + (self._admit(budget) if admits else [])

    def _with_guesses(self, planned: Slice) -> Slice:
        """The slice of a sequence that generates, and guesses behind it if there are blocks for them."""
        sequence = planned.sequence
        if sequence.lookup is None or not sequence.new_ids or not planned.completes:
            return planned
        guesses = sequence.lookup.propose(sequence.prompt_ids, sequence.new_ids)
        end = planned.end + len(guesses)
        if not self.reach(sequence, end):
            return planned
        return Slice(sequence, planned.start, end, guesses)

    def reach(self, sequence: Sequence, num_positions: int) -> bool:
        """Blocks for positions that may be used; False if there are none: nobody gives way to them."""
        if self._blocks_for(num_positions) - len(sequence.blocks) > self.pool.num_available:
            return False
        return self._grow(sequence, num_positions)

    def _admit(self, budget: int) -> list[Slice]:
        slices: list[Slice] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            # The last token is always computed: its logits give the next one.
            most = sequence.length - 1 if sequence.max_shared is None else sequence.max_shared
            num_full = most // self.pool.block_size
            if (
                not sequence.digests and sequence.max_shared != 0
            ):  # not on arrival: thousands may come at once
                sequence.digests = prefix_digests(
                    sequence.prompt_ids, self.pool.block_size, salt=sequence.salt
                )
            shared = self.pool.share(sequence.digests[:num_full])
            needed = self._blocks_for(sequence.length + 1) - len(shared)
            # A block in hand for each running sequence delays the first pre-emption.
            reserve = len(self.running)
            start = len(shared) * self.pool.block_size
            count = self._cut(sequence, min(sequence.length - start, budget), start=start)
            if needed + reserve > self.pool.num_available or count == 0:
                self.pool.release(shared)
                break
            self.waiting.popleft()
            sequence.blocks = shared
            sequence.num_computed = sequence.num_reused = start
            self.running[sequence] = None
            grown = self._grow(sequence, start + count)
            assert grown, "admission checked the number of blocks"
            slices.append(Slice(sequence, start, start + count))
            # Published at once: a request admitted in the same step may share what this step computes.
            self._publish(slices[-1])
            budget -= count
        return slices

    def _cut(self, sequence: Sequence, count: int, *, start: int | None = None) -> int:
        """Shorten a slice of a prompt so that it ends at a block boundary or with the prompt."""
        start = sequence.num_computed if start is None else start
        end, num_prompt = start + count, len(sequence.prompt_ids)
        if end < num_prompt:
            end -= end % self.pool.block_size
        return max(0, end - start)

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a running sequence blocks up to ``num_positions``, pre-empting later ones if it must.

        False if the sequence itself had to go.
        """
        needed = self._blocks_for(num_positions) - len(sequence.blocks)
        while needed > self.pool.num_available:
            last = next(reversed(self.running))
            self._preempt(last)
            if last is sequence:
                return False
        if needed > 0:
            after = sequence.blocks[-1] if sequence.blocks else None
            sequence.blocks.extend(self.pool.allocate(needed, after=after))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _publish(self, planned: Slice) -> None:
        sequence, size = planned.sequence, self.pool.block_size
        for i in range(planned.start // size, min(planned.end // size, len(sequence.digests))):
            self.pool.publish(sequence.blocks[i], sequence.digests[i])

    def _release(self, sequence: Sequence) -> None:
        # Blocks published for a step that then did not run must not be shared.
        computed = sequence.num_computed // self.pool.block_size
        self.pool.withdraw(sequence.blocks[computed:])
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.pool.block_size)
