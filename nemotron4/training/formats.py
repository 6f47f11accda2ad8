"""Rows of training data in the forms people have: ours, NeMo-Aligner's, NeMo-RL's, TRL's and OpenAI's.

A prompt that is a string is taken as already rendered; a list of messages is rendered by the model's format.
Every refusal names the field; the reader adds file and line. A missing value is never replaced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemotron4.records import (
    ATTRIBUTES,
    FieldError,
    JsonObject,
    Message,
    optional_number,
    parse_messages,
    require,
)

Kind = Literal[
    "pretrain", "sft", "steerlm", "steerlm_weighted", "preference", "kto", "reward", "reward_pairs", "prompts"
]
Prompt = str | tuple[Message, ...]
MISSING = -100.0
ALL_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    text: str


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """``labels``: SteerLM attributes before the answers at these places of ``messages``."""

    messages: tuple[Message, ...]
    labels: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """A rendered prompt and its answer, both plain text."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class PairRow:
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    prompt: Prompt
    answer: str
    is_desirable: bool


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """A conversation, or its rendered text, and the attributes that were judged."""

    conversation: Prompt
    attributes: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to be answered, and the whole row, in which judges find what they compare with."""

    prompt: Prompt
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WeightedResponse:
    """A sampled answer of SteerLM 2.0: log P(a|x,y), log P(y|x) and log Q(y|a,x), in nats."""

    text: str
    attributes_logprob: float
    prior_logprob: float
    proposal_logprob: float


@dataclass(frozen=True, kw_only=True)
class WeightedRow:
    """Answers drawn for one prompt and one set of attributes. ``prompt`` ends with the user's turn."""

    prompt: tuple[Message, ...]
    labels: Mapping[str, int]
    responses: tuple[WeightedResponse, ...]


Row = TextRow | ChatRow | AnswerRow | PairRow | JudgedRow | ScoredRow | PromptRow | WeightedRow


def parse(kind: Kind, row: JsonObject) -> Row:
    """The row as what the stage reads; FieldError names the field and what was expected."""
    if kind == "pretrain":
        return TextRow(text=_text(row, "text"))
    if kind == "sft":
        return _sft(row)
    if kind == "steerlm":
        return _labelled_chat(row)
    if kind == "steerlm_weighted":
        return _weighted(row)
    if kind == "prompts":
        return PromptRow(prompt=_open_prompt(row), fields=row)
    if kind == "kto":
        return _judged(row)
    return _scored(row) if kind == "reward" else _pair(row)


# ---- supervised fine-tuning


def _sft(row: JsonObject) -> Row:
    if "messages" in row:
        return ChatRow(messages=parse_messages(row, "messages"))
    if "conversations" in row:
        return _nemo_chat(row)
    for prompt, answer in (("input", "output"), ("prompt", "completion")):
        if prompt in row or answer in row:
            return _prompt_and_answer(row, prompt, answer)
    raise _no_form(row, "messages, conversations, input and output, or prompt and completion")


def _prompt_and_answer(row: JsonObject, prompt_name: str, answer_name: str) -> Row:
    prompt = _prompt(row, prompt_name)
    if isinstance(prompt, str):
        return AnswerRow(prompt=prompt, answer=_text(row, answer_name))
    return ChatRow(messages=(*prompt, Message("assistant", _answer(row, answer_name))))


def _nemo_chat(row: JsonObject) -> ChatRow:
    """``{"system", "mask", "type", "conversations": [{"from", "value", "label"}]}``."""
    turns = require(row, "conversations", list, "a list of turns")
    if not turns:
        raise FieldError("field 'conversations' is empty; expected at least one turn")
    kind = row.get("type")
    if kind not in (None, "VALUE_TO_TEXT"):
        raise FieldError(f"field 'type' is {kind!r}; expected null or 'VALUE_TO_TEXT'")
    messages = _system(row)
    labels: dict[int, Mapping[str, int]] = {}
    for i, turn in enumerate(turns):
        messages.append(_nemo_turn(turn, f"conversations[{i}]"))
        if kind == "VALUE_TO_TEXT" and turn.get("label") is not None:
            labels[len(messages) - 1] = _label(turn["label"], f"conversations[{i}].label")
    _check_mask(row, {message.role for message in messages})
    return ChatRow(messages=tuple(messages), labels=labels)


