"""Conversations written by a checkpoint's own chat template.

A template returns one text in which the words of users and the template's markers are mixed. To tell them
apart, every marker inside a message is replaced by a private-use character before rendering, and put back
as plain text afterwards: a marker in the rendered text is then the template's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.chat_template import ChatTemplate
from nemotron4.text.segments import Purpose, Segment
from nemotron4.text.tokenizer import Tokenizer

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class JinjaWriter:
    """Which tokens train is found by the prefix method; see ``_trained_spans``."""

    template: ChatTemplate
    names: Mapping[str, str | None]  # bos_token and eos_token, which templates write

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer) -> JinjaWriter:
        ends = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        return cls(template, {name: None if i is None else tokenizer.piece(i) for name, i in ends})

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None
    ) -> list[Segment]:
        rendering = _Rendering.of(self, messages, () if tokenizer is None else tokenizer.markers)
        text = rendering.render(len(messages), add_generation_prompt=purpose == "generate")
        spans = list(_trained_spans(rendering, text)) if purpose == "train" else []
        return [segment for part in _cut(text, spans) for segment in rendering.segments(*part)]


@dataclass(frozen=True)
class _Rendering:
    """One conversation whose messages hold stand-ins for markers."""

    writer: JinjaWriter
    messages: Sequence[Message]
    marker_pattern: re.Pattern[str] | None
    originals: Mapping[int, str]  # code point of a stand-in -> the marker it stands for

    @classmethod
    def of(cls, writer: JinjaWriter, messages: Sequence[Message], markers: Sequence[str]) -> _Rendering:
        known = {*markers, *(name for name in writer.names.values() if name)} if markers else set()
        if not known:
            return cls(writer, messages, None, {})
        # The longest first: one marker may begin another.
        pattern = re.compile("|".join(re.escape(m) for m in sorted(known, key=len, reverse=True)))
        written = "\n".join(part for message in messages for part in (message.role, message.content))
        found, used = sorted(set(pattern.findall(written))), set(written)
        free = (code for code in _PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(found, free, strict=False))
        if len(stand_ins) < len(found):
            raise TemplateError("the messages use too many private-use characters to tell markers from text")

        def safe(text: str) -> str:
            return pattern.sub(lambda match: chr(stand_ins[match[0]]), text)

        safe_messages = [Message(safe(message.role), safe(message.content)) for message in messages]
        return cls(writer, safe_messages, pattern, {code: marker for marker, code in stand_ins.items()})

    def render(self, num_messages: int, *, add_generation_prompt: bool) -> str:
        return self.writer.template.render(
            {
                **self.writer.names,
                "messages": [message.to_json() for message in self.messages[:num_messages]],
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            }
        )

    def segments(self, text: str, is_trained: bool) -> Iterator[Segment]:
        """Markers and text apart, stand-ins turned back into what the user wrote."""
        at = 0
        for match in self.marker_pattern.finditer(text) if self.marker_pattern else ():
            yield Segment(text[at : match.start()].translate(self.originals), is_trained=is_trained)
            yield Segment(match[0], is_marker=True, is_trained=is_trained)
            at = match.end()
        yield Segment(text[at:].translate(self.originals), is_trained=is_trained)

    def markers(self, text: str, start: int, end: int) -> list[re.Match[str]]:
        return list(self.marker_pattern.finditer(text, start, end)) if self.marker_pattern else []


def _trained_spans(rendering: _Rendering, text: str) -> Iterator[tuple[int, int]]:
    """Where in the text answers stand with the end of their turn.

    The prefix method: an answer is what stands between the rendering of the messages before it, with the
    header of the next turn, and the rendering that ends with it. Both must be beginnings of the whole.
    An answer that no user's turn precedes does not train.
    """
    has_turn = False
    for place, message in enumerate(rendering.messages):
        if message.role.lower() != "assistant" or not has_turn:
            has_turn = has_turn or message.role.lower() != "system"
            continue
        before = rendering.render(place, add_generation_prompt=True)
        until = rendering.render(place + 1, add_generation_prompt=False)
        start, end = len(before), len(until)
        is_inside = text.startswith(until) and until.startswith(before)
        if not is_inside or message.content.strip() not in text[start:end]:
            raise TemplateError(
                f"messages[{place}]: the chat template writes this answer differently at the end of a "
                "conversation than inside one, so the tokens to train on cannot be told",
                hint="train on conversations that end with this answer, or name another prompt format",
            )
        yield start, _end_of_turn(rendering, text, start, end)


def _end_of_turn(rendering: _Rendering, text: str, start: int, end: int) -> int:
    """Behind the marker that ends the turn: the last in the span, or the one that follows it at once."""
    inside = rendering.markers(text, start, end)
    if inside and not text[inside[-1].end() : end].strip():
        return inside[-1].end()
    following = rendering.markers(text, end, len(text))
    return following[0].end() if following and following[0].start() == end else end


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    at = 0
    for start, end in spans:
        yield text[at:start], False
        yield text[start:end], True
        at = end
    yield text[at:], False


def stop_strings(writer: JinjaWriter, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The marker that the template puts after an answer; () if it puts none or refuses the question."""
    conversation = [Message("user", "question"), Message("assistant", "answer"), Message("user", "more")]
    try:
        segments = writer.segments(conversation, purpose="show", tokenizer=tokenizer)
    except TemplateError:
        return ()
    places = [i for i, segment in enumerate(segments) if "answer" in segment.text and not segment.is_marker]
    following = segments[places[0] + 1 :] if places else []
    return tuple(segment.text for segment in following if segment.is_marker)[:1]
