"""Rows for instructions that the demo model does not follow by itself: a good answer, edited and checked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from nemotron4.grading.instructions import follows
from nemotron4.synth.constraints import DRAWERS
from nemotron4.synth.stages.instructions import SINGLE

Edit = Callable[[str, Mapping[str, Any]], str]
PLACES = ["[name]", "[date]", "[address]", "[place]", "[number]"]


def _sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]+", " ".join(text.split()))


def _join(mark: str) -> Edit:
    """As many sentences as parts are asked for, with the mark between them."""

    def edit(text: str, wanted: Mapping[str, Any]) -> str:
        return mark.join(part.strip() for part in _sentences(text)[: wanted["num_paragraphs"]])

    return edit


def _nth(text: str, wanted: Mapping[str, Any]) -> str:
    parts = [part.strip() for part in _sentences(text)[: wanted["num_paragraphs"]]]
    at = wanted["nth_paragraph"] - 1
    if at < len(parts):
        parts[at] = f"{wanted['first_word'].capitalize()}, {parts[at][0].lower()}{parts[at][1:]}"
    return "\n\n".join(parts)


def _sections(text: str, wanted: Mapping[str, Any]) -> str:
    parts = _sentences(text)[: wanted["num_sections"]]
    return "\n\n".join(f"{wanted['section_spliter']} {n}\n{part.strip()}" for n, part in enumerate(parts, 1))


def _highlights(text: str, wanted: Mapping[str, Any]) -> str:
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{6,}\b", text)))[: wanted["num_highlights"]]
    for word in words:
        text = re.sub(rf"\b{word}\b", f"*{word}*", text, count=1)
    return text


def _capital_words(text: str, wanted: Mapping[str, Any]) -> str:
    if wanted["capital_relation"] == "less than":
        return text
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{5,}\b", text)))[: wanted["capital_frequency"]]
    for word in words:
        text = re.sub(rf"\b{word}\b", word.upper(), text, count=1)
    return text


def _bullets(text: str, wanted: Mapping[str, Any]) -> str:
    return "\n".join(f"* {part.strip()}" for part in _sentences(text)[: wanted["num_bullets"]])


def _two(text: str, wanted: Mapping[str, Any]) -> str:
    parts = [part.strip() for part in _sentences(text)]
    half = max(1, len(parts) // 2)
    return " ".join(parts[:half]) + "\n******\n" + " ".join(parts[half:])


EDITS: Mapping[str, Edit] = {
    "change_case:english_lowercase": lambda text, wanted: text.lower(),
    "change_case:english_capital": lambda text, wanted: text.upper(),
    "change_case:capital_word_frequency": _capital_words,
    "combination:repeat_prompt": lambda text, wanted: f"{wanted['prompt_to_repeat']}\n\n{text}",
    "combination:two_responses": _two,
    "detectable_content:number_placeholders": lambda text, wanted: (
        f"{text}\n\n{' '.join(PLACES[: wanted['num_placeholders']])}"
    ),
    "detectable_content:postscript": lambda text, wanted: (
        f"{text}\n\n{wanted['postscript_marker']} I hope this helps."
    ),
    "detectable_format:json_format": lambda text, wanted: (
        "```json\n" + json.dumps({"answer": text}) + "\n```"
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda text, wanted: f"<<{' '.join(text.split()[:3]).strip('.,')}>>\n\n{text}",
    "length_constraints:nth_paragraph_first_word": _nth,
    "length_constraints:number_paragraphs": _join("\n\n***\n\n"),
    "punctuation:no_comma": lambda text, wanted: text.replace(",", ""),
    "startend:end_checker": lambda text, wanted: f"{text} {wanted['end_phrase']}",
    "startend:quotation": lambda text, wanted: '"' + text.replace('"', "") + '"',
}
# Other words for the same wish, so that the model does not learn one sentence by heart.
SAID = {
    "change_case:english_lowercase": (
        "Use small letters only, no capitals at all.",
        "The reply has to be in English, all lowercase.",
    ),
    "change_case:english_capital": (
        "Reply in English and use capitals for every letter.",
        "ALL CAPS please.",
    ),
    "combination:two_responses": ("I want two different replies with ****** between them.",),
    "detectable_content:number_placeholders": ("Use {num_placeholders} or more placeholders as [address].",),
    "detectable_content:postscript": ("Finish with a postscript, starting with {postscript_marker}",),
    "detectable_format:json_format": ("Reply in JSON and nothing else.", "The entire reply must be JSON."),
    "detectable_format:number_bullet_lists": ("Write {num_bullets} bullet points, as in * this.",),
    "detectable_format:number_highlighted_sections": (
        "Use markdown to mark {num_highlights} or more *highlighted* pieces.",
    ),
    "detectable_format:title": (
        "Include a title inside double angular brackets, for example <<my title>>.",
        "Start with a title such as <<title>>.",
    ),
    "length_constraints:number_paragraphs": ("Make {num_paragraphs} paragraphs, with *** as the divider.",),
    "punctuation:no_comma": ("Avoid commas altogether.", "Commas are forbidden in the reply."),
    "startend:end_checker": ('The last words must be: "{end_phrase}" Add nothing after them.',),
    "startend:quotation": (
        "Wrap the complete reply in double quotes.",
        "Your reply starts and ends with a quotation mark.",
    ),
}


def edited(kept: list[tuple[Mapping[str, Any], str]], each: int) -> list[tuple[dict[str, Any], str]]:
    """(task, answer) rows, up to ``each`` a type, from answers to plain questions; every one was checked."""
    draw = random.Random(5)
    made: list[tuple[dict[str, Any], str]] = []
    for name, edit in EDITS.items():
        found = 0
        for task, answer in draw.sample(kept, len(kept)):
            wanted, said = DRAWERS[name](draw, task["question"])
            phrases = (said, *(phrase.format(**wanted) for phrase in SAID.get(name, ())))
            text = edit(answer, wanted)
            if found < each and follows(text, [name], [wanted]) == (True,):
                found += 1
                # Only the first form makes clear which words are to be repeated.
                form = SINGLE[0] if name == "combination:repeat_prompt" else draw.choice(SINGLE)
                question = form.format(prompt=task["question"], constraints=draw.choice(phrases))
                check = {"ids": [name], "kwargs": [dict(wanted)]}
                made.append(({"kind": "instruction", "question": question, "check": check}, text))
    return made