def _system(row: JsonObject) -> list[Message]:
    if row.get("system") is None:
        return []
    return [Message("system", require(row, "system", str, "a string"))]


def _nemo_turn(turn: object, where: str) -> Message:
    """``{"from", "value"}`` as a message."""
    if not isinstance(turn, dict):
        raise FieldError(f"{where} is not an object")
    try:
        role = require(turn, "from", str, "a string").lower()
        return Message(role, require(turn, "value", str, "a string"))
    except FieldError as error:
        raise FieldError(f"{where}: {error}") from None


def _check_mask(row: JsonObject, roles: set[str]) -> None:
    """The assistant's turns train and no other: a mask that says otherwise is refused, not ignored."""
    if "mask" not in row:
        return
    masked = {name.strip().lower() for name in require(row, "mask", str, "role names").split(",")}
    trained = roles - masked - {"system"}
    if trained - {"assistant"}:
        raise FieldError(
            f"field 'mask' is {row['mask']!r}, so {', '.join(sorted(trained))} would train; "
            "only the assistant's turns can"
        )
    if "assistant" in masked:
        raise FieldError(f"field 'mask' is {row['mask']!r}: it masks the assistant, so nothing would train")


def _label(value: object, where: str) -> Mapping[str, int]:
    """``quality:4,toxicity:0,...`` as numbers."""
    if not isinstance(value, str):
        raise FieldError(f"{where} is {value!r}; expected 'name:number,...'")
    try:
        pairs = [part.split(":") for part in value.strip().split(",")]
        return {name.strip(): int(number) for name, number in pairs}
    except ValueError:
        raise FieldError(f"{where} is {value!r}; expected 'name:number,...'") from None


# ---- SteerLM

# NeMo-Aligner's names of the three numbers that weigh an answer.
WEIGHT_FIELDS = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")


def _labelled_chat(row: JsonObject) -> ChatRow:
    """A row of type VALUE_TO_TEXT in which at least one answer has a label."""
    chat = _nemo_chat(row)
    if not chat.labels:
        raise FieldError("no answer has a label; expected type 'VALUE_TO_TEXT' and a label beside an answer")
    return chat


def _weighted(row: JsonObject) -> WeightedRow:
    """``{"system", "prompt_turns", "label", "responses": [{"from", "value", "log(P(a|x,y))", ...}]}``."""
    turns = require(row, "prompt_turns", list, "a list of turns")
    if len(turns) % 2 == 0:
        raise FieldError(
            f"field 'prompt_turns' has {len(turns)} turns; expected an odd number, a user's last"
        )
    messages = [*_system(row), *(_nemo_turn(t, f"prompt_turns[{i}]") for i, t in enumerate(turns))]
    if messages[-1].role != "user":
        raise FieldError(f"field 'prompt_turns' ends with {messages[-1].role}; expected the user's turn")
    responses = require(row, "responses", list, "a list of answers")
    if len(responses) < 2:
        raise FieldError(f"field 'responses' has {len(responses)} entries; weights compare two or more")
    return WeightedRow(
        prompt=tuple(messages),
        labels=_label(row.get("label"), "field 'label'"),
        responses=tuple(_response(value, f"responses[{i}]") for i, value in enumerate(responses)),
    )


def _response(value: object, where: str) -> WeightedResponse:
    message = _nemo_turn(value, where)
    assert isinstance(value, dict), "a turn is an object"
    if message.role != "assistant":
        raise FieldError(f"{where} is from {message.role}; expected the assistant")
    numbers = []
    for name in WEIGHT_FIELDS:
        number = _finite(value, name)
        if number is None:
            raise FieldError(f"{where}: field {name!r} is missing; expected a log-probability")
        numbers.append(number)
    return WeightedResponse(
        text=message.content,
        attributes_logprob=numbers[0],
        prior_logprob=numbers[1],
        proposal_logprob=numbers[2],
    )


