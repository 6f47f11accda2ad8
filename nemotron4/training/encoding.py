"""Rows to tokens: rendered by the model's own format, masked, cut or refused by length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from nemotron4.errors import TemplateError
from nemotron4.records import FieldError, Message
from nemotron4.text.prompt import (
    PromptFormat,
    encode_answer,
    encode_conversation,
    encode_judged,
    with_labels,
    with_tools,
)
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.samples import Sample, Segment


class RowError(Exception):
    """A row that is well formed and still cannot train; becomes a problem with file and line."""


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. ``where`` is ``file:line``."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class ReadRow:
    """A parsed row, where it is, and its raw object (for ``--write-clean``)."""

    where: str
    row: Any
    raw: Any = field(repr=False)


@dataclass(frozen=True)
class Encoder:
    """How rows of one model become tokens. ``virtual_ids`` precede every sequence (P-tuning)."""

    tokenizer: Tokenizer
    prompt_format: PromptFormat | None
    max_length: int
    over_long: Literal["drop", "cut"] = "drop"
    bos_id: int | None = None  # for models trained with one before every text
    virtual_ids: tuple[int, ...] = ()
    row_tokens: int | None = None  # of a packed row, which must hold all of a sample's sequences

    # ---- one row

    def chat(
        self,
        messages: Sequence[Message],
        labels: Mapping[int, Mapping[str, int]] | None = None,
        tools: Sequence[Any] = (),
    ) -> Segment:
        """A conversation whose answers train; ``labels`` are SteerLM attributes before some of them."""
        for place, message in enumerate(messages):
            is_empty = not message.content.strip() and "tool_calls" not in message.more
            if message.role == "assistant" and message.trains and is_empty:
                raise RowError(
                    f"messages[{place}] is an empty answer, which would train the model to stop at once"
                )
        prompt_format = with_tools(self._format(), tools, messages)
        if labels:
            prompt_format = with_labels(prompt_format, labels)
        turns = encode_conversation(prompt_format, self.tokenizer, messages)
        return self._segment(turns.token_ids, turns.is_trained)

    def answer(self, prompt: Prompt, answer: str, tools: Sequence[Any] = ()) -> Segment:
        """A prompt and its answer, which alone trains, with what ends it."""
        if not answer.strip():
            raise RowError("an answer is empty, which would train the model to stop at once")
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
            answer_ids = self.tokenizer.encode(answer, continues=bool(prompt_ids))
            answer_ids += self._missing_stop(answer_ids)
        else:
            prompt_format = with_tools(self._format(), tools, prompt)
            parts = encode_answer(prompt_format, self.tokenizer, prompt, answer)
            prompt_ids, answer_ids = list(parts.prompt_ids), list(parts.answer_ids)
        return self._segment(
            (*prompt_ids, *answer_ids), (*[False] * len(prompt_ids), *[True] * len(answer_ids))
        )

    def open_prompt(self, prompt: Prompt, tools: Sequence[Any] = ()) -> Segment:
        """A prompt up to where its answer begins; nothing in it trains."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = with_tools(self._format(), tools, prompt).encode(self.tokenizer, prompt)
        return self._segment(ids, (False,) * len(ids))

    def labelled_answer(self, prompt: Sequence[Message], labels: Mapping[str, int], answer: str) -> Segment:
        """The last answer of a conversation, written for the given attributes; it alone trains."""
        prompt_format = with_labels(with_tools(self._format(), (), prompt), {len(prompt): labels})
        parts = encode_answer(prompt_format, self.tokenizer, prompt, answer)
        trained = [*[False] * len(parts.prompt_ids), *[True] * len(parts.answer_ids)]
        return self._segment((*parts.prompt_ids, *parts.answer_ids), trained)

    def judged_text(self, conversation: Prompt, tools: Sequence[Any] = ()) -> Segment:
        """What a reward model reads; it gives its score at the last token. No token is a target."""
        if isinstance(conversation, str):
            ids = self.tokenizer.encode(conversation)
        else:
            ids = encode_judged(self.tokenizer, self.prompt_format, conversation, tools)
        return self._segment(ids, (False,) * len(ids))

    def document(self, text: str) -> Segment:
        """A text that trains whole, behind a separator, with its end."""
        ids = [self.separator, *self.tokenizer.encode(text, parse_special=False)]
        ids.append(self.separator if self.tokenizer.eos_id is None else self.tokenizer.eos_id)
        front = len(self.virtual_ids) + 1
        return Segment((*self.virtual_ids, *ids), (*[False] * front, *[True] * (len(ids) - 1)))

    @property
    def separator(self) -> int:
        """What is between documents."""
        found = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        if found is None:
            raise TemplateError("the tokenizer has neither BOS nor EOS to put between documents")
        return found

    def _format(self) -> PromptFormat:
        if self.prompt_format is None:
            raise TemplateError(
                "the model has no prompt format, and the row is a list of messages",
                hint="give rendered text (prompt and completion), or start from a chat model",
            )
        return self.prompt_format

    def stop_ids(self) -> frozenset[int]:
        if self.prompt_format is not None:
            return self.prompt_format.stop_token_ids(self.tokenizer)
        return frozenset() if self.tokenizer.eos_id is None else frozenset({self.tokenizer.eos_id})

    def _missing_stop(self, answer_ids: Sequence[int]) -> list[int]:
        """The end of text, unless the answer brings its own stop marker."""
        if answer_ids and answer_ids[-1] in self.stop_ids():
            return []
        return [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]

    def _segment(self, ids: Sequence[int], is_trained: Sequence[bool]) -> Segment:
        front = list(self.virtual_ids)
        if self.bos_id is not None and (not ids or ids[0] != self.bos_id):
            front.append(self.bos_id)
        return Segment((*front, *ids), (*[False] * len(front), *is_trained))


