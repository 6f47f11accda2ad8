"""Stages that let rows pass or drop them, each with a rule that is counted and a reason that is kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.client import Sampling
from nemotron4.grading.refusals import is_refusal
from nemotron4.synth import filters
from nemotron4.synth.duplicates import (
    SHORT_CHARACTERS,
    differ_in_maths,
    find_alike,
    find_near_duplicates,
    find_similar_words,
    unpack_vectors,
)
from nemotron4.synth.files import digests
from nemotron4.synth.parsing import normalise
from nemotron4.synth.rows import (
    Answered,
    ColumnRow,
    Dialogue,
    Document,
    JudgedPair,
    Prompt,
    Response,
    Row,
    Topic,
    digest,
)
from nemotron4.synth.stage import BarrierFunction, Context, Drop, Filtered, Kind, NoSettings
from nemotron4.synth.stages.asking import ask_yes_no
from nemotron4.synth.words import check_language, count_words, maths, wrong_language

Likeness = Mapping[int, tuple[int, float]]  # later text -> earlier one, and how like it is
TEXT_ROWS = (Prompt, Answered, JudgedPair, Dialogue, ColumnRow)
COMPARED_ROWS = (Topic, Document, *TEXT_ROWS)  # duplicates can be found among topics too


@dataclass(frozen=True)
class QualityKnobs:
    """Limits in words; 0 is no limit. ``language`` is a two-letter code, empty for any."""

    min_words: int = 3
    max_words: int = 0
    drop_repetition: bool = True
    drop_refusals: bool = True
    drop_truncated: bool = True
    language: str = ""


@dataclass(frozen=True)
class NearDedupKnobs:
    threshold: float = 0.75

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; expected from 0.5 to 1 (Jaccard)")


@dataclass(frozen=True)
class DiversityKnobs:
    threshold: float = 0.7


@dataclass(frozen=True)
class DecontaminateKnobs:
    """Benchmark files (JSON lines, .gz allowed) whose items must not be trained on."""

    files: tuple[Path, ...]


@dataclass(frozen=True)
class SplitKnobs:
    """Keeps one part of the prompts, by their text: the parts of equal ``share`` are disjoint."""

    part: str = "sft"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.part not in ("sft", "preference"):
            raise ValueError(f"part is {self.part!r}; expected 'sft' or 'preference'")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; expected the share of sft, from 0 to 1")


@dataclass(frozen=True)
class CosineKnobs:
    """Rows whose words, or vectors from a stage ``embed`` above, are that alike."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; expected in (0, 1] (cosine)")


@dataclass(frozen=True)
class TagKnobs:
    tag: str = "unsafe"


def main_text(row: Any) -> str:
    """What two rows are compared by: the prompt, or the first user turn."""
    if isinstance(row, Prompt):
        return "\n".join(message.content for message in row.messages)
    if isinstance(row, Topic):
        return row.topic
    if isinstance(row, Document):
        return row.text
    if isinstance(row, ColumnRow):
        return "\n".join(value for value in row.columns.values() if isinstance(value, str))
    if isinstance(row, Dialogue):
        return next(message.content for message in row.messages if message.role == "user")
    return main_text(row.prompt)


def _objection(text: str, knobs: QualityKnobs, *, finish_reason: str | None) -> Drop | None:
    num_words = count_words(text)
    if num_words < knobs.min_words:
        return "too short", f"{num_words} words; at least {knobs.min_words} are asked"
    if knobs.max_words and num_words > knobs.max_words:
        return "too long", f"{num_words} words; at most {knobs.max_words} are allowed"
    if finish_reason == "length" and knobs.drop_truncated:
        return "truncated", "the token limit cut the answer"
    if finish_reason is not None and knobs.drop_refusals and is_refusal(text):
        return "refusal", text[:120]
    if knobs.drop_repetition and (reason := filters.repetition(text)) is not None:
        return "repetition", reason
    if knobs.language and (reason := wrong_language(text, knobs.language)) is not None:
        return "language", reason
    return None


