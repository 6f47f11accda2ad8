"""The few fields of SentencePiece's ModelProto that are read or written here, in protobuf's wire format.

Field numbers: sentencepiece_model.proto of the SentencePiece project. Written by hand so that the
protobuf runtime, whose versions conflict easily, is not needed.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

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
