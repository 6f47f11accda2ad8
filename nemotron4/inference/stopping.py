"""When a request ends: stop tokens, stop strings, a grammar that nothing can follow, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.engine import FinishReason, SamplingParams, Tokenizer
from nemotron4.text.structured_output import Follower
from nemotron4.text.tokenizer import TextStream


@dataclass(frozen=True)
class Stop:
    reason: FinishReason
    matched: int | str | None = None  # the stop token or the stop string


class StopCheck:
    """Follows one request's new tokens and says when it ends; decodes text only to find stop strings."""

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        grammar: Follower | None = None,
    ) -> None:
        self._params = params
        self._grammar = grammar
        self._longest = max((len(s) for s in params.stop_strings), default=0)
        self._stream = TextStream(tokenizer, prompt_ids) if params.stop_strings else None
        self._tail = ""
        if params.stop_strings and params.stop_scope == "row_suffix":
            # A stop string may begin in the prompt.
            self._tail = tokenizer.decode(prompt_ids)[-self._longest :]

    def after(self, token_id: int, num_new: int) -> Stop | None:
        """The stop that the newest token causes, if any."""
        if token_id in self._params.stop_token_ids:
            return Stop("stop", token_id)
        if self._stream is not None:
            matched = self._match(self._stream.push(token_id))
            # NeMo's end strings do not wait for the minimum, only its end of text does.
            is_early = self._params.stop_scope == "new_text" and num_new < self._params.min_new_tokens
            if matched is not None and not is_early:
                return Stop("stop", matched)
        if self._grammar is not None:
            self._grammar.consume(token_id)
            if self._grammar.is_complete:
                return Stop("stop")
        return Stop("length") if num_new >= self._params.max_new_tokens else None

    def _match(self, piece: str) -> str | None:
        if self._params.stop_scope == "row_suffix":
            self._tail = (self._tail + piece)[-max(self._longest, 1) :]
            return next((s for s in self._params.stop_strings if self._tail.endswith(s)), None)
        window = self._tail + piece
        self._tail = window[max(0, len(window) - self._longest + 1) :]
        found = [(window.find(s), s) for s in self._params.stop_strings if s in window]
        return min(found)[1] if found else None
