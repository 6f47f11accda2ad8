"""Rows to samples: rendered, tokenized, masked, labelled; with an account of what was left out.

A row that cannot be used is a Problem with file and line. Whether problems stop the run is
``data.max_bad_rows``'s decision, made before anything trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch

from nemotron4.errors import ConfigError, TemplateError
from nemotron4.records import Message
from nemotron4.text.prompt import PromptFormat, encode_answer, encode_conversation, encode_judged, with_labels
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.training.formats import (
    MISSING,
    AnswerRow,
    ChatRow,
    JudgedRow,
    PairRow,
    Prompt,
    PromptRow,
    ScoredRow,
    WeightedRow,
)
from nemotron4.training.packing import Sample, Segment
from nemotron4.training.reading import Problem, ReadRow
from nemotron4.training.rollouts import PromptSample


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

    def chat(self, row: ChatRow) -> Segment:
        prompt_format = self._format()
        if row.labels:
            prompt_format = with_labels(prompt_format, row.labels)
        turns = encode_conversation(prompt_format, self.tokenizer, row.messages)
        return self._segment(turns.token_ids, turns.is_trained)

    def answer(self, prompt: Prompt, answer: str) -> Segment:
        """A prompt and its answer, which alone trains, with what ends it."""
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
            answer_ids = self.tokenizer.encode(answer, continues=bool(prompt_ids))
            answer_ids += self._missing_stop(answer_ids)
        else:
            parts = encode_answer(self._format(), self.tokenizer, prompt, answer)
            prompt_ids, answer_ids = list(parts.prompt_ids), list(parts.answer_ids)
        return self._segment(
            (*prompt_ids, *answer_ids), (*[False] * len(prompt_ids), *[True] * len(answer_ids))
        )

    def open_prompt(self, prompt: Prompt) -> Segment:
        """A prompt up to where its answer begins; nothing in it trains."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self._format().encode(self.tokenizer, prompt)
        return self._segment(ids, (False,) * len(ids))

    def labelled_answer(self, prompt: Sequence[Message], labels: Mapping[str, int], answer: str) -> Segment:
        """The last answer of a conversation, written for the given attributes; it alone trains."""
        prompt_format = with_labels(self._format(), {len(prompt): labels})
        parts = encode_answer(prompt_format, self.tokenizer, prompt, answer)
        trained = [*[False] * len(parts.prompt_ids), *[True] * len(parts.answer_ids)]
        return self._segment((*parts.prompt_ids, *parts.answer_ids), trained)

    def judged_text(self, conversation: Prompt) -> Segment:
        """What a reward model reads; its score stands at the last token. No token is a target."""
        if isinstance(conversation, str):
            ids = self.tokenizer.encode(conversation)
        else:
            ids = encode_judged(self.tokenizer, self.prompt_format, conversation)
        return self._segment(ids, (False,) * len(ids))

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


Build = Callable[[ReadRow], Sample]


