"""Text to token ids and back: the interface every tokenizer of a checkpoint is read into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of the text; no BOS or EOS is added.

        With ``parse_special`` a literal marker in the text (``<extra_id_1>``, ``<|im_end|>``) becomes the
        marker's id; without, it becomes ordinary tokens that merely spell it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Control pieces give '', invalid bytes U+FFFD."""
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
