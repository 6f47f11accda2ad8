"""From a conversation to a prompt: the formats, how a model's own is found, and which tokens train."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemotron4.engine import ChatFormat
from nemotron4.errors import TemplateError, unknown_name
from nemotron4.records import Message
from nemotron4.text import chat_template, formats
from nemotron4.text.formats import (
    EncodedTurns,
    LabelledWriter,
    Purpose,
    TextSegment,
    TurnWriter,
    encode_segments,
    join_text,
)
from nemotron4.text.messages import with_calls_as_text
from nemotron4.text.tokenizer import Tokenizer

CARD_QUESTION = "Write a poem on NVIDIA in the style of Shakespeare"
# What an export writes into a checkpoint so that other programs make the card's prompt.
NEMOTRON4_CHAT_TEMPLATE = formats.CHAT_TEMPLATE


@dataclass(frozen=True)
class PromptFormat:
    """How a conversation becomes a prompt. ``template`` is the same format as a Jinja chat template."""

    name: str
    template: str = field(repr=False)
    stop_strings: tuple[str, ...]
    writer: TurnWriter = field(repr=False, compare=False)
    date: str | None = None  # that the template writes in place of today's

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text, contents as they are. TemplateError if the conversation has no form.

        A marker inside a message cannot be told from the format's own in this text: use ``encode`` for
        what strangers wrote.
        """
        purpose: Purpose = "generate" if add_generation_prompt else "show"
        return join_text(self.writer.segments(messages, purpose=purpose, tokenizer=None))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        """The prompt as ids. A marker inside a message is spelled with ordinary tokens.

        ``prefill`` is the beginning of the answer.
        """
        purpose: Purpose = "generate" if add_generation_prompt else "show"
        segments = self.writer.segments(messages, purpose=purpose, tokenizer=tokenizer)
        if prefill:
            segments = [*segments, TextSegment(prefill)]
        return list(encode_segments(tokenizer, segments).token_ids)

    def of_day(self, date: str) -> PromptFormat:
        """The format as it renders on a day (2026-11-29): itself, unless its template writes the date."""
        if not self.writes_date or not isinstance(self.writer, chat_template.JinjaWriter):
            return self
        template = chat_template.ChatTemplate(self.template, name=self.name, date=date)
        return replace(self, date=date, writer=replace(self.writer, template=template))

    @property
    def writes_date(self) -> bool:
        return "strftime_now" in self.template

    @property
    def drops_newline(self) -> bool:
        """The Nemotron formats write a newline between an answer and the next turn's marker."""
        return formats.TURN_START in self.stop_strings

    def stop_token_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids that end an answer: the end of text, and every stop string that is one marker."""
        ids = {tokenizer.token_id(text) for text in self.stop_strings if text in tokenizer.markers}
        return frozenset(i for i in (*ids, tokenizer.eos_id) if i is not None)


def nemotron4(labels: Mapping[int, Mapping[str, int]] | None = None) -> PromptFormat:
    """The card's format. ``labels``: SteerLM attributes before the answers at these places.

    The place of the answer to be generated is the number of messages. The exported template has no labels.
    """
    return PromptFormat(
        "nemotron4",
        NEMOTRON4_CHAT_TEMPLATE,
        formats.STOP_STRINGS,
        formats.NemotronWriter(_label_lines(labels or {})),
    )


def _label_lines(labels: Mapping[int, Mapping[str, int]]) -> dict[int, str]:
    return {place: formats.label_line(values) for place, values in labels.items()}


def with_labels(prompt_format: PromptFormat, labels: Mapping[int, Mapping[str, int]]) -> PromptFormat:
    """The format with SteerLM attributes before the answers at these places.

    The card's format has a marker for them; in another they are the answer's first line, which never trains.
    """
    if prompt_format.name == "nemotron4":
        return nemotron4(labels)
    return replace(prompt_format, writer=LabelledWriter(prompt_format.writer, _label_lines(labels)))


def with_tools(
    prompt_format: PromptFormat, tools: Sequence[Any], messages: Sequence[Message]
) -> PromptFormat:
    """The format with tools that the conversation may call; TemplateError if it has no place for them."""
    called = any("tool_calls" in message.more for message in messages)
    if not tools and not called:
        return prompt_format
    for name, is_needed in (("tools", bool(tools)), ("tool_calls", called)):
        if is_needed and (name not in prompt_format.template or not hasattr(prompt_format.writer, "tools")):
            raise TemplateError(
                f"the row has {name}, and the format {prompt_format.name!r} has no place for them",
                hint="start from a model whose chat template writes them, or leave the column out",
            )
    return replace(prompt_format, writer=replace(prompt_format.writer, tools=tuple(tools)))  # type: ignore[type-var]


def with_variables(
    prompt_format: PromptFormat, variables: Mapping[str, Any]
) -> tuple[PromptFormat, list[str]]:
    """The format with variables of its template, and the names of those that the template does not read."""
    writer = prompt_format.writer
    if not isinstance(writer, chat_template.JinjaWriter):
        return prompt_format, list(variables)
    read = {name: value for name, value in variables.items() if writer.reads(name)}
    own = replace(prompt_format, writer=replace(writer, variables=read))
    return own, [name for name in variables if name not in read]


def chatml() -> PromptFormat:
    return PromptFormat(
        "chatml", formats.CHATML_CHAT_TEMPLATE, formats.CHATML_STOP_STRINGS, formats.ChatMLWriter()
    )


def from_template(source: str, tokenizer: Tokenizer, *, name: str = "chat template") -> PromptFormat:
    """The format of a checkpoint's own Jinja template."""
    writer = chat_template.JinjaWriter.of(_chat_template(source, name, os.getpid()), tokenizer)
    return PromptFormat(name, source, chat_template.stop_strings(writer, tokenizer), writer)