# ---- prompts


def _open_prompt(row: JsonObject) -> Prompt:
    """``prompt`` or ``messages``, a text or messages that end before an answer; or NeMo's ``text``."""
    name = next((name for name in ("prompt", "messages", "text") if name in row), None)
    if name is None:
        raise _no_form(row, "prompt, messages or text")
    prompt = _prompt(row, name)
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise FieldError(f"field {name!r} ends with an assistant's message; expected the turn to be answered")
    if not prompt:
        raise FieldError(f"field {name!r} is empty; expected a prompt")
    return prompt


# ---- preferences


def _pair(row: JsonObject) -> PairRow:
    if "completions" in row:
        return _nemo_rl_pair(row)
    if "response_1" in row:
        return _helpsteer_pair(row)
    names = ("chosen_response", "rejected_response") if "chosen_response" in row else ("chosen", "rejected")
    missing = [name for name in names if name not in row]
    if missing:
        raise FieldError(
            f"field {missing[0]!r} is missing; expected {names[0]} and {names[1]}, or context and completions"
        )
    if "prompt" not in row:
        return _implicit_pair(row)
    return _rewarded(row, _prompt(row, "prompt"), _answer(row, names[0]), _answer(row, names[1]))


def _rewarded(row: JsonObject, prompt: Prompt, chosen: str, rejected: str) -> PairRow:
    return PairRow(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_reward=_finite(row, "chosen_reward"),
        rejected_reward=_finite(row, "rejected_reward"),
        strength=_finite(row, "margin"),
    )


