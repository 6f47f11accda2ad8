"""SteerLM: answers written for given attributes; of 2.0, sampled ones weighted by how well they have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from nemotron4.records import FieldError, Message
from nemotron4.training import rows
from nemotron4.training.encoding import Encoder, RowKind
from nemotron4.training.rows import Fields
from nemotron4.training.samples import Sample
from nemotron4.training.stage import Objective, Stage
from nemotron4.training.stages.sft import ChatKind, ChatRow, conversation

# NeMo-Aligner's names of the three numbers that weigh an answer.
WEIGHT_FIELDS = ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))")


@dataclass(frozen=True, kw_only=True)
class SteerlmSection:
    """``conditioned``: the likelihood of labelled answers. ``weighted``: SteerLM 2.0, on weighted samples."""

    objective: Literal["conditioned", "weighted"] = "conditioned"


@dataclass(frozen=True, kw_only=True)
class WeightedResponse:
    """A sampled answer: log P(a|x,y), log P(y|x) and log Q(y|a,x), in nats."""

    text: str
    numbers: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class WeightedRow:
    """Answers drawn for one prompt and one set of attributes. ``prompt`` ends with the user's turn."""

    prompt: tuple[Message, ...]
    labels: Mapping[str, int]
    responses: tuple[WeightedResponse, ...]


class LabelledKind(ChatKind):
    """NeMo-Aligner's ``conversations`` of type VALUE_TO_TEXT in which at least one answer has a label."""

    name = "steerlm"

    def parse(self, row: Fields) -> ChatRow:
        chat = conversation(row)
        if not chat.labels:
            raise FieldError(
                "no answer has a label; expected type 'VALUE_TO_TEXT' and a label with an answer"
            )
        return chat


class WeightedKind(RowKind):
    """``{"system", "prompt_turns", "label", "responses": [{"from", "value", "log(P(a|x,y))", ...}]}``."""

    name = "steerlm_weighted"

    def parse(self, row: Fields) -> WeightedRow:
        turns = row.require("prompt_turns", list, "a list of turns")
        if len(turns) % 2 == 0:
            raise FieldError(
                f"field 'prompt_turns' has {len(turns)} turns; expected an odd number, a user's last"
            )
        prompt = (*rows.system(row), *rows.messages(row, "prompt_turns"))
        if prompt[-1].role != "user":
            raise FieldError(f"field 'prompt_turns' ends with {prompt[-1].role}; expected the user's turn")
        responses = row.require("responses", list, "a list of answers")
        if len(responses) < 2:
            raise FieldError(f"field 'responses' has {len(responses)} entries; weights compare two or more")
        return WeightedRow(
            prompt=prompt,
            labels=rows.label_values(row.get("label"), "field 'label'"),
            responses=tuple(_response(value, f"responses[{i}]", row) for i, value in enumerate(responses)),
        )

    def sample(self, row: WeightedRow, encoder: Encoder) -> Sample:
        """A segment for each answer; labels are its three numbers, one answer after the other."""
        segments = tuple(encoder.labelled_answer(row.prompt, row.labels, r.text) for r in row.responses)
        return Sample(segments, tuple(number for r in row.responses for number in r.numbers))

    def numbers(self, row: WeightedRow) -> Mapping[str, float]:
        return {"turns": float(len(row.prompt) + 1), "answers": float(len(row.responses))}


def _response(value: object, where: str, row: Fields) -> WeightedResponse:
    given = dict(value) if isinstance(value, dict) else value
    weights = Fields({n: given.pop(n, None) for n in WEIGHT_FIELDS} if isinstance(given, dict) else {})
    message = rows.message(given, where, row)
    if message.role != "assistant":
        raise FieldError(f"{where} is from {message.role}; expected the assistant")
    numbers = []
    for name in WEIGHT_FIELDS:
        number = weights.number(name)
        if number is None:
            raise FieldError(f"{where}: field {name!r} is missing; expected a log-probability")
        numbers.append(number)
    return WeightedResponse(text=rows.plain_answer(message, where), numbers=tuple(numbers))


class SteerlmStage(Stage):
    name = "steerlm"
    section = SteerlmSection
    kinds = (LabelledKind(), WeightedKind())
    examples: ClassVar = {"steerlm": {}, "steerlm2": {"objective": "weighted"}}

    def kind(self, settings: SteerlmSection) -> RowKind:
        return self.kinds[settings.objective == "weighted"]

    def objective(self, settings: SteerlmSection) -> Objective:
        from nemotron4.training.objectives import LikelihoodObjective, WeightedObjective

        return WeightedObjective() if settings.objective == "weighted" else LikelihoodObjective()


STAGE = SteerlmStage()
