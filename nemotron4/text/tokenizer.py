"""Text to token ids and back: the interface every tokenizer of a checkpoint is read into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nemotron4.errors import TokenizerError


class Tokenizer(Protocol):
    """One vocabulary. ``decode(encode(text)) == text`` is checked when a checkpoint is opened."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a piece; a model's output may be wider (padding rows)."""
        ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that ``parse_special`` turns into one id: ``<extra_id_1>``, ``<|im_end|>``, ..."""
        ...

    @property
    def replaces_each_byte(self) -> bool:
        """True: every invalid byte decodes to one U+FFFD (SentencePiece); False: every broken character."""
        ...

    def encode(self, text: str, *, parse_special: bool = True, continues: bool = False) -> list[int]:
        """Ids of the text; no BOS or EOS is added.

        With ``parse_special`` a literal marker in the text becomes the marker's id; without, it becomes
        ordinary tokens that merely spell it. With ``continues`` the text follows other text, so that
        SentencePiece puts no word mark before it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Control pieces give '', invalid bytes U+FFFD."""
        ...

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """What the token adds to the text, in UTF-8; a token may hold part of a character.

        With ``is_first`` no text stands before it: SentencePiece drops the word mark there.
        """
        ...

    def piece(self, token_id: int) -> str:
        """The raw vocabulary entry, for display: ``▁hello``, ``<0x0A>``, ``</s>``."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of a raw vocabulary entry, or None."""
        ...

    def is_control(self, token_id: int) -> bool:
        """True for pieces that decode to nothing (``<s>``, ``</s>``, ``<pad>``)."""
        ...


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
