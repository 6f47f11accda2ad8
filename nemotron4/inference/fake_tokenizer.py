"""A small byte-level tokenizer that ships for tests: a Nemotron vocabulary in a few hundred ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemotron4.text.tokenizer import check_encodable, decode_ids

UNKNOWN, PAD, BOS, EOS = 0, 1, 2, 3
NUM_MARKERS = 8
FIRST_MARKER = 4  # <extra_id_0> is 4 and <extra_id_1> is 5, as in Nemotron-4
FIRST_BYTE = FIRST_MARKER + NUM_MARKERS
FIRST_WORD = FIRST_BYTE + 256
CONTROL_PIECES = ("<unk>", "<pad>", "<s>", "</s>")
MARKERS = tuple(f"<extra_id_{n}>" for n in range(NUM_MARKERS))
# Pieces of several characters, so that tests meet stop strings that end inside a token.
WORDS = (" the", " and", "ing", " hello", " world", "ne!")


class FakeTokenizer:
    """One id per byte, some markers and a few words, which are taken greedily from the left.

    Every text is encoded without loss; ids cut inside a multi-byte character decode to U+FFFD.
    """

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self._words = sorted(words, key=len, reverse=True)
        byte_pieces = [_byte_piece(byte) for byte in range(256)]
        word_pieces = [word.replace(" ", "▁") for word in self._words]
        self._pieces = [*CONTROL_PIECES, *MARKERS, *byte_pieces, *word_pieces]
        self._ids = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        self._text_ids = {text: FIRST_WORD + i for i, text in enumerate(self._words)}
        self._text_ids |= {marker: FIRST_MARKER + n for n, marker in enumerate(MARKERS)}
        self._pattern = _splitter([*MARKERS, *self._words])
        self._plain_pattern = _splitter(self._words)
        self._bytes = [b""] * FIRST_MARKER
        self._bytes += [marker.encode() for marker in MARKERS]
        self._bytes += [bytes([byte]) for byte in range(256)]
        self._bytes += [word.encode() for word in self._words]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def bos_id(self) -> int | None:
        return BOS

    @property
    def eos_id(self) -> int | None:
        return EOS

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS

    @property
    def replaces_each_byte(self) -> bool:
        return False

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
        ids: list[int] = []
        for part in (self._pattern if parse_special else self._plain_pattern).split(text):
            token_id = self._text_ids.get(part)
            if token_id is not None and (parse_special or part not in MARKERS):
                ids.append(token_id)
            else:
                ids += [FIRST_BYTE + byte for byte in part.encode("utf-8")]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        return self._bytes[token_id]

    def piece(self, token_id: int) -> str:
        return self._pieces[token_id]

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def is_control(self, token_id: int) -> bool:
        return token_id < FIRST_MARKER


def _splitter(texts: Sequence[str]) -> re.Pattern[str]:
    """Cuts a text so that every one of these texts is a part of its own."""
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")")


def _byte_piece(byte: int) -> str:
    if byte == 0x20:
        return "▁"
    return chr(byte) if 0x21 <= byte <= 0x7E else f"<0x{byte:02X}>"
