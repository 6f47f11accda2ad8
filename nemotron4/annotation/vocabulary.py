"""What people are asked in a study, and what one of them said of one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron4.errors import DataError, unknown
from nemotron4.json_form import JsonForm
from nemotron4.records import ATTRIBUTES

MAX_HANDLE = 64
MAX_TEXT = 200_000


@dataclass(frozen=True)
class Question(JsonForm):
    """``options`` (value -> meaning) make a choice, whole numbers in order a scale; without them it is text.

    ``of_answer``: asked of each answer, not of the whole item. ``shows_answer``: the text starts as the
    answer's own, which a person rewrites.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    is_scale: bool = False
    of_answer: bool = False
    shows_answer: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name.replace("_", " "))

    @property
    def is_text(self) -> bool:
        return not self.options

    @property
    def labels(self) -> list[Any]:
        """The values that may be said, in their order."""
        return [int(name) for name in self.options] if self.is_scale else list(self.options)

    def check(self, value: object) -> None:
        """DataError unless it is a value of this question; None takes an earlier one back."""
        if value is None:
            return
        if self.is_text:
            if not isinstance(value, str) or len(value) > MAX_TEXT:
                raise DataError(f"{self.name} is not a text of at most {MAX_TEXT:,} characters")
        elif self.is_scale:
            low, high = self.labels[0], self.labels[-1]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                words = [
                    f"{number} ({word})" if word else str(number) for number, word in self.options.items()
                ]
                raise DataError(f"{self.name} is {value!r}; expected a whole number: {', '.join(words)}")
        elif value not in self.options:
            raise unknown(self.name, str(value), self.options, DataError)


@dataclass(frozen=True)
class Vocabulary:
    """The questions of one kind of study. ``main`` is the one whose answer is an item's state in a list.

    ``is_blind``: nobody sees what others said, or which model wrote an answer.
    """

    kind: str
    questions: tuple[Question, ...]
    main: str
    is_blind: bool = False

    def question(self, name: str) -> Question:
        for each in self.questions:
            if each.name == name:
                return each
        raise unknown("question", name, [each.name for each in self.questions], DataError)

    def check(self, values: Mapping[str, object], *, of_answer: bool) -> None:
        for name, value in values.items():
            question = self.question(name)
            if question.of_answer != of_answer:
                raise DataError(
                    f"{name} is asked of {'an answer' if question.of_answer else 'the whole item'}"
                )
            question.check(value)


def scale(low: int, words: Sequence[str]) -> dict[str, str]:
    """The options of a scale: its numbers from ``low`` with the word for each."""
    return {str(low + at): word for at, word in enumerate(words)}


# HelpSteer's five attributes, from 0 to 4, asked of each answer.
ATTRIBUTE_QUESTIONS = tuple(
    Question(name, scale(0, ("",) * 5), is_scale=True, of_answer=True) for name in ATTRIBUTES
)


@dataclass(frozen=True, kw_only=True)
class Annotation(JsonForm):
    """What one annotator says of an item, or of one ``answer`` of it. ``at`` is ISO 8601, UTC."""

    item: str
    answer: str = ""
    annotator: str
    at: str = ""
    values: Mapping[str, Any]


def check_annotator(name: object) -> str:
    """A handle: who said it."""
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_HANDLE or not name.isprintable():
        raise DataError(
            f"annotator is {str(name)[:80]!r}; expected a handle of 1 to {MAX_HANDLE} printable characters"
        )
    return name.strip()


def by_majority(said: Sequence[Any]) -> Any:
    """What more than half say; None without such a majority."""
    return next((value for value in set(said) if said.count(value) * 2 > len(said)), None)
