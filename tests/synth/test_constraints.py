"""Drawn constraints: all 25 types, arguments the graders take, no conflicts, three forms of prompt."""

from __future__ import annotations

import itertools
import random

import pytest

from nemotron4.grading.instructions import CHECKERS, check
from nemotron4.synth.constraints import DRAWERS, conflicts, draw_constraints

pytest.importorskip("langdetect")
pytest.importorskip("nltk")

PROMPT = "Explain how bridges are built across wide rivers and which materials engineers prefer."

# For each type an answer that follows it, written for any arguments that can be drawn.
FOLLOWS = {
    "keywords:existence": lambda a: " ".join(a["keywords"]),
    "keywords:frequency": lambda a: "so " + f"{a['keyword']} " * (
        a["frequency"] - (a["relation"] == "less than")
    ),
    "keywords:forbidden_words": lambda a: "Nothing of the kind.",
    "keywords:letter_frequency": lambda a: "a " + a["letter"] * (
        a["let_frequency"] - (a["let_relation"] == "less than")
    ),
    "language:response_language": lambda a: {
        "de": "Das ist eine ziemlich lange Antwort über die Brücken und die Flüsse im Norden.",
        "fr": "Voici une réponse assez longue sur les ponts et les rivières du nord de la France.",
        "es": "Esta es una respuesta bastante larga sobre los puentes y los ríos del norte de España.",
        "it": "Questa è una risposta piuttosto lunga sui ponti e sui fiumi che si trovano nel nord.",
        "pt": "Esta é uma resposta bastante longa sobre as pontes e os rios do norte; não há outra.",
    }[a["language"]],
    "length_constraints:number_sentences": lambda a: "This is one. " * (
        a["num_sentences"] - (a["relation"] == "less than")
    ),
    "length_constraints:number_paragraphs": lambda a: "\n***\n".join(
        f"Part {i}." for i in range(a["num_paragraphs"])
    ),
    "length_constraints:number_words": lambda a: "word " * (a["num_words"] - (a["relation"] == "less than")),
    "length_constraints:nth_paragraph_first_word": lambda a: "\n\n".join(
        a["first_word"].capitalize() + " it is." for _ in range(a["num_paragraphs"])
    ),
    "detectable_content:number_placeholders": lambda a: "[name] " * a["num_placeholders"],
    "detectable_content:postscript": lambda a: f"Text.\n\n{a['postscript_marker']} more",
    "detectable_format:number_bullet_lists": lambda a: "\n".join("* point" for _ in range(a["num_bullets"])),
    "detectable_format:constrained_response": lambda a: "My answer is maybe.",
    "detectable_format:number_highlighted_sections": lambda a: "*part* and " * a["num_highlights"],
    "detectable_format:multiple_sections": lambda a: "\n".join(
        f"{a['section_spliter']} {i + 1}\ntext" for i in range(a["num_sections"])
    ),
    "detectable_format:json_format": lambda a: '{"answer": 1}',
    "detectable_format:title": lambda a: "<<a day at sea>>\nText.",
    "combination:two_responses": lambda a: "One answer.\n******\nAnother answer.",
    "combination:repeat_prompt": lambda a: a["prompt_to_repeat"] + "\n\nThe answer.",
    "startend:end_checker": lambda a: f"Text. {a['end_phrase']}",
    "startend:quotation": lambda a: '"A text."',
    "change_case:capital_word_frequency": lambda a: "WORD " * (
        a["capital_frequency"] - (a["capital_relation"] == "less than")
    ) + "small",
    "change_case:english_capital": lambda a: "THIS IS AN ANSWER IN ENGLISH AND IN CAPITAL LETTERS.",
    "change_case:english_lowercase": lambda a: "this is an answer in english and in small letters.",
    "punctuation:no_comma": lambda a: "No such sign.",
}  # fmt: skip


def test_all_25_types_of_the_registry_are_offered() -> None:
    assert set(DRAWERS) == set(CHECKERS) == set(FOLLOWS)
    assert len(DRAWERS) == 25


@pytest.mark.parametrize("name", sorted(DRAWERS))
def test_drawn_arguments_are_gradable_and_can_be_followed(name: str) -> None:
    for seed in range(12):
        arguments, text = DRAWERS[name](random.Random(seed), PROMPT)
        assert text
        assert check(name, arguments, FOLLOWS[name](arguments)) is True, arguments
        for value in arguments.values():
            if isinstance(value, str | int) and name != "combination:repeat_prompt" and len(str(value)) > 2:
                said = {"less than": "fewer than", "de": "German"}.get(str(value), str(value))
                assert said.lower() in text.lower()


def test_no_drawn_set_holds_a_conflict() -> None:
    sizes = set()
    for seed in range(300):
        constraints = draw_constraints(PROMPT, 3, random.Random(seed))
        sizes.add(len(constraints))
        for first, second in itertools.combinations(constraints, 2):
            assert not conflicts(first.type, second.type)
    assert 3 in sizes


def test_conflicts_are_symmetric_and_leave_enough_partners() -> None:
    for first, second in itertools.product(DRAWERS, repeat=2):
        assert conflicts(first, second) == conflicts(second, first)
    lone = {"detectable_format:constrained_response", "combination:repeat_prompt"}
    for name in set(DRAWERS) - lone:
        assert sum(not conflicts(name, other) for other in DRAWERS) >= 5
