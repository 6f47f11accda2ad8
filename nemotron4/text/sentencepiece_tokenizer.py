"""SentencePiece models: ``.model`` files, models rebuilt from GGUF metadata, and their fields on disk.

The few fields of ModelProto that are read or written here are parsed by hand (field numbers:
sentencepiece_model.proto): the protobuf runtime, whose versions conflict easily, is not needed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from nemotron4.errors import TokenizerError
from nemotron4.text.tokenizer import check_encodable, decode_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # fields of TrainerSpec
_UNIGRAM, _BPE = 1, 2
_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 1, 3, 4, 5  # of NormalizerSpec


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its place in the list."""

    text: str
    score: float
    type: int


def build_bpe(pieces: Sequence[Piece], *, add_dummy_prefix: bool) -> bytes:
    """A BPE model with the identity normaliser, which keeps every space."""
    has_bytes = any(piece.type == BYTE for piece in pieces)
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, has_bytes)
    normalizer = (
        _field(_NAME, b"identity")
        + _number(_ADD_DUMMY_PREFIX, add_dummy_prefix)
        + _number(_REMOVE_EXTRA_WHITESPACES, False)
        + _number(_ESCAPE_WHITESPACES, True)
    )
    entries = [_field(_PIECES, _piece(piece)) for piece in pieces]
    return b"".join([*entries, _field(_TRAINER, trainer), _field(_NORMALIZER, normalizer)])


def with_pieces_as_control(model: bytes, ids: Collection[int]) -> bytes:
    """The model with some pieces made CONTROL: text never becomes them any more."""
    as_control = _number(_PIECE_TYPE, CONTROL)
    parts: list[bytes] = []
    index = 0
    for number, whole, value in _fields(model):
        if number == _PIECES:
            # The last value of a repeated scalar field counts, so the new type goes behind the old one.
            whole = _field(_PIECES, value + as_control) if index in ids else whole
            index += 1
        parts.append(whole)
    return b"".join(parts)


def user_defined_ids(model: bytes) -> list[int]:
    """Ids of the pieces of type USER_DEFINED."""
    pieces = (value for number, _, value in _fields(model) if number == _PIECES)
    type_field = _number(_PIECE_TYPE, USER_DEFINED)
    # The search for two bytes spares the parsing of nearly all of 256,000 pieces.
    candidates = ((i, value) for i, value in enumerate(pieces) if type_field in value)
    return [i for i, value in candidates if (_PIECE_TYPE, type_field) in [f[:2] for f in _fields(value)]]


def without_dummy_prefix(model: bytes) -> bytes:
    """The model with a normaliser that puts no word mark before the text."""
    # A second occurrence of a message field is merged into the first.
    return model + _field(_NORMALIZER, _number(_ADD_DUMMY_PREFIX, False))


def _piece(piece: Piece) -> bytes:
    score = _key(_PIECE_SCORE, _FIXED32) + struct.pack("<f", piece.score)
    return _field(_PIECE_TEXT, piece.text.encode()) + score + _number(_PIECE_TYPE, piece.type)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(int(value))


def _field(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """(field number, whole field, value) of a message that the library has already accepted."""
    fields: list[tuple[int, bytes, bytes]] = []
    at = 0
    while at < len(data):
        key, value_at = _read_varint(data, at)
        wire_type = key & 7
        if wire_type == _BYTES:
            length, value_at = _read_varint(data, value_at)
            end = value_at + length
        elif wire_type == _VARINT:
            end = _read_varint(data, value_at)[1]
        else:
            end = value_at + (8 if wire_type == _FIXED64 else 4)
        fields.append((key >> 3, data[at:end], data[value_at:end]))
        at = end
    return fields


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

    @property
    def decodes_each_token(self) -> bool:
        return True

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = True,
        continues: bool = False,
        after: str = "",
        before: str = "",
    ) -> list[int]:
        check_encodable(text)
        if after and (marker := self.token_id(after)) is not None:
            # Text after <s> is a new text, as if nothing were before it; after <extra_id_1> it goes on.
            continues = not self.is_control(marker)
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
            hint="a release keeps it next to the weights as a file that ends in .model",
        ) from error


def _valid(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
