"""What is checked of every tokenizer that a checkpoint is read into, and ids to text one at a time."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence

from nemotron4.engine import Tokenizer as Tokenizer
from nemotron4.errors import TokenizerError


def check_encodable(text: str) -> None:
    """TokenizerError if the text is not valid Unicode: half of a surrogate pair has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, "
            "one half of a surrogate pair; expected valid Unicode",
            hint="send the whole character, or U+FFFD in its place",
        ) from error


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Changes with anything that changes the ids."""
    return hashlib.sha256(pickle.dumps(tokenizer)).hexdigest()


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """TokenizerError that names the first difference unless ``decode(encode(text)) == text``."""
    decoded = tokenizer.decode(tokenizer.encode(text))
    if decoded == text:
        return
    pairs = zip(text, decoded, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(decoded)))
    raise TokenizerError(
        f"decode(encode(text)) differs from the text at character {at}: "
        f"expected {text[at : at + 24]!r}, got {decoded[at : at + 24]!r}",
        hint="clients cut the prompt off a reply by its length; use the release's own tokenizer file "
        "(a tokenizer.json goes before a tokenizer.model)",
    )


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing row of tokens.

    All results of ``push`` and the one of ``finish``, joined, equal ``tokenizer.decode`` of all ids. Work
    per token is proportional to the token's own bytes. ``prompt_ids`` are before the first pushed token:
    they give no text here, and the first new token then keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._is_first = not any(tokenizer.token_bytes(token_id) for token_id in prompt_ids)
        self._waiting = b""
        # What a decoder that looks at neighbours has read: prompt and all, decoded again at each token.
        self._ids = None if tokenizer.decodes_each_token else list(prompt_ids)
        self._given = len(self._text_so_far())

    def _text_so_far(self) -> str:
        return self._tokenizer.decode(self._ids) if self._ids else ""

    def push(self, token_id: int) -> str:
        """The characters that this token completes; '' while a multi-byte character is unfinished."""
        if self._ids is not None:
            self._ids.append(token_id)
            text = self._text_so_far().rstrip(REPLACEMENT)[self._given :]
            self._given += len(text)
            return text
        added = self._tokenizer.token_bytes(token_id, is_first=self._is_first)
        if self._is_first and (added or self._tokenizer.token_bytes(token_id)):
            self._is_first = False
        if not added:
            # A control piece inside a character ends it, as in SentencePiece.
            return self.finish() if self._tokenizer.is_control(token_id) else ""
        if not self._waiting:
            try:
                return added.decode()
            except UnicodeDecodeError:
                pass
        text, self._waiting = self._decode(self._waiting + added)
        return text

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else ''."""
        if self._ids is not None:
            return self._text_so_far()[self._given :]
        broken, self._waiting = self._waiting, b""
        return self._replacement(len(broken)) if broken else ""

    def _decode(self, data: bytes) -> tuple[str, bytes]:
        """Text of the bytes, and the unfinished character at their end."""
        done: list[str] = []
        while data:
            try:
                done.append(data.decode())
                break
            except UnicodeDecodeError as error:
                done.append(data[: error.start].decode())
                if error.reason == "unexpected end of data":
                    return "".join(done), data[error.start :]
                done.append(self._replacement(error.end - error.start))
                data = data[error.end :]
        return "".join(done), b""

    def _replacement(self, num_bytes: int) -> str:
        return REPLACEMENT * (num_bytes if self._tokenizer.replaces_each_byte else 1)


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a whole row of ids: what every tokenizer's ``decode`` returns."""
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, ids), stream.finish()])
