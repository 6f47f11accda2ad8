"""Rewards that a program can check: a final answer, a form, the constraints of IFEval."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nemotron4.errors import ConfigError, DataError
from nemotron4.grading import answers as grade
from nemotron4.grading import instructions
from nemotron4.grading.score import Score
from nemotron4.training.policy_settings import RewardSource
from nemotron4.training.rollouts import Answer, Verdict

Check = Callable[[Answer], Score | float]


class Verifier:
    """A judge that looks at one answer at a time. Equal answers get equal rewards."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.identity = ""  # what it checks stands in the recipe and in the rows

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [self._judge(answer) for answer in answers]

    def _judge(self, answer: Answer) -> Verdict:
        try:
            found = self._check(answer)
        except DataError as error:  # the row's own arguments are wrong: no other answer would fare better
            return Verdict(None, error.message)
        if isinstance(found, Score):
            return Verdict(found.value, found.reason or "")
        return Verdict(found)


def verifier(source: RewardSource) -> Verifier:
    """The verifier of the recipe's kind; ConfigError for a pattern that is none."""
    if source.kind == "gsm8k":
        return Verifier(lambda answer: grade.gsm8k(answer.text, _reference(answer, source.answer_field)))
    if source.kind == "boxed":
        return Verifier(lambda answer: grade.boxed(answer.text, _reference(answer, source.answer_field)))
    if source.kind == "instructions":
        return Verifier(_share_followed)
    assert source.pattern is not None, "the recipe has checked it"
    try:
        pattern = re.compile(source.pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward pattern {source.pattern!r}: {error}") from error
    return Verifier(lambda answer: float(pattern.fullmatch(answer.text) is not None))


def _reference(answer: Answer, name: str) -> str:
    value = answer.fields[name]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"field {name!r} is {value!r}; expected a text or a number")


def _share_followed(answer: Answer) -> float:
    """The share of the row's instructions that the answer follows, strictly read."""
    names, arguments = answer.fields["instruction_id_list"], answer.fields["kwargs"]
    if not isinstance(names, list) or not names or not isinstance(arguments, list):
        raise DataError("instruction_id_list and kwargs are not two lists of one length, with an entry")
    given = [{k: v for k, v in (each or {}).items() if v is not None} for each in arguments]
    followed = instructions.follows(answer.text, names, given)
    return sum(followed) / len(followed)
