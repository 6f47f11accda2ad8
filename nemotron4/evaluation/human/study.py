"""A study on disk: prompts, the answers of every model, and each annotator's ratings in a file of their own.

study.json            what the study is made of
answers-NAME.jsonl    one row for each prompt
ratings-HANDLE.jsonl  one row for each rated answer; the last one of an answer counts
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType

from nemotron4.client.retry import ERROR
from nemotron4.errors import ConfigError, DataError
from nemotron4.records import FieldError, JsonObject, Message, parse_messages, read_json_lines, require
from nemotron4.runs import RowLog, claim, read_rows, write_json

# Five levels of quality and one for complete failure (technical report, human evaluation).
SCALE = (0, 1, 2, 3, 4, 5)
SCALE_WORDS: Mapping[int, str] = MappingProxyType(
    {
        0: "does not do what was asked at all",
        1: "bad",
        2: "poor",
        3: "fair",
        4: "good",
        5: "excellent",
    }
)
AXES = ("helpfulness", "truthfulness")
LENGTHS: Mapping[str, str] = MappingProxyType(
    {"too_short": "something is missing", "just_right": "as long as it should be", "too_long": "padded"}
)
UNCATEGORISED = "none"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class StudyPrompt:
    id: str
    messages: tuple[Message, ...]
    category: str = UNCATEGORISED


@dataclass(frozen=True, kw_only=True)
class AnswerRating:
    """One annotator's view of one answer. ``position`` is where it was shown, from 0."""

    annotator: str
    prompt: str
    model: str
    position: int
    helpfulness: int
    truthfulness: int
    length: str
    at: str = ""

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) not in SCALE:
                raise DataError(f"{axis} is {getattr(self, axis)!r}; expected 0 to 5")
        if self.length not in LENGTHS:
            raise DataError(f"length is {self.length!r}; expected {', '.join(LENGTHS)}")


def check_name(kind: str, name: str) -> str:
    """Names become parts of file names."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{kind} is {name!r}; expected 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return name


def read_prompts(path: Path) -> list[StudyPrompt]:
    """``{"prompt": str}`` or ``{"messages": [...]}``, with ``id`` and ``category`` if they have one."""
    found: dict[str, StudyPrompt] = {}
    for number, row in read_json_lines(path):
        try:
            messages = (
                parse_messages(row, "messages")
                if "messages" in row
                else (Message("user", require(row, "prompt", str, "a string (or give messages)")),)
            )
        except FieldError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        name = str(row.get("id", number))
        if name in found:
            raise DataError(f"{path}:{number}: id {name!r} stands on more than one row")
        found[name] = StudyPrompt(name, messages, str(row.get("category") or UNCATEGORISED))
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return list(found.values())


def create(folder: Path, prompts: Sequence[StudyPrompt], models: Mapping[str, str], *, seed: int) -> None:
    """Make the study, or check that the folder is this one. ``models``: name -> source of its answers."""
    if len(models) < 2:
        raise ConfigError(f"{len(models)} model given; a comparison needs two or more")
    for name in models:
        check_name("model", name)
    rows = [[p.id, [m.to_json() for m in p.messages], p.category] for p in prompts]
    claim(
        folder,
        {
            "kind": "human evaluation",
            "models": list(models),
            "seed": seed,
            "prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        },
    )
    study = {"models": dict(models), "seed": seed, "prompts": rows}
    write_json(folder / "study.json", study, indent=None)


class Study:
    """A study whose answers are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{folder}: there is no study here", hint="make one: nemotron4 eval human new"
            ) from error
        self.models: tuple[str, ...] = tuple(study["models"])
        self.seed: int = study["seed"]
        self.prompts = [
            StudyPrompt(name, tuple(Message(**turn) for turn in turns), category)
            for name, turns, category in study["prompts"]
        ]
        self.answers = {model: self._read_answers(model) for model in self.models}

    def _read_answers(self, model: str) -> dict[str, str]:
        path = answers_path(self.folder, model)
        rows = dict_rows(path) if path.exists() else {}
        return {name: str(row["response"]) for name, row in rows.items() if ERROR not in row}

    @property
    def complete_prompts(self) -> list[StudyPrompt]:
        """Prompts that every model answered; the others cannot be compared and are left out, counted."""
        return [p for p in self.prompts if all(p.id in answers for answers in self.answers.values())]

    def prompt_order(self, annotator: str) -> list[StudyPrompt]:
        """The prompts in this annotator's random order, always the same."""
        prompts = self.complete_prompts
        random.Random(f"{self.seed} {annotator}").shuffle(prompts)
        return prompts

    def answer_order(self, annotator: str, prompt: str) -> list[str]:
        """The models in the random order in which this annotator sees their answers to the prompt."""
        models = list(self.models)
        random.Random(f"{self.seed} {annotator} {prompt}").shuffle(models)
        return models

    def ratings(self) -> list[AnswerRating]:
        """The last rating of every answer by every annotator."""
        found: dict[tuple[str, str, str], AnswerRating] = {}
        for path in sorted(self.folder.glob("ratings-*.jsonl")):
            for rating in read_ratings(path):
                found[rating.annotator, rating.prompt, rating.model] = rating
        return list(found.values())


class RatingLog:
    """One annotator's file. What ``add`` returned from is on the disk."""

    def __init__(self, study: Study, annotator: str) -> None:
        self._path = study.folder / f"ratings-{check_name('annotator', annotator)}.jsonl"
        self._log = RowLog(self._path, key=itemgetter("prompt", "model"))
        self.rated = set(self._log.keys)

    def add(self, rating: AnswerRating) -> None:
        self._log.append(asdict(rating) | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        self.rated.add((rating.prompt, rating.model))

    def close(self) -> None:
        self._log.close()


def answers_path(folder: Path, model: str) -> Path:
    return folder / f"answers-{model}.jsonl"


def dict_rows(path: Path) -> dict[str, JsonObject]:
    return {str(row["id"]): row for row in read_rows(path)}


def read_ratings(path: Path) -> Iterator[AnswerRating]:
    for row in read_rows(path):
        try:
            yield AnswerRating(**row)
        except (TypeError, DataError) as error:
            raise DataError(f"{path}: a row is not a rating: {error}") from error
