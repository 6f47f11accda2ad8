"""A conversation as pieces of text that know what they are, and their token ids.

Markers are written by a format, text by anybody: only a marker segment can become a marker's id, so what a
user writes can not end a turn or start one. Text segments that touch are tokenized together, as the whole
prompt would be; they are cut only where training starts or ends, so that the ids of a prompt are a prefix
of the ids of the prompt and its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nemotron4.records import Message
from nemotron4.text.tokenizer import Tokenizer

Purpose = Literal["generate", "show", "train"]
# generate: ends with the header of the assistant's next turn. show: ends with the last message.
# train: as show, with what teaches the model to stop, and ``is_trained`` set.


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt. ``is_trained``: a model learns to write it."""

    text: str
    is_marker: bool = False
    is_trained: bool = False


@dataclass(frozen=True)
class EncodedTurns:
    """Token ids of a conversation; ``is_trained[i]``: ``token_ids[i]`` is a target of training."""

    token_ids: tuple[int, ...]
    is_trained: tuple[bool, ...]


class TurnWriter(Protocol):
    """Writes a conversation in one model family's way."""

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None
    ) -> list[Segment]:
        """TemplateError if the conversation has no form. ``tokenizer`` None: only the text matters."""
        ...


def join_text(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def encode_segments(tokenizer: Tokenizer, segments: Sequence[Segment]) -> EncodedTurns:
    """Ids of the segments; a marker that the vocabulary lacks is spelled."""
    ids: list[int] = []
    is_trained: list[bool] = []
    follows_text = False
    for segment in _runs(tokenizer, segments):
        if not segment.is_marker:
            new = tokenizer.encode(segment.text, parse_special=False, continues=follows_text)
            follows_text = True
        else:
            new = _marker_ids(tokenizer, segment.text, is_first=not ids)
            # Text after <s> or <|im_start|> is a new text, as if nothing stood before it.
            follows_text = not tokenizer.is_control(new[-1])
        ids += new
        is_trained += [segment.is_trained] * len(new)
    return EncodedTurns(tuple(ids), tuple(is_trained))


def _marker_ids(tokenizer: Tokenizer, marker: str, *, is_first: bool) -> list[int]:
    if is_first and marker in tokenizer.markers:
        # At the very start SentencePiece puts a word mark before a marker.
        return tokenizer.encode(marker)
    token_id = tokenizer.token_id(marker)
    assert token_id is not None, "a marker without an id has become text"
    return [token_id]


def _runs(tokenizer: Tokenizer, segments: Sequence[Segment]) -> list[Segment]:
    """The segments with text that touches joined, and markers that have no id turned into text."""
    runs: list[Segment] = []
    for segment in segments:
        is_marker = segment.is_marker and tokenizer.token_id(segment.text) is not None
        last = runs[-1] if runs else None
        if last and not last.is_marker and not is_marker and last.is_trained == segment.is_trained:
            runs[-1] = Segment(last.text + segment.text, is_trained=last.is_trained)
        elif segment.text:
            runs.append(Segment(segment.text, is_marker, segment.is_trained))
    return runs
