"""Figures of a study: how far people agree, and how far they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nemotron4.annotation.vocabulary import Annotation, Vocabulary, by_majority
from nemotron4.grading.statistics import Agreement, agreement_table, cohen_kappa
from nemotron4.json_form import JsonForm
from nemotron4.records import JsonObject
from nemotron4.report import Table


@dataclass(frozen=True)
class PairAgreement(JsonForm):
    """Two annotators on what both judged, by question; scales with quadratic weights."""

    first: str
    second: str
    questions: Mapping[str, Agreement]

    def table(self) -> Table:
        return agreement_table(f"Agreement of {self.first} and {self.second} (Cohen's kappa)", self.questions)


def agreements(judgments: Sequence[Annotation], vocabulary: Vocabulary) -> tuple[PairAgreement, ...]:
    """Every pair of annotators who judged the same thing."""
    said: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = defaultdict(dict)
    for each in judgments:
        said[each.annotator][each.item, each.answer] = each.values
    found = []
    for first, second in combinations(sorted(said), 2):
        common = sorted(said[first].keys() & said[second].keys())
        questions = {}
        for question in vocabulary.questions:
            if question.is_text:
                continue
            pairs = [
                (said[first][key][question.name], said[second][key][question.name])
                for key in common
                if question.name in said[first][key] and question.name in said[second][key]
            ]
            if pairs:
                questions[question.name] = cohen_kappa(
                    [one for one, _ in pairs],
                    [other for _, other in pairs],
                    question.labels,
                    weights="quadratic" if question.is_scale else "equal",
                )
        if questions:
            found.append(PairAgreement(first, second, questions))
    return tuple(found)


def state_of(judgments: Sequence[Annotation], vocabulary: Vocabulary) -> str:
    """One word for a list: what most say to the main question, ``unclear`` without a majority."""
    said = [judgment.values[vocabulary.main] for judgment in judgments if vocabulary.main in judgment.values]
    if not said:
        return "judged" if judgments else "open"
    if vocabulary.question(vocabulary.main).of_answer:
        return "judged"
    return str(by_majority(said) or "unclear")


def has_state(judgments: Sequence[Annotation], state: str, vocabulary: Vocabulary, annotator: str) -> bool:
    """``all``, ``open`` (by nobody), ``mine`` (not by me), ``differ``, or ``question=value`` (``*``: any)."""
    match state:
        case "" | "all":
            return True
        case "open":
            return state_of(judgments, vocabulary) in ("open", "judged") and not any(
                vocabulary.main in judgment.values for judgment in judgments
            )
        case "mine":
            return not any(judgment.annotator == annotator for judgment in judgments)
        case "differ":
            return _differs(judgments)
    name, _, value = state.partition("=")
    vocabulary.question(name)
    said = [str(judgment.values[name]) for judgment in judgments if name in judgment.values]
    return bool(said) and (value == "*" or value in said)


def _differs(judgments: Sequence[Annotation]) -> bool:
    """Whether two annotators gave different values to one question (texts aside)."""
    seen: dict[tuple[str, str], Any] = {}
    for judgment in judgments:
        for name, value in judgment.values.items():
            is_text = isinstance(value, str) and len(value) >= 40
            if not is_text and seen.setdefault((judgment.answer, name), value) != value:
                return True
    return False


def states(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """What a list can be filtered by, with its words."""
    found = [("all", "all"), ("open", "not judged"), ("mine", "not judged by me")]
    if not vocabulary.is_blind:
        found.append(("differ", "people differ"))
    for question in vocabulary.questions:
        title = question.title or question.name.replace("_", " ")
        if question.is_text:
            found.append((f"{question.name}=*", f"with {title}"))
        elif question.name == vocabulary.main and not question.of_answer:
            found += [(f"{question.name}={name}", f"{title}: {name}") for name in question.options]
    return found


def progress(judgments: Mapping[str, Sequence[Annotation]], num_items: int | None) -> JsonObject:
    """How many items are judged, and by whom."""
    people: dict[str, set[str]] = defaultdict(set)
    for item, said in judgments.items():
        for judgment in said:
            people[judgment.annotator].add(item)
    return {
        "items": num_items,
        "judged": len(judgments),
        "by_annotator": {name: len(items) for name, items in sorted(people.items())},
    }