def _implicit_pair(row: JsonObject) -> PairRow:
    """TRL: two whole conversations whose common beginning is the prompt."""
    if isinstance(row["chosen"], str):
        raise FieldError("field 'prompt' is missing; two strings have no certain common prompt")
    chosen, rejected = parse_messages(row, "chosen"), parse_messages(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise FieldError("chosen and rejected differ before their last message; expected one common prompt")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant" or len(messages) < 2:
            raise FieldError(f"field {name!r} does not end with an assistant's answer to a prompt")
    return _rewarded(row, chosen[:-1], chosen[-1].content, rejected[-1].content)


def _nemo_rl_pair(row: JsonObject) -> PairRow:
    """``{"context", "completions": [{"rank", "completion": [...], "reward"?}, ...]}``; rank 0 is best."""
    context = parse_messages(row, "context")
    completions = require(row, "completions", list, "a list of two completions")
    if len(completions) != 2 or not all(isinstance(item, dict) for item in completions):
        raise FieldError(f"field 'completions' has {len(completions)} entries; expected two objects")
    ranks = [require(item, "rank", int, "an integer") for item in completions]
    if ranks[0] == ranks[1]:
        raise FieldError(f"both completions have rank {ranks[0]}; expected different ranks, 0 the best")
    best, worst = sorted(completions, key=lambda item: int(item["rank"]))
    return PairRow(
        prompt=context,
        chosen=_answer(best, "completion"),
        rejected=_answer(worst, "completion"),
        chosen_reward=_finite(best, "reward"),
        rejected_reward=_finite(worst, "reward"),
    )


def _helpsteer_pair(row: JsonObject) -> PairRow:
    """HelpSteer2-Preference: ``preference_strength`` -3..3, negative when response 1 is better."""
    strength = float(require(row, "preference_strength", (int, float), "a number from -3 to 3"))
    first, second = _text(row, "response_1"), _text(row, "response_2")
    if strength == 0:
        raise FieldError("field 'preference_strength' is 0: neither response is better")
    chosen, rejected = (first, second) if strength < 0 else (second, first)
    prompt = (Message("user", _text(row, "prompt")),)
    return PairRow(prompt=prompt, chosen=chosen, rejected=rejected, strength=abs(strength))


def _judged(row: JsonObject) -> JudgedRow:
    if "preference" in row:
        value = row["preference"]
        if value not in ("chosen", "rejected"):
            raise FieldError(f"field 'preference' is {value!r}; expected 'chosen' or 'rejected'")
        return JudgedRow(
            prompt=_prompt(row, "prompt"), answer=_answer(row, "response"), is_desirable=value == "chosen"
        )
    is_desirable = require(row, "label", bool, "true or false")
    return JudgedRow(
        prompt=_prompt(row, "prompt"), answer=_answer(row, "completion"), is_desirable=is_desirable
    )


# ---- reward


def _scored(row: JsonObject) -> ScoredRow:
    if "attributes" in row:
        given = require(row, "attributes", dict, f"an object with some of {', '.join(ALL_ATTRIBUTES)}")
        values = {name: _finite(given, name) for name in given}
        attributes = {name: value for name, value in values.items() if value is not None}
        return ScoredRow(conversation=_judged_messages(row), attributes=_known(attributes))
    if "text" in row and "label" in row:
        return ScoredRow(conversation=_text(row, "text"), attributes=_nemo_label(row))
    if "prompt" in row and "response" in row:
        names = [name for name in ALL_ATTRIBUTES if name in row]
        if not names:
            raise FieldError(f"no attribute is there; expected some of {', '.join(ALL_ATTRIBUTES)}")
        found = {name: _finite(row, name) for name in names}
        messages = (Message("user", _text(row, "prompt")), Message("assistant", _text(row, "response")))
        return ScoredRow(conversation=messages, attributes={n: v for n, v in found.items() if v is not None})
    raise _no_form(row, "messages and attributes, text and label, or prompt, response and attributes")


def _judged_messages(row: JsonObject) -> tuple[Message, ...]:
    messages = parse_messages(row, "messages")
    if messages[-1].role != "assistant":
        raise FieldError(f"field 'messages' ends with {messages[-1].role}; expected the judged answer")
    return messages


def _nemo_label(row: JsonObject) -> dict[str, float]:
    values = require(row, "label", list, f"{len(ALL_ATTRIBUTES)} numbers")
    if len(values) != len(ALL_ATTRIBUTES) or not all(_is_number(value) for value in values):
        raise FieldError(
            f"field 'label' is {values!r}; expected {len(ALL_ATTRIBUTES)} numbers, -100 for none"
        )
    named = zip(ALL_ATTRIBUTES, values, strict=True)
    return {name: float(value) for name, value in named if float(value) != MISSING}


def _known(attributes: dict[str, float]) -> dict[str, float]:
    for name in attributes:
        if name not in ALL_ATTRIBUTES:
            raise FieldError(f"attributes has {name!r}; expected some of {', '.join(ALL_ATTRIBUTES)}")
    return attributes


# ---- fields


def _prompt(row: JsonObject, name: str) -> Prompt:
    if isinstance(row.get(name), str):
        return str(row[name])
    return parse_messages(row, name)


def _answer(row: JsonObject, name: str) -> str:
    """A string, or one assistant message in a list."""
    if not isinstance(row.get(name), list):
        return _text(row, name)
    messages = parse_messages(row, name)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise FieldError(f"field {name!r} has {len(messages)} messages; expected one of the assistant")
    return messages[0].content


def _text(row: Mapping[str, Any], name: str) -> str:
    return str(require(row, name, str, "a string"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(row: JsonObject, name: str) -> float | None:
    value = optional_number(row, name)
    if value is not None and not math.isfinite(value):
        raise FieldError(f"field {name!r} is {value}; expected a finite number")
    return value


def _no_form(row: JsonObject, expected: str) -> FieldError:
    return FieldError(f"the row has fields {', '.join(sorted(row)) or 'none'}; expected {expected}")
