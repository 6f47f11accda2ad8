"""Where a text ends and a turn ends: what the files declare, plus what the model family is known to need."""

from __future__ import annotations

from collections.abc import Iterable

from nemotron4.errors import CheckpointError
from nemotron4.text.tokenizer import Tokenizer

# A Nemotron chat model ends a turn with <extra_id_1>, although its configuration declares </s> only.
NEMOTRON_ENDS = ("</s>", "<extra_id_1>")
TEMPLATE_ENDS = ("<|im_end|>", "<|eot_id|>", "<extra_id_1>")


def end_token_ids(
    declared: Iterable[int], tokenizer: Tokenizer, *, is_nemotron: bool, template: str | None
) -> tuple[int, ...]:
    """Declared ids first, then the end markers of the family and of the template that the vocabulary has."""
    declared = list(declared)
    for token_id in declared:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"the declared end of text {token_id!r} is not a token id")
    pieces = [*(NEMOTRON_ENDS if is_nemotron else ()), *template_ends(template)]
    found = [tokenizer.token_id(piece) for piece in pieces]
    return tuple(dict.fromkeys([*declared, *(token_id for token_id in found if token_id is not None)]))


def template_ends(template: str | None) -> tuple[str, ...]:
    """End-of-turn markers that a chat template writes."""
    return tuple(marker for marker in TEMPLATE_ENDS if template is not None and marker in template)