def build_samples(
    rows: Sequence[ReadRow], encoder: Encoder, build: Build
) -> tuple[list[Sample], list[Problem]]:
    """Samples of the rows that can train, and the problem of each that cannot."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            samples.append(_fitting(build(row), encoder))
        except (TemplateError, UnusableRowError) as error:
            problems.append(Problem(row.where, str(error).replace("\nhint: ", "; ")))
    return samples, problems


class UnusableRowError(Exception):
    """A row that is well formed and still cannot train; becomes a Problem."""


def _fitting(sample: Sample, encoder: Encoder) -> Sample:
    """The sample, cut if the recipe says so; UnusableRowError if it does not fit."""
    cut = _within_length(sample, encoder)
    if encoder.row_tokens is not None and cut.num_tokens > encoder.row_tokens:
        raise UnusableRowError(f"{cut.num_tokens} tokens together; batch.row_tokens is {encoder.row_tokens}")
    return cut


def _within_length(sample: Sample, encoder: Encoder) -> Sample:
    longest = max(len(segment.tokens) for segment in sample.segments)
    if longest <= encoder.max_length:
        return sample
    is_readout = not any(any(segment.is_trained) for segment in sample.segments)
    if encoder.over_long == "drop" or is_readout:
        raise UnusableRowError(f"{longest} tokens; data.max_length is {encoder.max_length}")
    cut = tuple(
        Segment(segment.tokens[: encoder.max_length], segment.is_trained[: encoder.max_length])
        for segment in sample.segments
    )
    _require_trained(cut, "after the cut to data.max_length ")
    return Sample(cut, sample.labels, sample.where, sample.reference)


def _require_trained(segments: Sequence[Segment], when: str = "") -> None:
    if any(segment.num_trained == 0 for segment in segments):
        raise UnusableRowError(f"{when}no token of the row trains")


def sft_sample(encoder: Encoder) -> Build:
    def build(read: ReadRow) -> Sample:
        row = read.row
        if isinstance(row, AnswerRow):
            segment = encoder.answer(row.prompt, row.answer)
        else:
            assert isinstance(row, ChatRow), "the reader gives rows of the stage's kind"
            segment = encoder.chat(row)
        _require_trained([segment])
        return Sample((segment,), where=read.where)

    return build


def pair_sample(encoder: Encoder, *, needs_rewards: bool) -> Build:
    def build(read: ReadRow) -> Sample:
        row = read.row
        assert isinstance(row, PairRow), "the reader gives rows of the stage's kind"
        if row.chosen == row.rejected:
            raise UnusableRowError("chosen and rejected are equal")
        labels: tuple[float, ...] = ()
        if row.chosen_reward is not None and row.rejected_reward is not None:
            labels = (row.chosen_reward, row.rejected_reward)
        elif needs_rewards:
            name = "chosen_reward" if row.chosen_reward is None else "rejected_reward"
            raise UnusableRowError(f"field {name!r} is missing; loss rpo needs both rewards and assumes none")
        segments = (encoder.answer(row.prompt, row.chosen), encoder.answer(row.prompt, row.rejected))
        _require_trained(segments)
        return Sample(segments, labels, read.where)

    return build


def judged_samples(rows: Sequence[ReadRow], encoder: Encoder) -> tuple[list[Sample], list[Problem]]:
    """KTO: each row's own answer, and the next row's answer to this row's prompt for the baseline."""

    def build(read: ReadRow) -> Sample:
        row, other = read.row, following[read.where]
        assert isinstance(row, JudgedRow), "the reader gives rows of the stage's kind"
        segments = (encoder.answer(row.prompt, row.answer), encoder.answer(row.prompt, other))
        _require_trained(segments)
        return Sample(segments, (float(row.is_desirable),), read.where)

    answers = [read.row.answer for read in rows if isinstance(read.row, JudgedRow)]
    if len(rows) < 2:
        return [], [Problem(read.where, "KTO needs two rows or more for its baseline") for read in rows]
    following = {read.where: answers[(i + 1) % len(answers)] for i, read in enumerate(rows)}
    return build_samples(rows, encoder, build)


def scored_sample(encoder: Encoder, outputs: Sequence[str], *, trained: Sequence[str]) -> Build:
    """One label for each output of the head; what is not trained counts as missing."""

    def build(read: ReadRow) -> Sample:
        row = read.row
        assert isinstance(row, ScoredRow), "the reader gives rows of the stage's kind"
        labels = tuple(row.attributes.get(name, MISSING) if name in trained else MISSING for name in outputs)
        if all(label == MISSING for label in labels):
            raise UnusableRowError(f"none of the trained attributes is labelled: {', '.join(trained)}")
        return Sample((encoder.judged_text(row.conversation),), labels, read.where)

    return build


def reward_pair_sample(encoder: Encoder, *, needs_strength: bool) -> Build:
    def build(read: ReadRow) -> Sample:
        row = read.row
        assert isinstance(row, PairRow), "the reader gives rows of the stage's kind"
        if row.chosen == row.rejected:
            raise UnusableRowError("chosen and rejected are equal")
        if needs_strength and row.strength is None:
            raise UnusableRowError(
                "field 'margin' or 'preference_strength' is missing; the objective needs it"
            )
        labels = (row.strength,) if row.strength is not None else ()
        segments = tuple(
            encoder.judged_text(_conversation(row.prompt, answer)) for answer in (row.chosen, row.rejected)
        )
        return Sample(segments, labels, read.where)

    return build


def _conversation(prompt: Prompt, answer: str) -> Prompt:
    return prompt + answer if isinstance(prompt, str) else (*prompt, Message("assistant", answer))