def fitting(sample: Sample, encoder: Encoder, *, trains_text: bool) -> Sample:
    """The sample, cut if the recipe says so; RowError if it does not fit or nothing of it trains."""
    if trains_text:
        require_trained(sample.segments)
    cut = _within_length(sample, encoder, trains_text=trains_text)
    if encoder.row_tokens is not None and cut.packed_tokens > encoder.row_tokens:
        raise RowError(f"{cut.packed_tokens} tokens together; batch.row_tokens is {encoder.row_tokens}")
    return cut


def _within_length(sample: Sample, encoder: Encoder, *, trains_text: bool) -> Sample:
    longest = max(len(segment.tokens) for segment in sample.segments)
    if longest <= encoder.max_length:
        return sample
    if encoder.over_long == "drop" or not trains_text:
        raise RowError(f"{longest} tokens; data.max_length is {encoder.max_length}")
    cut = tuple(
        Segment(segment.tokens[: encoder.max_length], segment.is_trained[: encoder.max_length])
        for segment in sample.segments
    )
    require_trained(cut, "after the cut to data.max_length ")
    if len(cut) > 1 and len(set(cut)) == 1 and len(set(sample.segments)) > 1:
        raise RowError(f"the answers are the same after the cut to data.max_length ({encoder.max_length})")
    return replace(sample, segments=cut, was_cut=True)


def require_trained(segments: Sequence[Segment], when: str = "") -> None:
    if any(segment.num_trained == 0 for segment in segments):
        raise RowError(f"{when}no token of the row trains")


def sample_hash(sample: Sample) -> str:
    """Identifies a sample by its tokens, masks and labels; covers tokenizer and template."""
    return hashlib.sha256(repr((sample.segments, sample.labels)).encode()).hexdigest()


class RowKind:
    """A kind of row: how it is read, what it becomes, and what a person should know of it."""

    name: ClassVar[str]
    trains_text: ClassVar[bool] = True  # False: a row is read out or answered, and no token of it is a target

    def parse(self, row: Fields) -> Any:
        """The row as a value of the stage's own; FieldError names the field and what was expected."""
        raise NotImplementedError

    def sample(self, row: Any, encoder: Encoder) -> Sample:
        """The parsed row as tokens; RowError if it is well formed and still cannot train."""
        raise NotImplementedError

    def joined(self, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Raw rows of a file, where several of them make one: (``file:line``, object or what is wrong)."""
        return rows

    def related(self, rows: Iterator[ReadRow]) -> Iterator[tuple[ReadRow, Any]]:
        """Each row of a source with its parsed value, or with one that has what it takes from the others.

        A RowError in place of a value is a row that cannot train.
        """
        return ((read, read.row) for read in rows)

    def findings(self, row: Any, sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
        """(topic, message) for what a person should know of a row that can train."""
        return iter(())

    def numbers(self, row: Any) -> Mapping[str, float]:
        """Numbers of a row whose distribution ``doctor data`` reports: turns, rewards, attributes."""
        return {}


# -- plain text, which several stages and the tokenizer of a corpus read


@dataclass(frozen=True, kw_only=True)
class TextRow:
    text: str


class PlainText(RowKind):
    """``text``: a document that trains whole. A stage that reads it gives it a name."""

    def parse(self, row: Fields) -> TextRow:
        text = row.text("text")
        if not text:
            raise FieldError("field 'text' is empty, so nothing would train")
        return TextRow(text=text)

    def sample(self, row: TextRow, encoder: Encoder) -> Sample:
        return Sample((encoder.document(row.text),))