async def quality(row: Any, context: Context, knobs: QualityKnobs) -> Sequence[Row | None]:
    """Prompts and dialogues pass or not; of several answers the good ones stay if two are left."""
    if isinstance(row, Answered):
        drops = [_response_objection(response, knobs) for response in row.responses]
        kept = tuple(r for r, drop in zip(row.responses, drops, strict=True) if drop is None)
        for drop in drops:
            if drop is not None:
                context.count(f"answers_dropped: {drop[0]}")
        if len(kept) < min(2, len(row.responses)):
            raise Filtered(*next(drop for drop in drops if drop is not None))
        same = len(kept) == len(row.responses)
        return [None if same else dataclasses.replace(row, responses=kept)]
    if isinstance(row, JudgedPair):
        texts = [_response_objection(response, knobs) for response in (row.chosen, row.rejected)]
    elif isinstance(row, Dialogue):
        turns = [message.content for message in row.messages if message.role == "assistant"]
        texts = [_objection(text, knobs, finish_reason="stop") for text in turns]
    else:
        text = row.text if isinstance(row, Prompt) else main_text(row)
        texts = [_objection(text, knobs, finish_reason=None)]
    for drop in texts:
        if drop is not None:
            raise Filtered(*drop)
    return [None]


def _response_objection(response: Response, knobs: QualityKnobs) -> Drop | None:
    return _objection(response.text, knobs, finish_reason=response.finish_reason)


def exact_duplicates(rows: Iterable[tuple[bytes, Any]], knobs: NoSettings) -> Mapping[bytes, Drop]:
    seen: dict[bytes, bytes] = {}
    drops: dict[bytes, Drop] = {}
    for record, row in rows:
        text = main_text(row)
        key = (
            digest(normalise(text), *maths(text)) if len(text) < SHORT_CHARACTERS else digest(normalise(text))
        )
        first = seen.setdefault(key, record)
        if first != record:
            drops[record] = ("duplicate", f"the same text as {first.hex()}")
    return drops


def near_duplicates(rows: Iterable[tuple[bytes, Any]], knobs: NearDedupKnobs) -> Mapping[bytes, Drop]:
    pairs = [(record, main_text(row)) for record, row in rows]
    if not pairs:
        return {}
    found = find_near_duplicates([text for _, text in pairs], knobs.threshold)
    return {
        pairs[later][0]: ("near duplicate", f"much the same as {pairs[kept][0].hex()}")
        for later, kept in found.items()
    }


def compared(rule: str, measure: str, find: Callable[[list[str], float], Likeness]) -> BarrierFunction:
    """Drops texts that are too like an earlier one, by a measure with a threshold."""

    def decide(rows: Iterable[tuple[bytes, Any]], knobs: Any) -> Mapping[bytes, Drop]:
        pairs = [(record, main_text(row)) for record, row in rows]
        found = find([text for _, text in pairs], knobs.threshold)
        return {
            pairs[later][0]: (rule, f"{measure} {score:.2f} with {pairs[kept][0].hex()}")
            for later, (kept, score) in found.items()
        }

    return decide


async def embed(row: Any, context: Context, knobs: NoSettings) -> Sequence[Row | None]:
    """The row passes; its vector stays in the ledger."""
    await context.embed(main_text(row))
    return [None]


def alike(rows: Iterable[tuple[bytes, Any, bytes]], knobs: CosineKnobs) -> Mapping[bytes, Drop]:
    held = [(record, main_text(row), vector) for record, row, vector in rows]
    if not held:
        return {}
    vectors = unpack_vectors([vector for _, _, vector in held])
    found = find_alike(
        vectors, knobs.threshold, lambda later, kept: differ_in_maths(held[later][1], held[kept][1])
    )
    return {
        held[later][0]: ("alike", f"cosine {score:.2f} with {held[kept][0].hex()}")
        for later, (kept, score) in found.items()
    }


@functools.lru_cache(maxsize=4)
def _benchmarks(files: tuple[Path, ...]) -> filters.BenchmarkIndex:
    return filters.load_benchmarks(files)


async def decontaminate(row: Any, context: Context, knobs: DecontaminateKnobs) -> Sequence[Row | None]:
    """Drop what contains a benchmark item; the reason names the item."""
    index = _benchmarks(knobs.files)
    texts = [main_text(row)]
    if isinstance(row, Answered):
        texts += [response.text for response in row.responses]
    elif isinstance(row, JudgedPair):
        texts += [row.chosen.text, row.rejected.text]
    elif isinstance(row, Dialogue):
        texts += [message.content for message in row.messages[1:]]
    for text in texts:
        hit = index.find(text)
        if hit is not None:
            raise Filtered("contaminated", f"{hit[0]}: {hit[1]}")
    return [None]


