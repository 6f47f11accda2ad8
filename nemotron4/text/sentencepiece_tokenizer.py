"""SentencePiece models: ``.model`` files, and models rebuilt from GGUF metadata."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from nemotron4.errors import TokenizerError
from nemotron4.text.sentencepiece_proto import (
    user_defined_ids,
    with_pieces_as_control,
    without_dummy_prefix,
)
from nemotron4.text.streaming import decode_ids
from nemotron4.text.tokenizer import check_encodable

WORD_MARK = "▁"


class SentencePieceTokenizer:
    """A SentencePiece model with NeMo's non-legacy meaning: one call of the library on the whole text.

    User-defined symbols (``<extra_id_1>``) are markers, and stay in the text when decoded. Control pieces
    (``<s>``, ``</s>``) are never found in a text and decode to ''.
    """

    def __init__(self, model: bytes, *, source: str, bos_id: int | None = None, eos_id: int | None = None):
        self._processor = _processor(model, source)
        self._model = model
        self._source = source
        self._bos_id = _valid(self._processor.bos_id()) if bos_id is None else bos_id
        self._eos_id = _valid(self._processor.eos_id()) if eos_id is None else eos_id
        self._unknown_text: bytes = self._processor.decode([self._processor.unk_id()]).encode()
        mark = self._processor.piece_to_id(WORD_MARK)
        self._drops_first_mark = self._processor.decode([mark]) == ""
        self._variants = {(True, False): self._processor}

    @classmethod
    def read(cls, path: Path) -> SentencePieceTokenizer:
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(model, source=str(path))

    @property
    def model(self) -> bytes:
        """The model as ``tokenizer.model`` holds it, for writing one."""
        return self._model

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @functools.cached_property
    def markers(self) -> tuple[str, ...]:
        return tuple(self.piece(token_id) for token_id in self._marker_ids)

    @property
    def replaces_each_byte(self) -> bool:
        return True

    def encode(self, text: str, *, parse_special: bool = True, continues: bool = False) -> list[int]:
        check_encodable(text)
        ids: list[int] = self._variant(parse_special, continues).encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        piece, processor = self.piece(token_id), self._processor
        if processor.is_control(token_id):
            return b""
        if processor.is_unknown(token_id):
            return self._unknown_text
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if is_first and self._drops_first_mark:
            piece = piece.removeprefix(WORD_MARK)
        return piece.replace(WORD_MARK, " ").encode()

    def piece(self, token_id: int) -> str:
        try:
            return str(self._processor.id_to_piece(token_id))
        except IndexError as error:
            raise TokenizerError(
                f"{self._source}: no piece has id {token_id}; ids are below {self.vocab_size}"
            ) from error

    def token_id(self, piece: str) -> int | None:
        token_id = int(self._processor.piece_to_id(piece))
        # The library answers the unknown id for every text that is no piece.
        return token_id if self.piece(token_id) == piece else None

    def is_control(self, token_id: int) -> bool:
        return bool(self._processor.is_control(token_id))

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(
            SentencePieceTokenizer, source=self._source, bos_id=self._bos_id, eos_id=self._eos_id
        )
        return make, (self._model,)

    @functools.cached_property
    def _marker_ids(self) -> tuple[int, ...]:
        """User-defined symbols, except those that only group spaces, line breaks or digits."""
        return tuple(i for i in user_defined_ids(self._model) if is_marker(self.piece(i)))

    def _variant(self, parse_special: bool, continues: bool) -> Any:
        """The processor that finds markers or not, puts a word mark first or not; made when first used."""
        key = (parse_special, continues)
        if key not in self._variants:
            model = (
                self._model if parse_special else with_pieces_as_control(self._model, set(self._marker_ids))
            )
            self._variants[key] = _processor(
                without_dummy_prefix(model) if continues else model, self._source
            )
        return self._variants[key]


def is_marker(symbol: str) -> bool:
    """False for user-defined symbols that are ordinary text: runs of spaces, line breaks or digits."""
    visible = symbol.replace(WORD_MARK, "").strip()
    return bool(visible) and not visible.isdigit()


def _processor(model: bytes, source: str) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{source}: not a SentencePiece model: {error}",
            hint="a release keeps it beside the weights as a file that ends in .model",
        ) from error


def _valid(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
