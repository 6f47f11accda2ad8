"""What must hold between a tokenizer and the model it feeds, checked once when the tokenizer is opened."""

from __future__ import annotations

from pathlib import Path

from nemotron4.errors import CheckpointError, TokenizerError
from nemotron4.model.config import ModelConfig
from nemotron4.text.tokenizer import Tokenizer, check_round_trip

# The model card's prompt: line ends, markers and a blank line that a careless vocabulary loses.
CARD_PROMPT = (
    "<extra_id_0>System\n\n<extra_id_1>User\n"
    "Write a poem on NVIDIA in the style of Shakespeare\n<extra_id_1>Assistant\n"
)


def checked_tokenizer(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    """The tokenizer itself, if it returns the text it is given and every id of it has an embedding row."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids; the model has {config.vocab_size} rows",
            hint="the tokenizer files belong to another model",
        )
    try:
        check_round_trip(tokenizer, CARD_PROMPT)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", hint=error.hint) from error
    return tokenizer