async def split(prompt: Prompt, context: Context, knobs: SplitKnobs) -> Sequence[Row | None]:
    """By the first user turn's text, so that equal prompts are never in both parts."""
    first = normalise(prompt.messages[0].content)
    point = int.from_bytes(digest("split", first)[:8], "big") / 2**64
    part = "sft" if point < knobs.share else "preference"
    if part != knobs.part:
        raise Filtered("other split", f"belongs to the {part} part")
    return [None]


async def tag_unsafe(prompt: Prompt, context: Context, knobs: NoSettings) -> Sequence[Row | None]:
    """Tag, not drop: the preference split keeps such prompts."""
    if not await ask_yes_no(context, context.prompt("safety", prompt=prompt.messages[-1].content)):
        return [None]
    context.count("tagged_unsafe")
    return [dataclasses.replace(prompt, tags=(*prompt.tags, "unsafe"))]


async def drop_tagged(row: Any, context: Context, knobs: TagKnobs) -> Sequence[Row | None]:
    tags: Collection[Any]
    if isinstance(row, ColumnRow):
        given = row.columns.get("tags") or ()
        tags = given if isinstance(given, list | dict) else (given,)
    else:
        tags = row.tags if isinstance(row, Prompt | Dialogue) else row.prompt.tags
    if knobs.tag in tags:
        raise Filtered(knobs.tag, f"the row has the tag {knobs.tag!r}")
    return [None]


def passing(summary: str, knobs: type, takes: tuple[type, ...] = TEXT_ROWS, **functions: Any) -> Kind:
    return Kind(
        summary=summary, takes=takes, makes=None, knobs=knobs,
        calls=lambda _: 0, fan_out=lambda _: 1, **functions,
    )  # fmt: skip


KINDS = {
    "quality": passing(
        "length, repetition, refusals, cut answers, language", QualityKnobs, run=quality, version=2,
        check=lambda knobs: check_language(knobs.language),
    ),
    "exact_dedup": passing("equal texts", NoSettings, COMPARED_ROWS, decide=exact_duplicates, version=2),
    "near_dedup": passing(
        "nearly equal texts", NearDedupKnobs, COMPARED_ROWS, decide=near_duplicates, version=2
    ),
    "diversity": passing(
        "texts too like an earlier one", DiversityKnobs, COMPARED_ROWS,
        decide=compared("not diverse", "ROUGE-L", filters.find_similar),
    ),
    "similar_words": passing(
        "texts of nearly the same words", CosineKnobs, COMPARED_ROWS,
        decide=compared("similar words", "TF-IDF cosine", find_similar_words),
    ),
    "embed": Kind(
        summary="a vector of each row, for the stages that compare vectors",
        takes=COMPARED_ROWS, makes=None, run=embed, needs=lambda _: "embeddings", sampling=Sampling(),
        calls=lambda _: 1, fan_out=lambda _: 1,
    ),
    "embed_dedup": passing(
        "rows of nearly the same meaning", CosineKnobs, COMPARED_ROWS, decide_by_vector=alike
    ),
    "decontaminate": passing("texts that contain a benchmark item", DecontaminateKnobs, run=decontaminate,
        check=lambda knobs: _benchmarks(knobs.files) and None,
        identity=lambda knobs: [digests(file) for file in knobs.files]),
    "drop_tagged": passing("rows with a tag, such as unsafe", TagKnobs, run=drop_tagged),
    "split": Kind(
        summary="the SFT or the preference part of the prompts, disjoint by text",
        takes=(Prompt,), makes=Prompt, knobs=SplitKnobs, run=split,
        calls=lambda _: 0, fan_out=lambda knobs: knobs.share if knobs.part == "sft" else 1 - knobs.share,
    ),
    "safety_tag": Kind(
        summary="a model tags harmful prompts as unsafe",
        takes=(Prompt,), makes=Prompt, run=tag_unsafe, prompts=("safety",),
        sampling=Sampling(temperature=0.0, max_tokens=4), calls=lambda _: 1, fan_out=lambda _: 1,
    ),
}  # fmt: skip
