"""How a conversation is written: stretches of text and markers, and the formats that the package knows.

Markers are written by a format, text by anybody: only a marker segment can become a marker's id, so what a
user writes can not end a turn or start one. Text segments that touch are tokenized together, as the whole
prompt would be; they are cut only where training starts or ends, so that the ids of a prompt are a prefix
of the ids of the prompt and its answer.

Sources: the card of Nemotron-4-340B-Instruct; NeMo ``gpt_sft_chat_dataset.py`` (system text, labels, which
tokens train); NeMo-Aligner ``data/nlp/builders.py`` and ``tools/human_feedback`` (reward text).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from nemotron4.errors import TemplateError, unknown_name
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.text.tokenizer import Tokenizer

Purpose = Literal["generate", "show", "train"]
# generate: ends with the header of the assistant's next turn. show: ends with the last message.
# train: as show, with what teaches the model to stop, and ``is_trained`` set.


@dataclass(frozen=True)
class TextSegment:
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
    ) -> list[TextSegment]:
        """TemplateError if the conversation has no form. ``tokenizer`` None: only the text matters."""
        ...


def join_text(segments: Iterable[TextSegment]) -> str:
    return "".join(segment.text for segment in segments)


def encode_segments(tokenizer: Tokenizer, segments: Sequence[TextSegment]) -> EncodedTurns:
    """Ids of the segments; a marker that the vocabulary lacks is spelled."""
    ids: list[int] = []
    is_trained: list[bool] = []
    runs = _runs(tokenizer, segments)
    for before, segment, after in zip([None, *runs], runs, [*runs[1:], None], strict=False):
        if segment.is_marker:
            new = _marker_ids(tokenizer, segment.text, is_first=not ids)
        else:
            new = tokenizer.encode(
                segment.text,
                parse_special=False,
                continues=before is not None and not before.is_marker,
                after=before.text if before is not None and before.is_marker else "",
                before=after.text if after is not None and after.is_marker else "",
            )
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


def _runs(tokenizer: Tokenizer, segments: Sequence[TextSegment]) -> list[TextSegment]:
    """The segments with text that touches joined, and markers that have no id turned into text."""
    runs: list[TextSegment] = []
    for segment in segments:
        is_marker = segment.is_marker and tokenizer.token_id(segment.text) is not None
        last = runs[-1] if runs else None
        if last and not last.is_marker and not is_marker and last.is_trained == segment.is_trained:
            runs[-1] = TextSegment(last.text + segment.text, is_trained=last.is_trained)
        elif segment.text:
            runs.append(TextSegment(segment.text, is_marker, segment.is_trained))
    return runs


SYSTEM_TURN_START = "<extra_id_0>"
TURN_START = "<extra_id_1>"
LABEL_START = "<extra_id_2>"
ROLE_NAMES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
# The four of the card's client; "\x11" is the turn start of older NeMo models.
CARD_STOP_STRINGS = ("<|endoftext|>", TURN_START, "\x11", f"{TURN_START}User")
STOP_STRINGS = (*CARD_STOP_STRINGS, SYSTEM_TURN_START, LABEL_START)
# The order of the reward model's nine outputs, of which the first four are neither trained nor used.
LABEL_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)
REWARD_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The same prompt for other programs, as a checkpoint's chat template.
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] | lower == 'system' %}"
    "{% set system, turns = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    f"{{{{ '{SYSTEM_TURN_START}System\\n' + system + '\\n' }}}}"
    "{% for message in turns %}"
    f"{{% if message['role'] | lower not in {list(ROLE_NAMES)} %}}"
    "{{ raise_exception('no turn is called ' + message['role']) }}{% endif %}"
    f"{{{{ '{TURN_START}' + message['role'] | lower | capitalize + '\\n' + message['content'] + '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN_START}Assistant\\n' }}}}{{% endif %}}"
)


def label_line(values: Mapping[str, int]) -> str:
    """``quality:4,toxicity:0,...``: all nine attributes in the reward model's order."""
    for name in values:
        if name not in LABEL_ATTRIBUTES:
            message, hint = unknown_name("attribute", name, LABEL_ATTRIBUTES)
            raise TemplateError(message, hint=hint)
    missing = [name for name in LABEL_ATTRIBUTES if name not in values]
    if missing:
        raise TemplateError(f"the label has no value for {', '.join(missing)}; expected all nine attributes")
    return ",".join(f"{name}:{values[name]}" for name in LABEL_ATTRIBUTES)


