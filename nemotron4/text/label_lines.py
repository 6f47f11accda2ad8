"""SteerLM label lines in formats without a place for them: the first line of an answer, which never trains.

``<|im_start|>assistant\\nquality:4,toxicity:0,...\\nThe answer<|im_end|>``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.segments import Purpose, Segment, TurnWriter
from nemotron4.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledWriter:
    """Another format's turns. Keys of ``lines`` are places of answers in the list of messages; the number of
    messages is the place of the answer to be generated.
    """

    inner: TurnWriter
    lines: Mapping[int, str]

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None
    ) -> list[Segment]:
        labelled = [self._with_line(place, message) for place, message in enumerate(messages)]
        segments = self.inner.segments(labelled, purpose=purpose, tokenizer=tokenizer)
        if purpose == "generate" and len(messages) in self.lines:
            segments = [*segments, Segment(f"{self.lines[len(messages)]}\n")]
        return [part for segment in segments for part in self._untrained_line(segment)]

    def _with_line(self, place: int, message: Message) -> Message:
        if place not in self.lines:
            return message
        if message.role.lower() != "assistant":
            raise TemplateError(
                f"messages[{place}] has a label and is from {message.role}; only answers have labels"
            )
        return Message(message.role, f"{self.lines[place]}\n{message.content}")

    def _untrained_line(self, segment: Segment) -> list[Segment]:
        """A trained stretch cut behind the label line that it starts with."""
        if segment.is_trained and not segment.is_marker:
            for line in self.lines.values():
                if segment.text.startswith(f"{line}\n"):
                    size = len(line) + 1
                    label = Segment(segment.text[:size])
                    return [label, replace(segment, text=segment.text[size:])]
        return [segment]
