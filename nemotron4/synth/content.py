"""How rows and replies are packed for the ledger: JSON, deflated, and where it pays against their sources.

A row repeats most of what it was made from: an answered prompt holds prompt and replies, a judged pair
holds them again. Deflate with those sources as its dictionary stores the repetition as a few references.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from nemotron4.errors import DataError

KEY_BYTES = 16
_WINDOW = 32_768  # what deflate can look back at
_WORTH_IT = 400  # bytes of JSON; shorter rows stay readable without their parent
_PLAIN, _DEFLATED, _DERIVED = b"j", b"z", b"d"


def pack(text: bytes) -> bytes:
    """JSON, deflated when that makes it shorter; the first byte tells which."""
    if len(text) > 160:
        packed = zlib.compress(text, 1)
        if len(packed) < len(text):
            return _DEFLATED + packed
    return _PLAIN + text


def pack_derived(text: bytes, parent: bytes, replies: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The same against the parent's content and the (key, content) of the replies that went into it."""
    if len(text) < _WORTH_IT or len(replies) > 255:
        return pack(text)
    deflater = zlib.compressobj(1, zdict=_basis(parent, [content for _, content in replies]))
    packed = deflater.compress(text) + deflater.flush()
    head = _DERIVED + bytes([len(replies)]) + b"".join(key for key, _ in replies)
    # What shares little with its sources is stored so that it can be read without them.
    return head + packed if len(head) + len(packed) < len(text) // 4 else pack(text)


def unpack(blob: bytes, parent: Callable[[], bytes], reply: Callable[[bytes], bytes]) -> bytes:
    """The JSON. ``parent`` and ``reply`` (by key) give the sources, and are asked only where needed."""
    form = blob[:1]
    if form == _PLAIN:
        return blob[1:]
    try:
        if form == _DEFLATED:
            return zlib.decompress(blob[1:])
        start = 2 + KEY_BYTES * blob[1]
        keys = [blob[at : at + KEY_BYTES] for at in range(2, start, KEY_BYTES)]
        inflater = zlib.decompressobj(zdict=_basis(parent(), [reply(key) for key in keys]))
        return inflater.decompress(blob[start:]) + inflater.flush()
    except zlib.error as error:
        raise DataError(f"the ledger is damaged: a row does not fit its sources: {error}") from error


def unpack_alone(blob: bytes) -> bytes:
    """The JSON of something that was packed without sources."""

    def missing(*_: object) -> bytes:
        raise DataError("the ledger holds a reply that was packed like a row")

    return unpack(blob, missing, missing)


def _basis(parent: bytes, replies: Sequence[bytes]) -> bytes:
    return b"".join((parent, *replies))[-_WINDOW:]
