"""Supervised fine-tuning: likelihood of the answers in conversations of every common form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemotron4.records import FieldError, Message
from nemotron4.training import rows
from nemotron4.training.encoding import Encoder, PlainText, RowKind
from nemotron4.training.rows import Fields
from nemotron4.training.samples import Sample
from nemotron4.training.stage import Objective, Stage


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """``labels``: SteerLM attributes before the answers at these places of ``messages``."""

    messages: tuple[Message, ...]
    labels: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """A rendered prompt and its answer, both plain text."""

    prompt: str
    answer: str


class ChatKind(RowKind):
    """``messages`` (OpenAI), ``conversations`` (ShareGPT, NeMo-Aligner), Alpaca's columns, or two texts."""

    name = "sft"

    def parse(self, row: Fields) -> ChatRow | AnswerRow:
        if "conversations" in row:
            return conversation(row)
        if "messages" in row:
            found = rows.messages(row, "messages")
            if row.row.get("prompt") in [message.content for message in found if message.role == "user"]:
                row.get("prompt")  # UltraChat and No Robots repeat it
            return ChatRow(messages=(*rows.system(row), *found), tools=rows.tools(row))
        question = rows.asked(row)
        names = ("output", "response", "answer", "completion")
        if question is not None:
            name = next((name for name in names if name in row), None)
            if name is None:
                raise rows.no_form(row, f"with the question one of {', '.join(names)}")
            return ChatRow(messages=(*question, Message("assistant", row.text(name))))
        pairs = (("input", "output"), ("prompt", "completion"), ("prompt", "response"))
        for column in (1, 0):  # where there is no answer, its name is told by the prompt's
            for pair in pairs:
                if pair[column] in row:
                    return self._two(row, *pair)
        raise rows.no_form(
            row,
            "messages, conversations, instruction and output, input and output, or prompt and completion; "
            'a text that trains whole has kind = "pretrain" in its source',
        )

    def _two(self, row: Fields, prompt_name: str, answer_name: str) -> ChatRow | AnswerRow:
        is_list = isinstance(row.row.get(answer_name), list)
        prompt = rows.prompt(row, prompt_name, is_turn=is_list)
        if isinstance(prompt, str):
            return AnswerRow(prompt=prompt, answer=row.text(answer_name))
        answers: tuple[Message, ...]
        if is_list:
            answers = rows.messages(row, answer_name)
        else:
            answers = (Message("assistant", rows.answer(row, answer_name)),)
        if not any(answer.role == "assistant" and answer.trains for answer in answers):
            raise FieldError(f"field {answer_name!r} has no answer that trains")
        return ChatRow(messages=(*rows.untrained(prompt), *answers), tools=rows.tools(row))

    def sample(self, row: ChatRow | AnswerRow, encoder: Encoder) -> Sample:
        if isinstance(row, AnswerRow):
            return Sample((encoder.answer(row.prompt, row.answer),))
        return Sample((encoder.chat(row.messages, row.labels, row.tools),))

    def findings(self, row: Any, sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
        yield from never_stops(sample, encoder)
        if isinstance(row, AnswerRow):
            yield from merging(row.prompt, [row.answer], encoder)

    def numbers(self, row: Any) -> Mapping[str, float]:
        return {"turns": float(len(row.messages))} if isinstance(row, ChatRow) else {}


def conversation(row: Fields) -> ChatRow:
    """``{"system", "mask", "type", "conversations": [{"from", "value", "label"}]}``, or ShareGPT's part."""
    turns = row.require("conversations", list, "a list of turns")
    if not turns:
        raise FieldError("field 'conversations' is empty; expected at least one turn")
    kind = row.get("type")
    if kind not in (None, "VALUE_TO_TEXT"):
        raise FieldError(f"field 'type' is {kind!r}; expected null or 'VALUE_TO_TEXT'")
    messages = list(rows.system(row))
    labels: dict[int, Mapping[str, int]] = {}
    for i, turn in enumerate(turns):
        given = dict(turn) if isinstance(turn, dict) else turn
        label = given.pop("label", None) if isinstance(given, dict) else None
        messages.append(rows.message(given, f"conversations[{i}]", row))
        if label is not None and kind is None:
            raise FieldError(f"conversations[{i}] has a label; it trains with type 'VALUE_TO_TEXT'")
        if label is not None:
            labels[len(messages) - 1] = rows.label_values(label, f"conversations[{i}].label")
    _check_mask(row, {message.role for message in messages})
    return ChatRow(messages=tuple(messages), labels=labels, tools=rows.tools(row))


def _check_mask(row: Fields, roles: set[str]) -> None:
    """The assistant's turns train and no other: a mask that says otherwise is refused, not ignored."""
    if "mask" not in row:
        return
    written = [name.strip().lower() for name in row.text("mask").split(",")]
    masked = {rows.ROLES.get(name, name) for name in written}
    trained = roles - masked - {"system", "tool"}
    if trained - {"assistant"}:
        raise FieldError(
            f"field 'mask' is {row['mask']!r}, so {', '.join(sorted(trained))} would train; "
            "only the assistant's turns can"
        )
    if "assistant" in masked:
        raise FieldError(f"field 'mask' is {row['mask']!r}: it masks the assistant, so nothing would train")


class TextKind(PlainText):
    name = "pretrain"


class SftStage(Stage):
    name = "sft"
    kinds = (ChatKind(), TextKind())
    examples: ClassVar = {"sft": {}}

    def objective(self, settings: Any) -> Objective:
        from nemotron4.training.objectives import LikelihoodObjective

        return LikelihoodObjective()


STAGE = SftStage()


# ---- what to say of rows that can train


def never_stops(sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
    stops = encoder.stop_ids()
    spelled = () if encoder.prompt_format is None else encoder.prompt_format.stop_strings
    for s in sample.segments:
        trained = [token for token, is_trained in zip(s.tokens, s.is_trained, strict=True) if is_trained]
        if stops.isdisjoint(trained) and not encoder.tokenizer.decode(trained).endswith(spelled):
            yield "never_stops", "no stop marker is trained, so the model would not learn to end"
            return


def merging(prompt: object, answers: list[str], encoder: Encoder) -> Iterator[tuple[str, str]]:
    """Rendered prompts whose tokens change with the answer; messages are cut by the format."""
    if not isinstance(prompt, str):
        return
    for answer in answers:
        apart = encoder.tokenizer.encode(prompt)
        apart += encoder.tokenizer.encode(answer, continues=bool(apart))
        if encoder.tokenizer.encode(prompt + answer) != apart:
            yield "merging_boundary", "prompt and answer merge into other tokens where they meet"
            return