@functools.lru_cache(maxsize=4)
def _chat_template(source: str, name: str, process: int) -> chat_template.ChatTemplate:
    """Checkpoints of one template, as in the stages of a chain, share its worker; a fork has its own."""
    return chat_template.ChatTemplate(source, name=name)


def find_format(tokenizer: Tokenizer, template: str | None) -> PromptFormat | None:
    """A model's own format: its template, else what its markers say, else None (a base model)."""
    if template is not None:
        known = next((make() for make in FORMATS.values() if make().template == template), None)
        return known or from_template(template, tokenizer)
    markers = set(tokenizer.markers)
    if {formats.SYSTEM_TURN_START, formats.TURN_START} <= markers:
        return nemotron4()
    if {formats.CHATML_TURN_START, formats.CHATML_TURN_END} <= markers:
        return chatml()
    return None


def format_named(name: str) -> PromptFormat:
    """A format by its name: nemotron4 or chatml."""
    if name not in FORMATS:
        message, hint = unknown_name("prompt format", name, FORMATS)
        raise TemplateError(message, hint=hint)
    return FORMATS[name]()


FORMATS: Mapping[str, Callable[[], PromptFormat]] = {"nemotron4": nemotron4, "chatml": chatml}


def chosen_format(name: str, tokenizer: Tokenizer) -> PromptFormat:
    """A format that a user chose for a model: ``nemotron4``, ``chatml``, or a file with a Jinja template."""
    if name in FORMATS:
        return format_named(name)
    path = Path(name)
    if not path.is_file():
        message, hint = unknown_name("prompt format", name, FORMATS)
        raise TemplateError(f"{message}, and there is no such file", hint=hint)
    try:
        return from_template(path.read_text(encoding="utf-8"), tokenizer, name=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: cannot be read: {error}") from error


def render(messages: Sequence[Message], template: str = "nemotron4") -> str:
    """The conversation as a prompt that asks for the assistant's next turn."""
    return format_named(template).render(messages)


def stop_strings(template: str = "nemotron4") -> tuple[str, ...]:
    """The texts at which an answer ends."""
    return format_named(template).stop_strings


def card_prompt(text: str = CARD_QUESTION) -> str:
    """The model card's single-turn prompt."""
    return render([Message("user", text)])


def render_reward(messages: Sequence[Message]) -> str:
    """What the reward model reads: it ends with ``<extra_id_2>``, where the scores are read."""
    return join_text(formats.reward_segments(messages))


def encode_reward(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of ``render_reward``; the last is the marker's. Markers inside messages are spelled."""
    if formats.LABEL_START not in tokenizer.markers:
        raise TemplateError(
            f"the vocabulary has no marker {formats.LABEL_START!r}, at which a reward model is read"
        )
    return list(encode_segments(tokenizer, formats.reward_segments(messages)).token_ids)


def encode_judged(
    tokenizer: Tokenizer,
    prompt_format: ChatFormat | None,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
) -> list[int]:
    """What a reward model reads: NVIDIA's form where the vocabulary has its marker, else the
    conversation in the model's own format; tools and calls that it cannot write are text, as in a chat.
    """
    formats.require_answer(messages)
    if formats.LABEL_START in tokenizer.markers:
        return encode_reward(tokenizer, with_calls_as_text(messages, None, tools))
    if prompt_format is None:
        raise TemplateError("the reward model has neither the label marker nor a chat template")
    written = with_calls_as_text(messages, prompt_format, tools)
    if written is messages and isinstance(prompt_format, PromptFormat):
        prompt_format = with_tools(prompt_format, tools, messages)
    return prompt_format.encode(tokenizer, written, add_generation_prompt=False)


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