def weighted_sample(encoder: Encoder) -> Build:
    """SteerLM 2.0: a segment for each answer; labels are its three numbers, one answer after the other."""

    def build(read: ReadRow) -> Sample:
        row = read.row
        assert isinstance(row, WeightedRow), "the reader gives rows of the stage's kind"
        segments = tuple(encoder.labelled_answer(row.prompt, row.labels, r.text) for r in row.responses)
        _require_trained(segments)
        labels = [
            number
            for r in row.responses
            for number in (r.attributes_logprob, r.prior_logprob, r.proposal_logprob)
        ]
        return Sample(segments, tuple(labels), read.where)

    return build


def prompt_sample(
    encoder: Encoder, *, num_new: int, needs_messages: bool, row_fields: Sequence[str]
) -> Build:
    """A prompt that leaves room for ``num_new`` tokens and has what its judges read."""

    def build(read: ReadRow) -> Sample:
        row = read.row
        assert isinstance(row, PromptRow), "the reader gives rows of the stage's kind"
        if needs_messages and isinstance(row.prompt, str):
            raise UnusableRowError("the prompt is rendered text; a reward model judges lists of messages")
        missing = [name for name in row_fields if name not in row.fields]
        if missing:
            raise UnusableRowError(f"field {missing[0]!r} is missing; the reward compares with it")
        segment = encoder.open_prompt(row.prompt)
        total = len(segment.tokens) + num_new
        if total > encoder.max_length:
            raise UnusableRowError(
                f"{total} tokens with {num_new} new ones; data.max_length is {encoder.max_length}"
            )
        return PromptSample((segment,), (), read.where, prompt=row.prompt, fields=row.fields)

    return build


class TextWindows(Sequence[Sample]):
    """Documents laid end to end and cut into windows; a window's pieces do not see each other.

    A document starts and ends with the separator (BOS or EOS), so its first token and its end train too. A
    document that goes on in the next window repeats one token there, so no prediction is lost. ``front``
    stands before each piece and never trains (P-tuning).
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        separator: int,
        max_length: int,
        front: tuple[int, ...] = (),
    ) -> None:
        longest = max_length - len(front)
        if longest < 2:
            raise ConfigError(
                f"data.max_length ({max_length}) leaves no room for text behind {len(front)} virtual tokens"
            )
        pieces: list[tuple[int, int]] = []  # start and end in the stream
        stream: list[int] = []
        for document in documents:
            start = len(stream)
            stream += [separator, *document, separator]
            pieces += [
                (at, min(at + longest, len(stream))) for at in range(start, len(stream) - 1, longest - 1)
            ]
        self._stream = torch.tensor(stream, dtype=torch.int32)
        self._windows = _fill(pieces, max_length, len(front))
        self._front = front

    def __len__(self) -> int:
        return len(self._windows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        segments = []
        for start, stop in self._windows[index]:
            tokens = tuple(self._stream[start:stop].tolist())
            is_trained = [False] * (len(self._front) + 1) + [True] * (len(tokens) - 1)
            segments.append(Segment((*self._front, *tokens), tuple(is_trained)))
        return Sample(tuple(segments), where=f"window {index}")

    @property
    def num_tokens(self) -> int:
        return len(self._stream)


class ConcatDataset(Sequence[Sample]):
    """Several sequences of samples as one, without copying them."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _fill(pieces: Sequence[tuple[int, int]], max_length: int, num_front: int) -> list[list[tuple[int, int]]]:
    """Pieces in order, as many to a window as fit with ``num_front`` tokens before each."""
    windows: list[list[tuple[int, int]]] = []
    used = max_length
    for start, stop in pieces:
        size = num_front + stop - start
        if used + size > max_length:
            windows.append([])
            used = 0
        windows[-1].append((start, stop))
        used += size
    return windows


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of everything that trains: tokens, masks and labels, in order."""
    digest = hashlib.sha256()
    for sample in _each(samples):
        digest.update(sample_hash(sample).encode())
    return digest.hexdigest()


def sample_hash(sample: Sample) -> str:
    """Identifies a sample by its tokens, masks and labels; covers tokenizer and template."""
    return hashlib.sha256(repr((sample.segments, sample.labels)).encode()).hexdigest()


def _each(samples: Sequence[Sample]) -> Iterator[Sample]:
    return (samples[i] for i in range(len(samples)))
