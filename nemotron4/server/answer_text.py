"""The text of one answer as its tokens come: no half character, no stop string, not even its start."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron4.inference.interface import TokenStep
from nemotron4.text.tokenizer import TextStream, Tokenizer


class AnswerText:
    """Grows by ``push``, which returns what may be sent now; ``text`` is all that was sent.

    ``strip_newline``: the model's turns end with a newline that belongs to the format, so one at the end of
    an answer that stopped by itself is not part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop_strings: Sequence[str],
        *,
        strip_newline: bool = False,
    ) -> None:
        self._stream = TextStream(tokenizer, prompt_ids)
        self._withheld = tuple(stop for stop in stop_strings if stop)
        self._stop_strings = tuple(stop_strings)
        self._strip_newline = strip_newline
        self._raw = ""
        self._num_sent = 0
        self.starts: list[int] = []  # where the text of each token begins
        self.is_whole = False

    @property
    def text(self) -> str:
        return self._raw[: self._num_sent]

    def push(self, step: TokenStep) -> str:
        if step.token_id is not None:
            self.starts.append(len(self._raw))
            # A stop token ends the answer and is no part of it.
            if step.stop_reason is None or isinstance(step.stop_reason, str):
                self._raw += self._stream.push(step.token_id)
        if step.finish_reason is None:
            return self._send(len(self._raw) - self._num_undecided())
        self._raw += self._stream.finish()
        self.is_whole = True
        return self._send(self._end(step))

    def _end(self, step: TokenStep) -> int:
        """Where the answer ends in the raw text, now that no token follows."""
        end = len(self._raw)
        if step.finish_reason != "stop":
            return end
        if isinstance(step.stop_reason, str):
            found = [self._raw.find(stop, self._num_sent) for stop in self._stop_strings]
            end = min((at for at in found if at >= 0), default=end)
        if self._strip_newline and self._raw.endswith("\n", self._num_sent, end):
            end -= 1
        return end

    def _num_undecided(self) -> int:
        """Length of the end of the text that may turn out to be the start of a stop string."""
        longest = max(map(len, self._withheld), default=1) - 1
        for length in range(min(longest, len(self._raw) - self._num_sent), 0, -1):
            ending = self._raw[-length:]
            if any(stop.startswith(ending) for stop in self._withheld):
                newline = self._strip_newline and self._raw.endswith("\n", 0, len(self._raw) - length)
                return length + newline
        return 1 if self._strip_newline and self._raw.endswith("\n") else 0

    def _send(self, end: int) -> str:
        end = max(end, self._num_sent)
        sent = self._raw[self._num_sent : end]
        self._num_sent = end
        return sent
