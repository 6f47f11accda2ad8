"""One request on its way through the engine: its tokens, its random numbers, its end."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotron4.engine import ModelInfo, PositionLogprobs, SamplingParams, Tokenizer, TokenStep
from nemotron4.errors import RequestError
from nemotron4.inference import sampling
from nemotron4.inference.lookup import Lookup
from nemotron4.inference.runner import Array
from nemotron4.inference.scheduler import Sequence as ScheduledSequence
from nemotron4.inference.scheduler import Slice
from nemotron4.text.answers import StopCheck
from nemotron4.text.structured_output import Follower

if TYPE_CHECKING:
    from nemotron4.inference.adapters import LoadedAdapter

Deliver = Callable[[TokenStep | Exception], None]

# Rows of logits turned into log-probabilities at once: bounds memory for wide vocabularies.
LOGPROB_ROWS = 64


def check_request(info: ModelInfo, prompt_ids: Sequence[int], params: SamplingParams) -> None:
    """Raise RequestError for what this model can never answer."""
    num_prompt, limit = len(prompt_ids), info.context_length
    if num_prompt == 0:
        raise RequestError("the prompt is empty", hint="give at least one token")
    outside = next((i for i in prompt_ids if not 0 <= i < info.vocab_size), None)
    if outside is not None:
        raise RequestError(
            f"token id {outside} is outside the vocabulary of {info.vocab_size}",
            hint=f"use ids from 0 to {info.vocab_size - 1}",
        )
    total = num_prompt + params.max_new_tokens
    if total > limit:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and {params.max_new_tokens} new ones are asked for: "
            f"{total} is above the context length of {limit}",
            hint=f"ask for at most {limit - num_prompt} new tokens"
            if num_prompt < limit
            else "shorten the prompt",
        )
    biased = next((i for i in params.logit_bias if not 0 <= i < info.vocab_size), None)
    if biased is not None:
        raise RequestError(f"logit_bias names token id {biased}, outside the vocabulary")


class Request:
    """Draws this request's tokens; everything it needs besides logits is its own, never the batch's."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        deliver: Deliver,
        *,
        vocab_size: int,
        num_guesses: int = 0,
        virtual_ids: tuple[int, ...] = (),
        grammar: Follower | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        """``vocab_size``: ids from there on have rows in the logits and no piece; they are never drawn.

        ``num_guesses``: most tokens guessed at once; none under a grammar, whose mask is for one position.
        """
        self.num_cached = 0  # positions found in the cache so far
        self._grammar = grammar
        self._allowed_V: Array | None = None  # by the grammar, for the next token
        self._forced: deque[int] = deque()  # tokens that the grammar leaves no choice about
        self._vocab_size = vocab_size
        self.params = params
        self.deliver = deliver
        self.prompt_ids = tuple(prompt_ids)
        self.sequence = ScheduledSequence(
            (*virtual_ids, *prompt_ids),
            max_shared=self._max_shared(len(virtual_ids)),
            adapter=adapter,
            salt=adapter.salt if adapter else b"",
            lookup=Lookup(params.max_new_tokens, most=num_guesses)
            if num_guesses and grammar is None
            else None,
        )
        self._num_virtual = len(virtual_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._points = sampling.Points(seed)
        self._stop = StopCheck(params, tokenizer, prompt_ids, grammar)
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._hidden_sum_D: Array | None = None

    def _max_shared(self, num_virtual: int) -> int | None:
        if self.params.hidden_mean:
            return 0
        is_scored = self.params.prompt_logprobs is not None
        return num_virtual + self.params.prompt_logprobs_from if is_scored else None

    @property
    def needs_prompt_logits(self) -> bool:
        num_wanted = len(self.prompt_ids) - 1 - self.params.prompt_logprobs_from
        return self.params.prompt_logprobs is not None and len(self._prompt_logprobs) < num_wanted

    @property
    def draws_plainly(self) -> bool:
        """True if the next token is drawn from the logits as they are, or what a grammar leaves of them."""
        return (
            self.params.max_new_tokens > 0
            and not self._forced
            and (self._grammar is None or self._allowed_V is not None)
            and not sampling.changes_logits(self.params, len(self.sequence.new_ids))
        )

    @property
    def num_plain_draws(self) -> int:
        """How many tokens, from the next one on, need nothing but their logits. Without a grammar."""
        is_plain = self._grammar is None and self.draws_plainly
        return self.params.max_new_tokens - len(self.sequence.new_ids) if is_plain else 0

    def next_draws(self, count: int) -> list[tuple[SamplingParams, float]]:
        """How and at which points: what of them is not drawn in the end was behind the end of the answer."""
        return [(self.params, self._next_point()) for _ in range(count)]

    def _next_point(self) -> float:
        return self._points.next() if self.params.temperature > 0 else 0.0

    def next_draw(self, logits_V: Array) -> tuple[Array, SamplingParams, float]:
        """What ``sampling.draw_rows`` takes; uses up one random number unless the temperature is 0."""
        return self._masked(logits_V[: self._vocab_size]), self.params, self._next_point()

    @property
    def needs_mask(self) -> bool:
        return self._grammar is not None and not self._forced and self.params.max_new_tokens > 0

    def compute_mask(self) -> None:
        """Which tokens the grammar allows next; called while the model runs, it takes as long as it takes."""
        assert self._grammar is not None
        allowed_V = np.array(self._grammar.allowed())
        if self._grammar.may_end:
            allowed_V[list(self.params.stop_token_ids)] = True
        self._allowed_V = allowed_V

    def observe_prompt(self, start: int, logits_of: Callable[[int, int], Array], end: int) -> None:
        """Score prompt tokens start+1 .. end with the logits of start .. end-1, where they are wanted.

        ``logits_of(i, j)`` gives rows i to j of the slice that began at ``start``, (j - i, V).
        """
        ids = self.sequence.prompt_ids
        wanted = self._num_virtual + self.params.prompt_logprobs_from
        first = wanted + len(self._prompt_logprobs)  # after a pre-emption positions come again
        last = min(end, len(ids) - 1)
        assert self.params.prompt_logprobs is not None
        for i in range(max(first, start), last, LOGPROB_ROWS):
            j = min(i + LOGPROB_ROWS, last)
            self._prompt_logprobs += sampling.logprobs(
                logits_of(i - start, j - start),
                ids[i + 1 : j + 1],
                vocab_size=self._vocab_size,
                num_top=self.params.prompt_logprobs,
                is_full=self.params.full_logprobs,
            )

    def observe_hidden(self, start: int, hidden_SD: Array) -> None:
        """Add up the hidden states of positions ``start`` and on of the prompt."""
        if start == 0:  # also after a pre-emption, when all positions come again
            self._hidden_sum_D = np.zeros(hidden_SD.shape[1])
        assert self._hidden_sum_D is not None, "nothing of the prompt is shared, so it begins at 0"
        self._hidden_sum_D += hidden_SD[max(0, self._num_virtual - start) :].sum(0, dtype=np.float64)

    def advance(self, logits_V: Array, drawn: int | None) -> list[TokenStep]:
        """Take the next token, drawn from the logits of the last position unless ``drawn`` is it.

        The last step says whether it is the end.

        Tokens that a grammar forces follow at once, without a step of the model; one at a time where their
        log-probabilities are wanted.
        """
        params, sequence = self.params, self.sequence
        prompt_logprobs = None
        if params.prompt_logprobs is not None and not sequence.new_ids:
            prompt_logprobs = tuple(self._prompt_logprobs)
        if params.max_new_tokens == 0:
            return [self._nothing_new(prompt_logprobs)]
        if self._forced:
            token_id = self._forced.popleft()
        else:
            token_id = self._draw(logits_V[: self._vocab_size]) if drawn is None else drawn
        scored = None
        is_scored = params.logprobs is not None or params.full_logprobs
        if is_scored:
            [scored] = sampling.logprobs(
                logits_V[None],
                [token_id],
                vocab_size=self._vocab_size,
                num_top=params.logprobs or 0,
                is_full=params.full_logprobs,
            )
        steps = [self._take(token_id, scored, prompt_logprobs)]
        if self._grammar is not None and steps[-1].finish_reason is None and not self._forced:
            self._forced.extend(self._grammar.forced())
        while self._forced and not is_scored and steps[-1].finish_reason is None:
            steps.append(self._take(self._forced.popleft(), None, None))
        return steps

    def _nothing_new(self, prompt_logprobs: tuple[PositionLogprobs, ...] | None) -> TokenStep:
        """The only step of a request for what the model makes of its prompt."""
        mean = None
        if self._hidden_sum_D is not None:
            mean = tuple((self._hidden_sum_D / len(self.prompt_ids)).tolist())
        return TokenStep(None, prompt_logprobs=prompt_logprobs, finish_reason="length", hidden_mean=mean)

    def _take(
        self,
        token_id: int,
        scored: PositionLogprobs | None,
        prompt_logprobs: tuple[PositionLogprobs, ...] | None,
    ) -> TokenStep:
        """Add a token to the row, and see whether it is the last."""
        is_first = not self.sequence.new_ids
        self.sequence.new_ids.append(token_id)
        stop = self._stop.after(token_id, len(self.sequence.new_ids))
        return TokenStep(
            token_id,
            scored,
            prompt_logprobs,
            finish_reason=stop.reason if stop else None,
            stop_reason=stop.matched if stop else None,
            num_cached=self.num_cached if is_first else 0,
        )

    def _draw(self, logits_V: Array) -> int:
        params, sequence = self.params, self.sequence
        if sampling.changes_logits(params, len(sequence.new_ids)):
            logits_V = sampling.adjust(logits_V, params, prompt_ids=self.prompt_ids, new_ids=sequence.new_ids)
        return sampling.draw(self._masked(logits_V), params, self._points)

    def _masked(self, logits_V: Array) -> Array:
        if self._grammar is None:
            return logits_V
        assert self._allowed_V is not None, "the mask is computed while the model runs"
        return sampling.masked(logits_V, self._allowed_V)


@dataclass
class Turn:
    """One request's part of a step, and how many of its guesses were right so far."""

    request: Request
    planned: Slice
    results: list[Array]  # logits of the last known token and of each guess
    num_right: int = 0
    drawn: tuple[int, ...] = ()  # from all of the results, if the runner did


def drawn_together(turns: Sequence[Turn], *, handle: int | None) -> list[int | None]:
    """The next token of each that needs nothing but its logits; else None."""
    tokens: list[int | None] = [turn.drawn[turn.num_right] if turn.drawn else None for turn in turns]
    plain = [i for i, turn in enumerate(turns) if not turn.drawn and turn.request.draws_plainly]
    if plain:
        draws = [turns[i].request.next_draw(turns[i].results[turns[i].num_right]) for i in plain]
        for i, token_id in zip(plain, sampling.draw_rows(draws, handle=handle), strict=True):
            tokens[i] = token_id
    return tokens
