"""Sources of topics: macro topics, subtopics, given lists, and the classifier that sorts keywords."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.client import Sampling
from nemotron4.records import JsonObject, text_lines
from nemotron4.synth.files import local_file
from nemotron4.synth.rows import Root, Row, Topic
from nemotron4.synth.stage import Context, Filtered, Kind
from nemotron4.synth.stages.asking import LIST_PROMPTS, ask_list, ask_yes_no

AREAS = ("general", "math", "python")
TOPIC_CHARACTERS = 120


@dataclass(frozen=True)
class MacroTopicKnobs:
    """``n`` topics for each root. More roots can be worked on in parallel and by several shards."""

    n: int = 20
    roots: int = 1
    area: str = "general"
    levels: tuple[str, ...] = (
        "elementary school", "middle school", "high school", "first years of university",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _check_area(self.area)
        if self.n < 1 or self.roots < 1:
            raise ValueError(f"n is {self.n} and roots is {self.roots}; expected 1 or more")


@dataclass(frozen=True)
class SubtopicKnobs:
    """``combine``: the topic itself is kept with its subtopics."""

    n: int = 5
    combine: bool = True


@dataclass(frozen=True)
class GivenTopicKnobs:
    """Topics written in the recipe or in a text file with one a line."""

    topics: tuple[str, ...] = ()
    file: Path | None = None
    area: str = "general"
    limit: int = 0

    def __post_init__(self) -> None:
        _check_area(self.area)
        if not self.topics and self.file is None:
            raise ValueError("topics and file are both empty; expected one of them")


@dataclass(frozen=True)
class EntityKnobs:
    """Which question decides: is the keyword mathematics, or Python?"""

    area: str = "math"

    def __post_init__(self) -> None:
        if self.area not in ("math", "python"):
            raise ValueError(f"area is {self.area!r}; expected 'math' or 'python'")


def _check_area(area: str) -> None:
    if area not in AREAS:
        raise ValueError(f"area is {area!r}; expected one of {', '.join(AREAS)}")


def macro_roots(knobs: MacroTopicKnobs) -> Iterator[JsonObject]:
    """One request per root; for mathematics one per school level and root."""
    for _ in range(knobs.roots):
        if knobs.area == "math":
            yield from ({"level": level} for level in knobs.levels)
        else:
            yield {}


async def macro_topics(root: Root, context: Context, knobs: MacroTopicKnobs) -> Sequence[Row]:
    """Root -> n topics."""
    name = {"general": "macro_topics", "math": "math_macro_topics", "python": "python_macro_topics"}[
        knobs.area
    ]
    level = root.entry.get("level")
    values = {"n": knobs.n} | ({"level": level} if level else {})
    found = await ask_list(
        context, context.prompt(name, **values), knobs.n, is_single_line=True, max_characters=TOPIC_CHARACTERS
    )
    return [Topic(topic=text, area=knobs.area, level=level) for text in found]


async def subtopics(topic: Topic, context: Context, knobs: SubtopicKnobs) -> Sequence[Row]:
    """Topic -> n narrower topics, and with ``combine`` the topic itself."""
    name = {"general": "subtopics", "math": "math_subtopics", "python": "python_subtopics"}[topic.area]
    question = context.prompt(name, n=knobs.n, topic=topic.topic)
    found = await ask_list(context, question, knobs.n, is_single_line=True, max_characters=TOPIC_CHARACTERS)
    made = [Topic(topic=text, area=topic.area, above=topic.topic, level=topic.level) for text in found]
    return [topic, *made] if knobs.combine else made


def given_roots(knobs: GivenTopicKnobs) -> Iterator[JsonObject]:
    """The topics of the recipe, then those of the file."""
    texts = list(knobs.topics)
    if knobs.file is not None:
        lines = [line.strip() for _, line in text_lines(local_file(knobs.file))]
        texts += [line for line in lines if line and not line.startswith("#")]
    for text in texts[: knobs.limit or None]:
        yield {"topic": text}


async def given_topics(root: Root, context: Context, knobs: GivenTopicKnobs) -> Sequence[Row]:
    """Root -> its topic."""
    return [Topic(topic=root.entry["topic"], area=knobs.area)]


async def classify_entity(topic: Topic, context: Context, knobs: EntityKnobs) -> Sequence[Row]:
    """Keep a keyword if the first word of the model's answer is Yes."""
    question = context.prompt(f"{knobs.area}_classifier", entity=topic.topic)
    if await ask_yes_no(context, question):
        return [Topic(topic=topic.topic, area=knobs.area)]
    raise Filtered(f"not {knobs.area}", f"the model says {topic.topic!r} is no matter of {knobs.area}")


KINDS = {
    "macro_topics": Kind(
        summary="a model names broad topics",
        takes=(), makes=Topic, knobs=MacroTopicKnobs, roots=macro_roots, run=macro_topics,
        prompts=("macro_topics", "math_macro_topics", "python_macro_topics", *LIST_PROMPTS),
        sampling=Sampling(temperature=0.7, top_p=0.7, max_tokens=1024),
        calls=lambda knobs: -(-knobs.n // 20), fan_out=lambda knobs: knobs.n,
    ),
    "subtopics": Kind(
        summary="a model names narrower topics within each topic",
        takes=(Topic,), makes=Topic, knobs=SubtopicKnobs, run=subtopics,
        prompts=("subtopics", "math_subtopics", "python_subtopics", *LIST_PROMPTS),
        sampling=Sampling(temperature=0.7, top_p=0.7, max_tokens=1024),
        calls=lambda knobs: -(-knobs.n // 20), fan_out=lambda knobs: knobs.n + knobs.combine,
    ),
    "given_topics": Kind(
        summary="topics or keywords from the recipe or a file",
        takes=(), makes=Topic, knobs=GivenTopicKnobs, roots=given_roots, run=given_topics,
    ),
    "entity_filter": Kind(
        summary="a model says whether a keyword belongs to mathematics or Python",
        takes=(Topic,), makes=Topic, knobs=EntityKnobs, run=classify_entity,
        prompts=("math_classifier", "python_classifier"),
        sampling=Sampling(temperature=0.0, max_tokens=4),
        calls=lambda knobs: 1, fan_out=lambda knobs: 0.7,
    ),
}  # fmt: skip
