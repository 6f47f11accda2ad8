"""An engine without a model, for the tests of everything that talks to an engine.

``FakeEngine`` keeps every promise of ``InferenceEngine``: sampling, stops, log-probabilities, queue,
cancellation, abort. Its "model" gives fixed pseudo-random logits to the last two tokens; a script or an
echo raises the logit of the token that should come next, so that greedy decoding says it exactly. Sampling is
plain numpy: slow, obvious, no torch.

V = vocabulary"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nemotron4.engine import (
    ChatFormat,
    EngineStats,
    ModelInfo,
    PositionLogprobs,
    SamplingParams,
    Tokenizer,
    TokenLogprob,
    TokenStep,
)
from nemotron4.errors import EngineBusyError, RequestError
from nemotron4.inference.fake_tokenizer import FakeTokenizer
from nemotron4.text.answers import StopCheck
from nemotron4.text.structured_output import Follower, GrammarVocabulary

Floats = npt.NDArray[np.float64]


def draw(
    logits_V: Floats,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    params: SamplingParams,
    generator: random.Random,
) -> int:
    """The next token id, by the filters in the order that ``SamplingParams`` documents."""
    logits_V = _penalised(logits_V.copy(), prompt_ids, new_ids, params)
    if params.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = _filtered(logits_V, params)
    cumulative_V = np.cumsum(probabilities_V)
    point = generator.random() * cumulative_V[-1]
    chosen = int(np.searchsorted(cumulative_V, point, side="right"))
    return min(chosen, int(np.flatnonzero(probabilities_V)[-1]))


def position_logprobs(logits_V: Floats, token_id: int, *, num_top: int, is_full: bool) -> PositionLogprobs:
    """Raw log-probabilities (nats, temperature 1) at one position."""
    logprobs_V = logits_V - logits_V.max()
    logprobs_V -= np.log(np.exp(logprobs_V).sum())
    order = np.argsort(-logprobs_V, kind="stable")[:num_top]
    return PositionLogprobs(
        chosen=TokenLogprob(token_id, float(logprobs_V[token_id])),
        top=tuple(TokenLogprob(int(i), float(logprobs_V[i])) for i in order),
        full=logprobs_V.tolist() if is_full else None,
    )


def _penalised(
    logits_V: Floats, prompt_ids: Sequence[int], new_ids: Sequence[int], params: SamplingParams
) -> Floats:
    for token_id, bias in params.logit_bias.items():
        logits_V[token_id] += bias
    if len(new_ids) < params.min_new_tokens and params.min_tokens_masks:
        logits_V[sorted(params.min_tokens_masks)] = -np.inf
    if params.repetition_penalty != 1:
        for token_id in {*prompt_ids, *new_ids}:
            is_positive = logits_V[token_id] > 0
            logits_V[token_id] *= 1 / params.repetition_penalty if is_positive else params.repetition_penalty
    for token_id, count in Counter(new_ids).items():
        logits_V[token_id] -= params.presence_penalty + params.frequency_penalty * count
    return logits_V


def _filtered(logits_V: Floats, params: SamplingParams) -> Floats:
    # The best logit is moved to 0 first: no temperature then overflows.
    with np.errstate(over="ignore"):
        logits_V = (logits_V - logits_V.max()) / params.temperature
    if 0 < params.top_k < len(logits_V):
        kth = np.sort(logits_V)[-params.top_k]
        logits_V = np.where(logits_V >= kth, logits_V, -np.inf)
    probabilities_V = np.exp(logits_V)
    probabilities_V /= probabilities_V.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities_V, kind="stable")
        before = np.cumsum(probabilities_V[order]) - probabilities_V[order]
        is_dropped = before > params.top_p
        is_dropped[0] = False
        probabilities_V[order[is_dropped]] = 0
    if params.min_p > 0:
        probabilities_V[probabilities_V < params.min_p * probabilities_V.max()] = 0
    return probabilities_V


BLOCK_TOKENS = 16
SCRIPT_LOGIT = 40.0  # far above the pseudo-random ones, which lie within about ten of zero

# What the fake answers: nothing in particular, one text, an answer chosen by what the prompt contains
# (the first key found in it; "" fits every prompt), or a function of the prompt's text.
Reply = str | Mapping[str, str] | Callable[[str], str] | None


def fake_embedding(prompt_ids: Sequence[int]) -> tuple[float, ...]:
    """How often the ids of each of 16 kinds are in the prompt: like prompts have like vectors."""
    counts = Counter(token_id % 16 for token_id in prompt_ids)
    return tuple(float(counts[kind]) for kind in range(16))


class FakeEngine:
    """Deterministic ``InferenceEngine``.

    ``reply`` None walks at random (seeded by ``model_seed``); a text is what every prompt is answered with;
    a mapping and a function choose the text by the prompt. The end-of-text id follows the reply.
    """

    def __init__(
        self,
        reply: Reply = None,
        *,
        name: str = "fake",
        context_length: int = 4096,
        delay_s: float = 0.0,
        max_running: int = 256,
        max_waiting: int = 1024,
        tokenizer: Tokenizer | None = None,
        prompt_format: ChatFormat | None = None,
        model_seed: int = 0,
        adds_bos: bool = False,
    ) -> None:
        self._reply = reply
        self._delay_s = delay_s
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._tokenizer = tokenizer or FakeTokenizer()
        self._prompt_format = prompt_format
        self._model_seed = model_seed
        self._info = ModelInfo(
            name=name,
            context_length=context_length,
            vocab_size=self._tokenizer.vocab_size,
            num_parameters=0,
            dtype="float64",
            device="cpu",
            eos_token_ids=() if self._tokenizer.eos_id is None else (self._tokenizer.eos_id,),
            adds_bos=adds_bos,
        )
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_running = 0
        self._num_running_tokens = 0
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._num_finished = 0
        self._failures: deque[tuple[Exception, int]] = deque()
        self._is_closed = False

    @classmethod
    def echo(cls, **settings: object) -> FakeEngine:
        """An engine that answers every prompt with the prompt's own text."""
        return cls(lambda prompt: prompt, **settings)  # type: ignore[arg-type]

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def prompt_format(self) -> ChatFormat | None:
        return self._prompt_format

    def fail_next(self, error: Exception, *, after_tokens: int = 0) -> None:
        """The next request raises ``error`` once it has given ``after_tokens`` tokens."""
        self._failures.append((error, after_tokens))

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._num_running,
            max_running=self._max_running,
            num_waiting=len(self._waiting),
            max_waiting=self._max_waiting,
            cache_blocks_used=-(-self._num_running_tokens // BLOCK_TOKENS),
            cache_blocks_total=self._max_running * self._info.context_length // BLOCK_TOKENS,
            prompt_tokens_total=self._num_prompt_tokens,
            prompt_tokens_reused_total=0,
            generated_tokens_total=self._num_new_tokens,
            requests_finished_total=self._num_finished,
            preemptions_total=0,
        )

    def close(self) -> None:
        self._is_closed = True  # those that wait get their turn, see it, and end with "abort" too

    async def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        self._check(prompt_ids, params)
        error, num_before_error = self._failures.popleft() if self._failures else (None, 0)
        await self._enter()
        held_tokens = len(prompt_ids)
        self._num_running_tokens += held_tokens
        self._num_prompt_tokens += len(prompt_ids)
        try:
            async for step in self._steps(list(prompt_ids), params, error, num_before_error):
                if step.token_id is not None:
                    held_tokens += 1
                    self._num_running_tokens += 1
                    self._num_new_tokens += 1
                yield step
            self._num_finished += 1
        finally:
            self._num_running_tokens -= held_tokens
            self._leave()

    async def _steps(
        self, prompt_ids: list[int], params: SamplingParams, error: Exception | None, num_before_error: int
    ) -> AsyncIterator[TokenStep]:
        """The tokens of one request that is running."""
        script = self._script(prompt_ids)
        seed = params.seed if params.seed is not None else random.SystemRandom().getrandbits(63)
        generator = random.Random(seed)
        prompt_logprobs = self._prompt_logprobs(prompt_ids, params)
        if params.max_new_tokens == 0:
            mean = fake_embedding(prompt_ids) if params.hidden_mean else None
            yield TokenStep(None, prompt_logprobs=prompt_logprobs, finish_reason="length", hidden_mean=mean)
            return
        new_ids: list[int] = []
        grammar = None if params.grammar is None else self._grammars.follow(params.grammar)
        stop = StopCheck(params, self._tokenizer, prompt_ids, grammar)
        while True:
            await asyncio.sleep(self._delay_s)
            if error is not None and len(new_ids) >= num_before_error:
                raise error
            if self._is_closed:
                yield TokenStep(None, finish_reason="abort")
                return
            logits_V = self._logits(prompt_ids, new_ids, script)
            token_id = draw(self._within(logits_V, grammar, params), prompt_ids, new_ids, params, generator)
            new_ids.append(token_id)
            end = stop.after(token_id, len(new_ids))
            yield TokenStep(
                token_id,
                logprobs=self._logprobs(logits_V, token_id, params.logprobs, params.full_logprobs),
                prompt_logprobs=prompt_logprobs if len(new_ids) == 1 else None,
                finish_reason=end.reason if end else None,
                stop_reason=end.matched if end else None,
            )
            if end is not None:
                return

    @functools.cached_property
    def _grammars(self) -> GrammarVocabulary:
        return GrammarVocabulary(self._tokenizer, self._info.vocab_size)

    def _within(self, logits_V: Floats, grammar: Follower | None, params: SamplingParams) -> Floats:
        """The logits of what the grammar allows; the filters come later here, they keep what is left."""
        if grammar is None:
            return logits_V
        allowed_V = grammar.allowed()
        if grammar.may_end:
            allowed_V[list(params.stop_token_ids)] = True
        return np.where(allowed_V, logits_V, -np.inf)

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise RequestError("the prompt has no tokens", hint="give at least one token")
        if params.adapter is not None:
            raise RequestError("the fake has no adapters")
        if params.grammar is not None:
            self._grammars.follow(params.grammar)
        vocab_size = self._info.vocab_size
        for token_id in (*prompt_ids, *params.logit_bias):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"token id {token_id} is outside the vocabulary; expected 0 to {vocab_size - 1}"
                )
        needed, context = len(prompt_ids) + params.max_new_tokens, self._info.context_length
        if needed > context:
            raise RequestError(
                f"{len(prompt_ids)} prompt tokens and {params.max_new_tokens} new tokens make {needed}; "
                f"the context length is {context}",
                hint="shorten the prompt or ask for fewer new tokens",
            )

    async def _enter(self) -> None:
        """Take a place among the running requests, or wait for one in order of arrival."""
        if self._num_running < self._max_running and not self._waiting:
            self._num_running += 1
            return
        if len(self._waiting) >= self._max_waiting:
            raise EngineBusyError(
                f"{self._num_running} requests run and {len(self._waiting)} wait; the queue is full",
                retry_after_s=1.0,
            )
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave()  # the place was granted in the moment of the cancellation
            else:
                self._waiting.remove(place)
            raise

    def _leave(self) -> None:
        """Hand the place to the request that waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._num_running -= 1

    def _script(self, prompt_ids: list[int]) -> list[int] | None:
        if self._reply is None:
            return None
        prompt = self._tokenizer.decode(prompt_ids)
        if isinstance(self._reply, str):
            reply = self._reply
        elif isinstance(self._reply, Mapping):
            reply = next((text for key, text in self._reply.items() if key in prompt), "")
        else:
            reply = self._reply(prompt)
        return self._tokenizer.encode(reply)

    def _logits(self, prompt_ids: list[int], new_ids: list[int], script: list[int] | None) -> Floats:
        last_two = [*prompt_ids[-2:], *new_ids[-2:]][-2:]
        logits_V = self._walk_logits(last_two)
        if script is not None:
            position = len(new_ids)
            following = script[position] if position < len(script) else self._tokenizer.eos_id
            if following is not None:
                logits_V[following] = SCRIPT_LOGIT
        return logits_V

    def _walk_logits(self, last_two: list[int]) -> Floats:
        key = ",".join(map(str, [self._model_seed, *last_two])).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return 2 * np.random.Generator(np.random.PCG64(seed)).standard_normal(self._info.vocab_size)

    def _prompt_logprobs(
        self, prompt_ids: list[int], params: SamplingParams
    ) -> tuple[PositionLogprobs, ...] | None:
        if params.prompt_logprobs is None:
            return None
        positions = []
        for end in range(1 + params.prompt_logprobs_from, len(prompt_ids)):
            logits_V = self._walk_logits(prompt_ids[max(0, end - 2) : end])
            positions.append(
                position_logprobs(
                    logits_V, prompt_ids[end], num_top=params.prompt_logprobs, is_full=params.full_logprobs
                )
            )
        return tuple(positions)

    def _logprobs(
        self, logits_V: Floats, token_id: int, num_top: int | None, is_full: bool
    ) -> PositionLogprobs | None:
        if num_top is None:
            return None
        return position_logprobs(logits_V, token_id, num_top=num_top, is_full=is_full)
