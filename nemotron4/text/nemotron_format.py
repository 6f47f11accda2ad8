"""The prompt of Nemotron-4: the model card's template, NeMo's system and label lines, the reward text.

Sources: the card of Nemotron-4-340B-Instruct; NeMo ``gpt_sft_chat_dataset.py`` (system text, labels, which
tokens train); NeMo-Aligner ``data/nlp/builders.py`` and ``tools/human_feedback`` (reward text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemotron4.errors import TemplateError, unknown_name
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.text.segments import Purpose, Segment
from nemotron4.text.tokenizer import Tokenizer

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
    ) -> list[Segment]:
        system, num_system = _system_text(messages), int(_has_system(messages))
        segments = [Segment(SYSTEM_TURN_START, is_marker=True), Segment(f"System\n{system}\n")]
        was_trained = False
        for place, message in enumerate(messages[num_system:], start=num_system):
            name = ROLE_NAMES.get(message.role.lower())
            if name is None:
                raise _bad_role(message, place)
            # The first turn never trains, even an assistant's; the marker after an answer is the stop signal.
            is_trained = name == "Assistant" and place > num_system
            segments.append(Segment(TURN_START, is_marker=True, is_trained=was_trained))
            segments += self._header(name, place)
            segments.append(Segment(f"{message.content}\n", is_trained=is_trained))
            was_trained = is_trained
        if purpose == "generate":
            segments.append(Segment(TURN_START, is_marker=True, is_trained=was_trained))
            segments += self._header("Assistant", len(messages))
        elif purpose == "train" and was_trained:
            segments.append(Segment(TURN_START, is_marker=True, is_trained=True))
        return segments

    def _header(self, name: str, place: int) -> list[Segment]:
        if place not in self.labels:
            return [Segment(f"{name}\n")]
        if name != "Assistant":
            raise TemplateError(
                f"messages[{place}] has a label and is a {name} turn; only answers have labels"
            )
        label = Segment(f"{self.labels[place]}\n")
        return [Segment(f"{name}\n"), Segment(LABEL_START, is_marker=True), label]


def reward_segments(messages: Sequence[Message]) -> list[Segment]:
    """A conversation for the reward model: its system text, the turns, and the marker where it is read."""
    if not messages or messages[-1].role.lower() != "assistant":
        last = messages[-1].role if messages else "nothing"
        raise TemplateError(
            f"the conversation ends with {last}; expected the assistant's answer to be judged"
        )
    if not _has_system(messages):
        messages = [Message("system", REWARD_SYSTEM), *messages]
    turns = NemotronWriter().segments(messages, purpose="show")
    return [*turns, Segment(LABEL_START, is_marker=True)]


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
