"""Continuous batching: any number of requests on one model, in a thread of its own. Token ids only."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import sys
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nemotron4.engine import (
    ChatFormat,
    EngineStats,
    ModelInfo,
    SamplingParams,
    SamplingRequest,
    Tokenizer,
    TokenStep,
)
from nemotron4.errors import EngineBusyError, Nemotron4Error, RequestError
from nemotron4.inference.ahead import LoneStream
from nemotron4.inference.blocks import BlockPool
from nemotron4.inference.requests import Deliver, Request, Turn, check_request, drawn_together
from nemotron4.inference.runner import StepRunner
from nemotron4.inference.scheduler import Scheduler, Slice
from nemotron4.inference.scheduler import Sequence as ScheduledSequence
from nemotron4.text.structured_output import GrammarVocabulary

if TYPE_CHECKING:
    from nemotron4.inference.adapters import AdapterBank

PROGRESS_INTERVAL_S = 1.0
_Letter = tuple["asyncio.Queue[TokenStep | Exception]", TokenStep | Exception]


def _deliver_all(letters: list[_Letter]) -> None:
    for steps, step in letters:
        steps.put_nowait(step)


class EngineCore:
    """Requests in, token steps out. ``Engine`` adds text in and text out.

    One thread owns model, cache and scheduler; other threads only append to the inbox. A step that fails ends
    the requests in it with that error and nothing else.
    """

    def __init__(
        self,
        runner: StepRunner,
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompt_format: ChatFormat | None,
        *,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
        num_virtual_tokens: int = 0,
        max_kept_blocks: int | None = None,
        num_speculative_tokens: int = 0,
        adapters: AdapterBank | None = None,
    ) -> None:
        """``num_virtual_tokens``: ids behind the vocabulary that precede every prompt (P-tuning).

        ``max_kept_blocks``: of ended requests, for prompts that begin like theirs; None: any number.
        ``num_speculative_tokens``: the most that are guessed at once; 0: none.
        ``adapters``: those that requests may name; without a bank none can be loaded.
        """
        self._adapters = adapters
        # The output layer may be wider: an id without a piece can be neither sent, drawn nor listed.
        self.info = replace(info, vocab_size=min(info.vocab_size, tokenizer.vocab_size))
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self._runner = runner
        self._max_waiting = max_waiting
        self._num_speculative_tokens = num_speculative_tokens
        width = runner.config.vocab_size
        self._virtual_ids = tuple(range(width, width + num_virtual_tokens))
        cache = runner.cache
        pool = BlockPool(
            cache.num_blocks, cache.block_size, max_kept=max_kept_blocks, is_compact=cache.is_read_in_place
        )
        self._scheduler = Scheduler(pool, max_running=max_running, max_step_tokens=max_step_tokens)
        self._requests: dict[ScheduledSequence, Request] = {}
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._wake = threading.Event()
        self._outbox: dict[asyncio.AbstractEventLoop, list[_Letter]] = defaultdict(list)
        self._is_closing = False
        self._next_runner: StepRunner | None = None
        self._exchanged = threading.Event()
        self._mask_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="nemotron4-grammar")
        self._num_prompt_tokens = self._num_reused = self._num_generated = self._num_finished = 0
        self._num_guessed = self._num_right = 0
        self._lone = LoneStream(self._scheduler, self.info.vocab_size)
        self._thread = threading.Thread(target=self._loop, name="nemotron4-engine", daemon=True)
        self._thread.start()

    # -- for any thread ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            max_running=scheduler.max_running,
            num_waiting=len(scheduler.waiting) + len(self._inbox),
            max_waiting=self._max_waiting,
            cache_blocks_used=scheduler.pool.num_used,
            cache_blocks_total=scheduler.pool.num_blocks,
            prompt_tokens_total=self._num_prompt_tokens,
            prompt_tokens_reused_total=self._num_reused,
            generated_tokens_total=self._num_generated,
            requests_finished_total=self._num_finished,
            preemptions_total=scheduler.num_preemptions,
            spec_decode_num_draft_tokens_total=self._num_guessed,
            spec_decode_num_accepted_tokens_total=self._num_right,
        )

    async def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        """See ``InferenceEngine.stream``."""
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[TokenStep | Exception] = asyncio.Queue()

        def deliver(step: TokenStep | Exception) -> None:
            self._outbox[loop].append((steps, step))

        request = self._submit(prompt_ids, params, deliver)
        is_finished = False
        try:
            while not is_finished:
                step = await steps.get()
                is_finished = isinstance(step, Exception) or step.finish_reason is not None
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            if not is_finished:
                self._cancel(request)

    def collect(
        self,
        requests: Sequence[SamplingRequest],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[TokenStep]]:
        """Run all requests to their end and return every step of each. Blocks the calling thread.

        ``on_progress`` is called with the ended requests and the tokens so far, at each end and each second.
        """
        results: list[list[TokenStep]] = [[] for _ in requests]
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def deliver(index: int, step: TokenStep | Exception) -> None:
            # Waking the waiting thread for every token would take a processor from the products.
            if isinstance(step, Exception):
                ended.put(step)
                return
            results[index].append(step)
            if step.finish_reason is not None:
                ended.put(None)

        entered: list[Request] = []
        try:
            for index, each in enumerate(requests):
                entered.append(self._request(each.prompt_ids, each.params, partial(deliver, index)))
            # All at once: how the prompts are cut into steps must not depend on the threads' timing.
            self._inbox.extend(entered)
            self._wake.set()
            num_ended = 0
            while num_ended < len(requests):
                with contextlib.suppress(queue.Empty):
                    error = ended.get(timeout=PROGRESS_INTERVAL_S if on_progress else None)
                    if error is not None:
                        raise error
                    num_ended += 1
                if on_progress is not None:
                    on_progress(num_ended, sum(map(len, results)))
        except BaseException:
            for request in entered:
                self._cancel(request)
            raise
        return results

    def exchange(self, runner: StepRunner) -> None:
        """Go on with another model of this shape, on the same cache, once no request runs.

        Requests that wait are kept, and what the cache knows of prompts is forgotten. One call at a time.
        """
        self._exchanged.clear()
        self._next_runner = runner
        self._wake.set()
        self._exchanged.wait()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """See ``AdapterHost``."""
        return self._adapters.names if self._adapters is not None else ()

    def load_adapter(self, name: str, path: str) -> None:
        """See ``AdapterHost``."""
        self._bank().load(name, path)

    def unload_adapter(self, name: str) -> None:
        """See ``AdapterHost``."""
        self._bank().unload(name)

    def _bank(self) -> AdapterBank:
        if self._adapters is None:
            raise RequestError("the engine runs without adapters", hint="serve --adapter NAME=PATH")
        return self._adapters

    def close(self) -> None:
        """Stop the engine; requests in flight end with finish reason ``abort``."""
        self._is_closing = True
        self._wake.set()
        self._thread.join()

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if this request can never be served."""
        check_request(self.info, prompt_ids, params)
        total = len(prompt_ids) + params.max_new_tokens + len(self._virtual_ids)
        if not self._scheduler.fits(total):
            cached = self._scheduler.pool.num_blocks * self._scheduler.pool.block_size
            raise RequestError(
                f"the request needs {total} positions of cache; there are {cached}",
                hint="start the engine with more cache memory",
            )
        if params.grammar is not None:
            self._grammars.follow(params.grammar)

    def _request(self, prompt_ids: Sequence[int], params: SamplingParams, deliver: Deliver) -> Request:
        self.check(prompt_ids, params)
        if self._is_closing:
            raise RequestError("the engine is closed")
        return Request(
            prompt_ids, params, self.tokenizer, deliver,
            num_guesses=self._num_speculative_tokens, virtual_ids=self._virtual_ids,
            vocab_size=self.info.vocab_size,
            grammar=None if params.grammar is None else self._grammars.follow(params.grammar),
            adapter=None if params.adapter is None else self._bank()[params.adapter],
        )  # fmt: skip

    @functools.cached_property
    def _grammars(self) -> GrammarVocabulary:
        return GrammarVocabulary(self.tokenizer, self.info.vocab_size)

    def _submit(self, prompt_ids: Sequence[int], params: SamplingParams, deliver: Deliver) -> Request:
        request = self._request(prompt_ids, params, deliver)
        num_waiting = len(self._inbox) + len(self._scheduler.waiting)
        num_free = self._scheduler.max_running - len(self._scheduler.running)
        if num_waiting >= self._max_waiting + num_free:
            raise EngineBusyError(f"{num_waiting} requests are waiting, the most that may", retry_after_s=1.0)
        self._inbox.append(request)
        self._wake.set()
        return request

    def _cancel(self, request: Request) -> None:
        self._cancelled.append(request)
        self._wake.set()

    # -- for the engine's own thread -----------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._is_closing:  # after the clearing: else a close between the two is never seen
                    break
                self._take_mail()
                if self._next_runner is not None and not self._scheduler.running:
                    self._runner, self._next_runner = self._next_runner, None
                    self._scheduler.pool = self._scheduler.pool.emptied()  # other weights, same cache
                    self._exchanged.set()
                slices = self._scheduler.plan(admits=self._next_runner is None)
                if slices:
                    self._step(slices)
                    self._send()
                else:
                    self._wake.wait()
        finally:  # also after a mistake of ours: nobody may wait for ever
            self._is_closing = True
            self._exchanged.set()
            error = sys.exception()
            wrapped = None if error is None else Nemotron4Error(f"the engine ended by a mistake: {error!r}")
            for request in (*self._requests.values(), *self._inbox):
                request.deliver(wrapped or TokenStep(None, finish_reason="abort"))
            self._send()
            self._mask_threads.shutdown()

    def _send(self) -> None:
        """Hand the step's tokens to the event loops that wait for them, waking each loop once."""
        for loop, letters in self._outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                loop.call_soon_threadsafe(_deliver_all, letters)
        self._outbox.clear()

    def _take_mail(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            self._requests[request.sequence] = request
            self._num_prompt_tokens += len(request.prompt_ids)
            self._scheduler.add(request.sequence)
        while self._cancelled:
            self._end(self._cancelled.popleft())

    def _end(self, request: Request) -> None:
        if self._requests.pop(request.sequence, None) is not None:
            self._scheduler.finish(request.sequence)
            self._num_finished += 1

    def _step(self, slices: list[Slice]) -> None:
        masks = self._start_masks(slices)
        first = None if self._inbox or self._cancelled else self._requests[slices[0].sequence]
        try:
            slices, result = self._lone.run(self._runner, slices, first)
        except Exception as error:  # a step that cannot be computed must not end the engine
            self._fail(slices, error)
            return
        finally:
            if masks:
                wait(masks.values())
        rows = iter(result.logits_RV)
        turns: list[Turn] = []
        for planned, first_row in zip(slices, result.first_rows, strict=True):
            results = [next(rows) for _ in range(planned.num_results)]
            turn = Turn(self._requests[planned.sequence], planned, results, drawn=result.drawn)
            try:
                self._take_positions(turn, result.hidden_ND, first_row)
                if turn.request in masks:
                    masks[turn.request].result()
            except Exception as error:
                self._fail([planned], error)
                continue
            if turn.results:
                turns.append(turn)
        while turns:
            drawn = drawn_together(turns, handle=self._runner.handle)
            turns = [
                turn for turn, token_id in zip(turns, drawn, strict=True) if self._goes_on(turn, token_id)
            ]

    def _take_positions(self, turn: Turn, hidden_ND: Any, first_row: int) -> None:
        """Note what of the slice is known to hold, and what was wanted of it besides the next token."""
        request, planned = turn.request, turn.planned
        end = planned.end - len(planned.guesses)
        num_reused = planned.sequence.take_reused()
        self._num_reused += num_reused
        request.num_cached += num_reused
        if request.needs_prompt_logits:
            request.observe_prompt(planned.start, partial(self._runner.logits, hidden_ND[first_row:]), end)
        if request.params.hidden_mean:
            hidden_SD = self._runner.hidden(hidden_ND, first_row, first_row + end - planned.start)
            request.observe_hidden(planned.start, hidden_SD)
        planned.sequence.num_computed = end

    def _goes_on(self, turn: Turn, token_id: int | None) -> bool:
        """Take the next token; True if it was guessed, so that the results of the next row hold too."""
        request, sequence, guesses = turn.request, turn.planned.sequence, turn.planned.guesses
        try:
            steps = request.advance(turn.results[turn.num_right], token_id)
        except Exception as error:
            self._fail([turn.planned], error)
            return False
        self._num_generated += len(steps) if request.params.max_new_tokens > 0 else 0
        is_over = steps[-1].finish_reason is not None
        is_right = guesses[turn.num_right : turn.num_right + 1] == (steps[-1].token_id,)
        turn.num_right += is_right
        if is_right and not is_over:
            sequence.num_computed += 1
        elif guesses and not turn.drawn and sequence.lookup is not None:
            sequence.lookup.learn(len(guesses), turn.num_right, len(sequence.new_ids))
            self._num_guessed += len(guesses)
            self._num_right += turn.num_right
        if is_over:
            self._end(request)
        for step in steps:
            request.deliver(step)
        return is_right and not is_over

    def _start_masks(self, slices: list[Slice]) -> dict[Request, Future[None]]:
        """What grammars allow next, computed while the model runs: the library needs no interpreter lock."""
        requests = [self._requests[planned.sequence] for planned in slices if planned.completes]
        return {r: self._mask_threads.submit(r.compute_mask) for r in requests if r.needs_mask}

    def _fail(self, slices: list[Slice], error: Exception) -> None:
        for planned in slices:
            request = self._requests[planned.sequence]
            self._end(request)
            told = error
            if not isinstance(error, RequestError):  # which a grammar that cannot be followed raises
                told = Nemotron4Error(f"this request could not be computed: {error}")
                told.__cause__ = error
            request.deliver(told)
