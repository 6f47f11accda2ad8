"""vLLM behind our engine interface, for models that need several devices or several nodes.

vLLM's engine lives on an event loop of its own, in a thread; requests cross over from whatever loop the
caller has. Token ids go in and come out: tokenizer, templates, stop rules and checks are ours, so the server
behaves as it does over the built-in engine. docs/engine.md lists what differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from nemotron4.engine import (
    ChatFormat,
    EngineStats,
    ModelInfo,
    SamplingParams,
    SamplingRequest,
    Tokenizer,
    TokenStep,
)
from nemotron4.errors import ConfigError, EngineBusyError, Nemotron4Error, RequestError
from nemotron4.inference.requests import check_request
from nemotron4.inference.sent_weights import SentWeights
from nemotron4.inference.vllm_sampling import position_logprobs, prompt_positions, vllm_params
from nemotron4.records import Generation
from nemotron4.text.answers import StopCheck, finished

START_S = 3600.0  # the weights of a large model take a while to arrive
CLOSE_S = 30.0
JOIN_S = 5.0
Result = TypeVar("Result")
Deliver = Callable[[TokenStep | Exception], None]


class VllmEngine:
    """Implements ``TakesWeights``. ``start`` makes vLLM's ``AsyncLLM``; it is given a stat logger factory.

    ``weights`` keeps what a trainer sends, where vLLM's processes can read it. ``cleanup`` runs once, after
    vLLM has ended.
    """

    def __init__(
        self,
        start: Callable[[Callable[..., Any]], Any],
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompt_format: ChatFormat | None,
        *,
        max_running: int,
        max_waiting: int,
        weights: SentWeights | None = None,
        cleanup: Callable[[], None] = lambda: None,
        start_timeout_s: float | None = None,
    ) -> None:
        # An id that the tokenizer does not know can be neither sent, drawn nor listed.
        self._width = info.vocab_size
        self._info = replace(info, vocab_size=min(info.vocab_size, tokenizer.vocab_size))
        self._tokenizer, self._prompt_format = tokenizer, prompt_format
        self._max_running, self._max_waiting = max_running, max_waiting
        self._weights, self._cleanup = weights, cleanup
        self._counters = _Counters()
        self._numbers = itertools.count()
        self._open: set[Deliver] = set()
        self._num_finished = 0
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nemotron4-vllm", daemon=True)
        self._thread.start()
        limit_s = start_timeout_s or START_S
        try:
            self._llm = self._call(_started(start, self._counters.logger), timeout_s=limit_s)
        except TimeoutError as error:
            self._end_loop()
            raise Nemotron4Error(
                f"vLLM did not start within {limit_s:.0f} s: it may still read weights or compile",
                hint="give it longer with --start-timeout-s, or copy the weights to a disk of this node",
            ) from error
        except BaseException:
            self._end_loop()
            raise

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def prompt_format(self) -> ChatFormat | None:
        return self._prompt_format

    @property
    def failure(self) -> str | None:
        """Why no request can be served any more, or None."""
        if not self._is_closed and self._llm.errored:
            return "a process of vLLM has ended; its words are in the log above"
        return None

    def stats(self) -> EngineStats:
        counters = self._counters
        num_blocks = self._llm.vllm_config.cache_config.num_gpu_blocks or 0
        return EngineStats(
            num_running=min(len(self._open), self._max_running),
            max_running=self._max_running,
            num_waiting=max(0, len(self._open) - self._max_running),
            max_waiting=self._max_waiting,
            cache_blocks_used=round(counters.cache_share * num_blocks) if self._open else 0,
            cache_blocks_total=num_blocks,
            prompt_tokens_total=counters.prompt_tokens,
            prompt_tokens_reused_total=counters.reused_tokens,
            generated_tokens_total=counters.new_tokens,
            requests_finished_total=self._num_finished,
            preemptions_total=counters.preemptions,
        )

    async def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        """See ``InferenceEngine.stream``."""
        ids = list(prompt_ids)
        self.check(ids, params)
        request = vllm_params(params, vocab_size=self.info.vocab_size, width=self._width)
        if self._is_closed:
            raise RequestError("the engine is closed")
        num_waiting = max(0, len(self._open) - self._max_running)
        if len(self._open) >= self._max_running + self._max_waiting:
            raise EngineBusyError(f"{num_waiting} requests are waiting, the most that may", retry_after_s=1.0)
        caller = asyncio.get_running_loop()
        steps: asyncio.Queue[TokenStep | Exception] = asyncio.Queue()

        def deliver(step: TokenStep | Exception) -> None:
            if not caller.is_closed():
                caller.call_soon_threadsafe(steps.put_nowait, step)

        self._open.add(deliver)
        work = asyncio.run_coroutine_threadsafe(self._run(ids, params, request, deliver), self._loop)
        try:
            while True:
                step = await steps.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            work.cancel()
            self._open.discard(deliver)
            self._num_finished += 1

    def generate_each(self, requests: Sequence[SamplingRequest]) -> list[Generation]:
        """One generation for each request, in order. Blocks."""
        limit = asyncio.Semaphore(self._max_running)

        async def one(request: SamplingRequest) -> Generation:
            async with limit:
                steps = [step async for step in self.stream(request.prompt_ids, request.params)]
            return finished(self.tokenizer, request, steps)

        async def every() -> list[Generation]:
            return await asyncio.gather(*map(one, requests))

        return asyncio.run(every())

    def replace_weights(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Answer by these tensors from now on. Blocks until the requests that run have finished."""
        if self._weights is None:
            raise ConfigError(
                "vLLM over several nodes takes no weights: they are sent by files of one machine",
                hint="one server a node, and all of them in policy_gradient.servers",
            )
        self._weights.keep(changed)
        self._call(self._exchange(self._weights), timeout_s=None)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if this request can never be served."""
        check_request(self.info, prompt_ids, params)

    def close(self) -> None:
        """Stop vLLM and its processes; requests in flight end with finish reason ``abort``."""
        if self._is_closed:
            return
        self._is_closed = True
        for deliver in list(self._open):
            deliver(TokenStep(None, finish_reason="abort"))
        with contextlib.suppress(TimeoutError):  # what does not answer ends with this process
            self._call(_ended(self._llm), timeout_s=CLOSE_S)
        self._end_loop()
        self._cleanup()

    # -- on the loop of vLLM -------------------------------------------------------------------------------

    async def _run(
        self, prompt_ids: list[int], params: SamplingParams, request: Any, deliver: Deliver
    ) -> None:
        """One request to its end; every outcome but a cancellation is delivered."""
        try:
            await self._generate(prompt_ids, params, request, deliver)
        except Nemotron4Error as error:
            deliver(error)
        except Exception as error:
            wrapped = Nemotron4Error(f"vLLM could not compute this request: {error or type(error).__name__}")
            wrapped.__cause__ = error
            deliver(wrapped)

    async def _generate(
        self, prompt_ids: list[int], params: SamplingParams, request: Any, deliver: Deliver
    ) -> None:
        stop = StopCheck(params, self.tokenizer, prompt_ids)
        num_new = 0
        prompt = {"type": "token", "prompt_token_ids": prompt_ids}
        outputs = self._llm.generate(prompt, request, str(next(self._numbers)))
        async with contextlib.aclosing(outputs):  # leaving early makes vLLM drop the request
            async for output in outputs:
                completion = output.outputs[0]
                for place, token_id in enumerate(completion.token_ids):
                    scored = None
                    if num_new == 0:
                        scored = prompt_positions(
                            output.prompt_logprobs, prompt_ids, params, self.info.vocab_size
                        )
                    if params.max_new_tokens == 0:
                        deliver(TokenStep(None, prompt_logprobs=scored, finish_reason="length"))
                        return
                    num_new += 1
                    end = stop.after(token_id, num_new)
                    deliver(
                        TokenStep(
                            token_id,
                            self._logprobs(completion, place, params),
                            scored,
                            finish_reason=end.reason if end else None,
                            stop_reason=end.matched if end else None,
                        )
                    )
                    if end is not None:
                        return
        raise RuntimeError(f"it ended after {num_new} tokens without a reason")

    def _logprobs(self, completion: Any, place: int, params: SamplingParams) -> Any:
        if params.logprobs is None and not params.full_logprobs:
            return None
        return position_logprobs(
            completion.logprobs[place],
            completion.token_ids[place],
            vocab_size=self.info.vocab_size,
            num_top=params.logprobs or 0,
            is_full=params.full_logprobs,
        )

    async def _exchange(self, weights: SentWeights) -> None:
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        try:
            await self._llm.collective_rpc("take_sent_weights", args=(weights.source, weights.files))
        except Exception as error:  # whatever a worker raised comes as vLLM's own
            raise Nemotron4Error(f"vLLM did not take the weights: {error}") from error
        finally:
            await self._llm.resume_generation()

    # -- between the threads -------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, Result], *, timeout_s: float | None) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_S)
        if not self._thread.is_alive():  # else it still starts vLLM, after an interrupt
            self._loop.close()


async def _started(start: Callable[[Callable[..., Any]], Any], logger: Callable[..., Any]) -> Any:
    # Inside the loop, so that vLLM starts to read its engine's answers there.
    try:
        return start(logger)
    except (RuntimeError, ValueError, OSError) as error:
        raise Nemotron4Error(
            f"vLLM did not start: {error}",
            hint="its words are in the log above; VLLM_LOGGING_LEVEL=INFO shows more",
        ) from error


async def _ended(llm: Any) -> None:
    # Holding the loop up: vLLM's reader would take the end of its processes for a failure and say so.
    llm.shutdown()


class _Counters:
    """What vLLM reports after each step; ``logger`` is what it calls a stat logger factory."""

    def __init__(self) -> None:
        self.cache_share = 0.0
        self.prompt_tokens = self.reused_tokens = self.new_tokens = self.preemptions = 0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> _Counters:
        return self

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.cache_share = scheduler_stats.kv_cache_usage
            self.reused_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.new_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """The engine never sleeps."""
