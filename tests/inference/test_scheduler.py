"""Blocks and turns, without a model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.inference.blocks import BlockPool, prefix_digests
from nemotron4.inference.lookup import Lookup
from nemotron4.inference.scheduler import Scheduler, Sequence


def scheduler(num_blocks: int = 32, *, max_running: int = 4, max_step_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 4), max_running=max_running, max_step_tokens=max_step_tokens)


def compute(planner: Scheduler) -> list[tuple[int, int]]:
    """Plan a step and pretend to run it: (start, end) of each slice."""
    slices = planner.plan()
    for planned in slices:
        planned.sequence.num_computed = planned.end
        if planned.completes:
            planned.sequence.new_ids.append(0)
    return [(planned.start, planned.end) for planned in slices]


def test_long_prompts_are_cut_at_block_boundaries() -> None:
    planner = scheduler(max_step_tokens=10)
    planner.add(Sequence(tuple(range(21))))
    assert [compute(planner) for _ in range(4)] == [[(0, 8)], [(8, 16)], [(16, 21)], [(21, 22)]]


def test_generating_sequences_go_before_new_prompts() -> None:
    planner = scheduler(max_step_tokens=8)
    planner.add(Sequence((1, 2, 3)))
    compute(planner)
    planner.add(Sequence(tuple(range(20))))
    assert compute(planner) == [(3, 4), (0, 4)]
    assert compute(planner) == [(4, 5), (4, 8)]


def test_first_come_first_served() -> None:
    planner = scheduler(max_running=1)
    first, second = Sequence((1,)), Sequence((2,))
    planner.add(first)
    planner.add(second)
    compute(planner)
    assert list(planner.running) == [first]
    planner.finish(first)
    compute(planner)
    assert list(planner.running) == [second]


def test_a_prompt_is_hashed_when_its_turn_comes() -> None:
    planner = scheduler(max_running=1)
    prompt = tuple(range(8))
    first, second, unshared = Sequence(prompt), Sequence(prompt), Sequence(prompt, max_shared=0)
    for sequence in (first, second, unshared):
        planner.add(sequence)
    compute(planner)
    assert (first.digests, second.digests) == (prefix_digests(prompt, 4), [])
    planner.finish(first)
    compute(planner)
    assert second.digests == first.digests
    assert second.take_reused() == 4
    planner.finish(second)
    compute(planner)
    assert unshared.digests == []


def test_the_last_admitted_gives_way_and_comes_back_first() -> None:
    planner = scheduler(num_blocks=5)
    first, second = Sequence(tuple(range(7))), Sequence(tuple(range(50, 55)))
    planner.add(first)
    planner.add(second)
    for _ in range(8):
        compute(planner)
    assert planner.num_preemptions >= 1
    assert list(planner.running) == [first]
    assert list(planner.waiting) == [second]
    kept = list(second.new_ids)
    planner.finish(first)
    compute(planner)
    assert second in planner.running
    assert second.new_ids[: len(kept)] == kept


def test_a_prompt_planned_in_the_same_step_is_shared() -> None:
    planner = scheduler(max_step_tokens=64)
    prompt = tuple(range(10))
    planner.add(Sequence(prompt))
    planner.add(Sequence((*prompt, 11)))
    assert compute(planner) == [(0, 10), (8, 11)]


def test_blocks_of_a_step_that_never_ran_are_not_shared() -> None:
    planner = scheduler(max_step_tokens=64)
    failed = Sequence(tuple(range(10)))
    planner.add(failed)
    planner.plan()
    planner.finish(failed)
    planner.add(Sequence(tuple(range(10))))
    assert compute(planner) == [(0, 10)]


def guessing(planner: Scheduler, count: int = 1) -> Sequence:
    """Sequences with one new token, whose next one is known from the prompt; the last of them."""
    for _ in range(count):
        planner.add(Sequence((1, 2, 1), lookup=Lookup(10, most=3)))
    compute(planner)
    for sequence in planner.running:
        sequence.new_ids[:] = [2]
    return sequence


def test_a_guess_is_computed_behind_the_last_token_and_nothing_of_it_stays() -> None:
    planner = scheduler()
    sequence = guessing(planner)
    [planned] = planner.plan()
    assert (planned.start, planned.end, planned.guesses, planned.num_results) == (3, 5, (1,), 2)
    assert planned.token_ids() == [2, 1]
    sequence.num_computed = 4
    sequence.new_ids.append(9)
    [planned] = planner.plan()
    assert (planned.start, planned.token_ids()) == (4, [9])
    planner.finish(sequence)
    assert planner.pool.num_used == 0


def test_nobody_gives_way_to_a_guess() -> None:
    planner = scheduler(num_blocks=2)
    guessing(planner)
    taken = planner.pool.allocate(1)
    assert [planned.guesses for planned in planner.plan()] == [()]
    planner.pool.release(taken)
    assert [planned.guesses for planned in planner.plan()] == [(1,)]
    assert planner.num_preemptions == 0


def test_with_company_nothing_is_guessed() -> None:
    planner = scheduler()
    guessing(planner, 2)
    assert [planned.guesses for planned in planner.plan()] == [(), ()]


def test_kept_prefixes_are_given_up_oldest_first() -> None:
    pool = BlockPool(4, 4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(old + new, (b"a", b"b", b"c", b"d"), strict=True):
        pool.publish(block, digest)
    pool.release(old)
    pool.release(new)
    assert pool.num_available == 4
    pool.allocate(2)
    assert pool.share([b"a"]) == []
    assert pool.share([b"c", b"d"]) == new


def test_kept_prefixes_are_bounded() -> None:
    pool = BlockPool(8, 4, max_kept=2)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.share([b"a", b"b", b"c"]) == blocks[:2]  # the last block goes first


def test_no_more_blocks_are_touched_than_are_used_at_once() -> None:
    pool = BlockPool(64, 4, max_kept=1, is_compact=True)
    for i in range(20):
        blocks = pool.allocate(3)
        pool.publish(blocks[0], b"%d" % i)
        pool.release(blocks)
        assert max(blocks) <= 4


def test_half_of_what_is_kept_gives_way_before_more_blocks_are_touched() -> None:
    pool = BlockPool(64, 4, max_kept=8, is_compact=True)
    old = pool.allocate(8)
    for i, block in enumerate(old):
        pool.publish(block, b"%d" % i)
    pool.release(old)
    assert sorted(pool.allocate(4)) == old[4:]  # the last blocks of a prompt go first
    assert pool.allocate(2) == [8, 9]
    assert pool.share([b"%d" % i for i in range(8)]) == old[:4]


def test_blocks_that_are_touched_and_free_are_taken_before_kept_ones() -> None:
    pool = BlockPool(64, 4, max_kept=4, is_compact=True)
    old = pool.allocate(8)
    for i in range(4):
        pool.publish(old[i], b"%d" % i)
    pool.release(old)
    assert pool.allocate(4) == old[4:]
    assert pool.share([b"%d" % i for i in range(4)]) == old[:4]


def test_neighbours_and_room_to_grow() -> None:
    pool = BlockPool(64, 4)
    starts = [pool.allocate(1)[0] for _ in range(4)]
    assert starts == [0, 32, 16, 48]
    assert pool.allocate(3, after=starts[1]) == [33, 34, 35]


def test_a_sequence_grows_into_the_kept_block_behind_it() -> None:
    pool = BlockPool(8, 4)
    blocks = pool.allocate(3)
    pool.publish(blocks[2], b"left by a finished request")
    pool.release(blocks[2:])
    assert pool.allocate(2, after=blocks[1]) == [2, 3]
    assert pool.share([b"left by a finished request"]) == []


def test_digests_cover_everything_before() -> None:
    a, b = prefix_digests([1, 2, 3, 4, 5], 2), prefix_digests([9, 2, 3, 4], 2)
    assert len(a) == 2
    assert a[1] != b[1]
    assert prefix_digests([1, 2, 3, 4], 2) == a


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    num_new=st.integers(1, 15),
    num_blocks=st.integers(12, 40),
)
def test_every_sequence_ends_and_every_block_returns(
    lengths: list[int], num_new: int, num_blocks: int
) -> None:
    planner = scheduler(num_blocks=num_blocks)
    sequences = [Sequence(tuple(range(n))) for n in lengths]
    for sequence in sequences:
        planner.add(sequence)
    for _ in range(2000):
        if not planner.running and not planner.waiting:
            break
        compute(planner)
        used = [b for s in planner.running for b in s.blocks]
        assert planner.pool.num_used == len(set(used))
        for sequence in list(planner.running):
            if len(sequence.new_ids) >= num_new:
                planner.finish(sequence)
    assert all(len(sequence.new_ids) == num_new for sequence in sequences)
    assert planner.pool.num_used == 0
