"""ChatML: every message between ``<|im_start|>role`` and ``<|im_end|>``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.errors import TemplateError, unknown_name
from nemotron4.records import Message
from nemotron4.text.segments import Purpose, Segment
from nemotron4.text.tokenizer import Tokenizer

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
STOP_STRINGS = (TURN_END, TURN_START, "<|endoftext|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{TURN_START}' + message['role'] | lower + '\\n' + message['content'] + '{TURN_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN_START}assistant\\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True)
class ChatMLWriter:
    """An answer and its ``<|im_end|>`` train, if a turn stands before it; the line break after does not."""

    def segments(
        self, messages: Sequence[Message], *, purpose: Purpose, tokenizer: Tokenizer | None = None
    ) -> list[Segment]:
        segments: list[Segment] = []
        has_turn = False
        for place, message in enumerate(messages):
            role = message.role.lower()
            if role not in ROLES:
                wording, hint = unknown_name("role", message.role, ROLES)
                raise TemplateError(f"messages[{place}]: {wording}", hint=hint)
            is_trained = role == "assistant" and has_turn
            has_turn = has_turn or role != "system"
            segments += [
                Segment(TURN_START, is_marker=True),
                Segment(f"{role}\n"),
                Segment(message.content, is_trained=is_trained),
                Segment(TURN_END, is_marker=True, is_trained=is_trained),
                Segment("\n"),
            ]
        if purpose == "generate":
            segments += [Segment(TURN_START, is_marker=True), Segment("assistant\n")]
        return segments