@dataclass(frozen=True)
class NemotronWriter:
    """The card's turns. ``labels`` puts a SteerLM label line before the text of some assistant messages.

    Its keys are places in the list of messages; the number of messages is the place of the answer to be
    generated.
    """

    labels: Mapping[int, str] = field(default_factory=dict)

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None = None
    ) -> list[TextSegment]:
        system, num_system = _system_text(messages), int(_has_system(messages))
        segments = [TextSegment(SYSTEM_TURN_START, is_marker=True), TextSegment(f"System\n{system}\n")]
        was_trained = False
        for place, message in enumerate(messages[num_system:], start=num_system):
            name = ROLE_NAMES.get(message.role.lower())
            if name is None:
                raise _bad_role(message, place)
            # The first turn never trains, even an assistant's; the marker after an answer is the stop signal.
            is_trained = name == "Assistant" and place > num_system and message.trains
            segments.append(TextSegment(TURN_START, is_marker=True, is_trained=was_trained))
            segments += self._header(name, place)
            segments.append(TextSegment(f"{message.content}\n", is_trained=is_trained))
            was_trained = is_trained
        if purpose == "generate":
            segments.append(TextSegment(TURN_START, is_marker=True, is_trained=was_trained))
            segments += self._header("Assistant", len(messages))
        elif purpose == "train" and was_trained:
            segments.append(TextSegment(TURN_START, is_marker=True, is_trained=True))
        return segments

    def _header(self, name: str, place: int) -> list[TextSegment]:
        if place not in self.labels:
            return [TextSegment(f"{name}\n")]
        if name != "Assistant":
            raise TemplateError(
                f"messages[{place}] has a label and is a {name} turn; only answers have labels"
            )
        label = TextSegment(f"{self.labels[place]}\n")
        return [TextSegment(f"{name}\n"), TextSegment(LABEL_START, is_marker=True), label]


def require_answer(messages: Sequence[Message]) -> None:
    """TemplateError for a conversation without an answer to judge at its end."""
    if not messages or messages[-1].role.lower() != "assistant":
        last = messages[-1].role if messages else "nothing"
        raise TemplateError(
            f"the conversation ends with {last}; expected the assistant's answer to be judged"
        )


def reward_segments(messages: Sequence[Message]) -> list[TextSegment]:
    """A conversation for the reward model: its system text, the turns, and the marker where it is read."""
    require_answer(messages)
    if not _has_system(messages):
        messages = [Message("system", REWARD_SYSTEM), *messages]
    turns = NemotronWriter().segments(messages, purpose="show")
    return [*turns, TextSegment(LABEL_START, is_marker=True)]


def _has_system(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[0].role.lower() == "system"


def _system_text(messages: Sequence[Message]) -> str:
    return messages[0].content if _has_system(messages) else ""


def _bad_role(message: Message, place: int) -> TemplateError:
    if message.role.lower() == "system":
        return TemplateError(
            f"messages[{place}] is a system message; the Nemotron-4 prompt has one, at the start",
            hint="join the system texts into the first message",
        )
    wording, hint = unknown_name("role", message.role, ("system", *ROLE_NAMES))
    return TemplateError(f"messages[{place}]: {wording}", hint=hint)


CHATML_TURN_START, CHATML_TURN_END = "<|im_start|>", "<|im_end|>"
CHATML_ROLES = ("system", "user", "assistant", "tool")
CHATML_STOP_STRINGS = (CHATML_TURN_END, CHATML_TURN_START, "<|endoftext|>")
CHATML_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{CHATML_TURN_START}' + message['role'] | lower + '\\n' + message['content'] "
    f"+ '{CHATML_TURN_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{CHATML_TURN_START}assistant\\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True)
class ChatMLWriter:
    """An answer and its ``<|im_end|>`` train, if a turn is before it; the line break after does not."""

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None = None
    ) -> list[TextSegment]:
        segments: list[TextSegment] = []
        has_turn = False
        for place, message in enumerate(messages):
            role = message.role.lower()
            if role not in CHATML_ROLES:
                wording, hint = unknown_name("role", message.role, CHATML_ROLES)
                raise TemplateError(f"messages[{place}]: {wording}", hint=hint)
            is_trained = role == "assistant" and has_turn and message.trains
            has_turn = has_turn or role != "system"
            segments += [
                TextSegment(CHATML_TURN_START, is_marker=True),
                TextSegment(f"{role}\n"),
                TextSegment(message.content, is_trained=is_trained),
                TextSegment(CHATML_TURN_END, is_marker=True, is_trained=is_trained),
                TextSegment("\n"),
            ]
        if purpose == "generate":
            segments += [TextSegment(CHATML_TURN_START, is_marker=True), TextSegment("assistant\n")]
        return segments


@dataclass(frozen=True)
class LabelledWriter:
    """Another format's turns. Keys of ``lines`` are places of answers in the list of messages; the number of
    messages is the place of the answer to be generated.
    """

    inner: TurnWriter
    lines: Mapping[int, str]

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None
    ) -> list[TextSegment]:
        labelled = [self._with_line(place, message) for place, message in enumerate(messages)]
        segments = self.inner.segments(labelled, purpose=purpose, tokenizer=tokenizer)
        if purpose == "generate" and len(messages) in self.lines:
            segments = [*segments, TextSegment(f"{self.lines[len(messages)]}\n")]
        return [part for segment in segments for part in self._untrained_line(segment)]

    def _with_line(self, place: int, message: Message) -> Message:
        if place not in self.lines:
            return message
        if message.role.lower() != "assistant":
            raise TemplateError(
                f"messages[{place}] has a label and is from {message.role}; only answers have labels"
            )
        return replace(message, content=f"{self.lines[place]}\n{message.content}")

    def _untrained_line(self, segment: TextSegment) -> list[TextSegment]:
        """A trained stretch cut behind the label line that it starts with."""
        if segment.is_trained and not segment.is_marker:
            for line in self.lines.values():
                if segment.text.startswith(f"{line}\n"):
                    size = len(line) + 1
                    label = TextSegment(segment.text[:size])
                    return [label, replace(segment, text=segment.text[size:])]
        return [segment]
