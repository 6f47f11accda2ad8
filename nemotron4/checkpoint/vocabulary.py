"""What must hold between a tokenizer and the model it feeds, checked once when the tokenizer is opened."""

from __future__ import annotations

from pathlib import Path

from nemotron4.errors import CheckpointError, TokenizerError
from nemotron4.model.config import ModelConfig
from nemotron4.text.prompt import card_prompt
from nemotron4.text.tokenizer import Tokenizer, check_round_trip


def checked_tokenizer(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> Tokenizer:
    """The tokenizer itself, if it returns the text it is given and every id of it has an embedding row."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids; the model has {config.vocab_size} rows",
            hint="the tokenizer files belong to another model",
        )
    try:
        check_round_trip(tokenizer, card_prompt())
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error.message}", hint=error.hint) from error
    return tokenizer
