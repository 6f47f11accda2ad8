"""Which tokens of a conversation train. The rules of each format are in its own file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.prompt import PromptFormat
from nemotron4.text.segments import EncodedTurns, encode_segments
from nemotron4.text.tokenizer import Tokenizer


def encode_conversation(
    prompt_format: PromptFormat, tokenizer: Tokenizer, messages: Sequence[Message]
) -> EncodedTurns:
    """Ids of a whole conversation with the end of its last turn, and which of them train.

    Answers train with the end of their turn; headers, labels and other roles do not. May train nothing:
    a conversation without an answer, or whose only answer is its first turn.
    """
    segments = prompt_format.writer.segments(messages, purpose="train", tokenizer=tokenizer)
    return encode_segments(tokenizer, segments)


@dataclass(frozen=True)
class PromptAndAnswer:
    """``prompt_ids + answer_ids`` is the conversation; the answer includes the end of its turn."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def encode_answer(
    prompt_format: PromptFormat, tokenizer: Tokenizer, prompt: Sequence[Message], answer: str
) -> PromptAndAnswer:
    """Prompt and one answer to it, cut where the answer begins: answers to one prompt share its ids."""
    turns = encode_conversation(prompt_format, tokenizer, [*prompt, Message("assistant", answer)])
    num_after = next((i for i, trained in enumerate(reversed(turns.is_trained)) if trained), None)
    if num_after is None:
        raise TemplateError(
            f"an answer to {len(prompt)} messages without a user's turn never trains",
            hint="put the question into the prompt",
        )
    end = len(turns.token_ids) - num_after
    untrained = (i for i in range(end - 1, -1, -1) if not turns.is_trained[i])
    start = next(untrained, -1) + 1
    return PromptAndAnswer(turns.token_ids[:start], turns.token_ids[start:end])
