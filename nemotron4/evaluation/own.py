"""Tasks of one's own: a folder with ``task.toml`` and rows, or a Python function that returns a ``Task``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nemotron4 import config
from nemotron4.client.interface import Sampling
from nemotron4.client.own_code import load_function, needed_parameters
from nemotron4.errors import ConfigError, DataError, unknown_name
from nemotron4.evaluation.data import DataFile, DataSource, unpack
from nemotron4.evaluation.task import (
    Inputs,
    Item,
    JudgeRequest,
    Outcome,
    Task,
    accuracy,
    answered,
    mean,
    user,
    why,
)
from nemotron4.grading import answers, code, judgments
from nemotron4.grading.sandbox import open_sandbox
from nemotron4.grading.score import Score, passed, unparsed, unscored
from nemotron4.records import JsonObject, Message

TASK_FILE = "task.toml"
Grader = Literal["choice", "number", "exact", "contains", "regex", "code", "judge", "python"]
Grade = Callable[[str, JsonObject], Score]
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Around a letter, and no part of it: bold, code, quotes, LaTeX.
_MARKS = re.compile(r"[*_`$#{}\"'’“”]|\\[a-z]*")
# "I think" and "A good start" open with a word, not with a choice.
_LETTER = r"(?:[Oo]ption |[Cc]hoice )?\(?(?![AI] (?!is\b|because\b)[a-z])([A-Z])\b"
# What is stated in so many words, else how the reply opens, else a choice that it names.
_CHOICES = (
    re.compile(r"(?i:\b(?:answer|correct (?:option|choice)))(?i:\s+is\b:?|\s*:)\s*" + _LETTER),
    re.compile(r"\A\s*" + _LETTER),
    re.compile(r"(?i:\banswer)\s*" + _LETTER),
)
JUDGE_PROMPT = (
    "Rate the answer below from 1 to 10 by this rubric, and end with the rating in this form: [[5]].\n\n"
    "[Rubric]\n{rubric}\n\n[Question]\n{question}\n\n[Answer]\n{response}\n"
)


@dataclass(frozen=True, kw_only=True)
class OwnTask:
    """``task.toml``. ``{name}`` in ``prompt`` and ``rubric`` is a field of the row."""

    name: str
    prompt: str
    grader: Grader
    title: str = ""
    data: str = "items.jsonl"
    system: str | None = None
    id: str | None = None  # a field; without it the number of the row, from 0
    answer: str = "answer"  # the field with the right answer
    pattern: str = ""  # regex: what group 1 of its last match is
    tests: str = "tests"  # code: the field with a list of asserts
    rubric: str = ""  # judge
    function: str = ""  # python: FILE.py:FUNCTION, called with the response and the row
    max_tokens: int = 1024
    temperature: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        needed = {"regex": "pattern", "judge": "rubric", "python": "function"}.get(self.grader)
        if needed is not None and not getattr(self, needed):
            raise ValueError(f"the grader {self.grader!r} needs {needed}")
        if not self.prompt.strip():
            raise ValueError("prompt is empty")
        if doubled := re.search(r"\{\{\s*(\w+)\s*\}\}", f"{self.prompt} {self.system} {self.rubric}"):
            raise ValueError(f"{doubled[0]} would keep a pair of braces; write {{{doubled[1]}}} for a field")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name is {self.name!r}; expected letters, digits, dots, dashes, underscores")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from error


def open_folder(folder: Path, settings: Sequence[str] = ()) -> Task:
    """The task of a folder; ``settings`` replace lines of its ``task.toml``."""
    own = config.load(OwnTask, folder / TASK_FILE, settings)
    path = folder.absolute() / own.data
    file = DataFile(
        path=str(path), sha256=hashlib.sha256(unpack(path)).hexdigest(), source=str(folder), licence="own"
    )
    is_judged = own.grader == "judge"
    load = partial(_load, own, file)
    return Task(
        name=own.name,
        title=own.title or own.name,
        files=(file,),
        load=load,
        score=partial(_score_ratings, own) if is_judged else partial(_score, own, folder),
        sampling=Sampling(max_tokens=own.max_tokens, temperature=own.temperature, stop=own.stop),
        prompt="\n\n".join(str(value) for value in vars(own).values()),
        judge=partial(_judge, own) if is_judged else None,
        verdicts=judgments.RATINGS if is_judged else (),
        needs_sandbox=own.grader == "code",
        needs_responses=not is_judged,
        own_code=_hash_of_function(own.function, folder) if own.grader == "python" else "",
        options={"prompt": own.prompt, "rubric": own.rubric} if is_judged else {"prompt": own.prompt},
        with_options=lambda options: open_folder(
            # JSON's texts are TOML's too, with quotes and line ends in them.
            folder,
            [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in options.items()],
        ),
    )


def open_function(name: str) -> Task:
    """``FILE.py:FUNCTION``: what the function returns."""
    found = load_function(*_split_name(name, Path()))()
    if not isinstance(found, Task):
        raise ConfigError(f"{name} returned {type(found).__name__}; expected nemotron4.evaluation.task.Task")
    return replace(found, own_code=_hash_of_function(name, Path()) + found.own_code)


def list_folders(folder: Path) -> list[Path]:
    """Own tasks below ``tasks`` of the data folder."""
    return sorted(path.parent for path in (folder / "tasks").glob(f"*/{TASK_FILE}"))


def _split_name(name: str, folder: Path) -> tuple[Path, str]:
    file, _, function = name.rpartition(":")
    if not (folder / file).is_file():
        raise ConfigError(
            f"{name!r}: there is no Python file {folder / file}", hint="write it as FILE.py:FUNCTION"
        )
    return folder / file, function


def _hash_of_function(name: str, folder: Path) -> str:
    """Of its file; ConfigError, before answers are paid for, if there is no such function."""
    file, function = _split_name(name, folder)
    needed_parameters(file, function)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _load(own: OwnTask, file: DataFile, source: DataSource) -> list[Item]:
    content = source.main(file)
    items: dict[str, Item] = {}
    for number, row in content.json_lines():
        where = f"{content.path}:{number}"
        name = str(len(items)) if own.id is None else str(_field(row, own.id, where))
        if name in items:
            raise DataError(f"{where}: id {name!r} is on more than one row")
        messages = user(_filled(own.prompt, row, where))
        if own.system is not None:
            messages = (Message("system", _filled(own.system, row, where)), *messages)
        _check_answer(own, row, where)
        items[name] = Item(id=name, messages=messages, fields={"row": row})
    if not items:
        raise DataError(f"{content.path}: holds no row")
    return list(items.values())


def _check_answer(own: OwnTask, row: JsonObject, where: str) -> None:
    """DataError for what no response could equal, so that it is not taken for a wrong one."""
    if own.grader == "code":
        _tests(own, row, where)
    if own.grader not in ("choice", "number", "exact", "contains"):
        return
    right = _field(row, own.answer, where)
    if not isinstance(right, str | int | float) or not str(right).strip():
        raise DataError(f"{where}: field {own.answer!r} is {right!r}; expected a text or a number")
    if own.grader in ("exact", "contains") and not _plain(str(right)):  # every response would hold it
        message = f"field {own.answer!r} is {right!r}, of which nothing is left without punctuation"
        raise DataError(f"{where}: {message}", hint='use grader = "regex"')
    if own.grader == "choice" and not re.fullmatch(r"[A-Za-z]", str(right).strip()):
        raise DataError(f"{where}: field {own.answer!r} is {right!r}; expected the letter of a choice")
    if own.grader == "number" and answers.final_number(str(right)) is None:
        raise DataError(f"{where}: field {own.answer!r} is {right!r}; expected a number")


def _tests(own: OwnTask, row: JsonObject, where: str) -> list[str]:
    given = _field(row, own.tests, where)
    tests = [given] if isinstance(given, str) else given
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{where}: field {own.tests!r} is {given!r:.60}; expected a list of asserts")
    return tests


def _field(row: JsonObject, name: str, where: str) -> Any:
    if name not in row:
        message, hint = unknown_name("field", name, row)
        raise DataError(f"{where}: {message}", hint=hint)
    return row[name]


def _filled(template: str, row: JsonObject, where: str) -> str:
    return _PLACEHOLDER.sub(lambda match: str(_field(row, match[1], where)), template)


def _score(own: OwnTask, folder: Path, inputs: Inputs) -> Outcome:
    items, missing = answered(inputs)
    grade = _grade(own, folder, inputs)
    scores = [grade(inputs.responses[item.id][0], item.fields["row"]) for item in items]
    missing.update(str(found.reason) for found in scores if not found.is_scored)
    values = [found.value for found in scores if found.value is not None]
    is_binary = {*values} <= {0.0, 1.0}
    return Outcome(
        metrics={"accuracy": accuracy(scores)} if is_binary else {"mean": mean(values, inputs.seed)},
        unscored=missing,
        unparsed=sum(found.is_unparsed for found in scores),
        items={item.id: {"score": found.value} for item, found in zip(items, scores, strict=True)},
        reasons=why(items, scores),
    )


def _grade(own: OwnTask, folder: Path, inputs: Inputs) -> Grade:
    if own.grader == "code":
        sandbox = inputs.sandbox or open_sandbox()

        def run(response: str, row: JsonObject) -> Score:
            tests = _tests(own, row, own.name)
            program = code.find_program(response, code.called_function(tests))
            return code.run_program(code.mbpp_program(program, tests, ""), sandbox)

        return run
    if own.grader == "python":
        return partial(_by_function, own.function, load_function(*_split_name(own.function, folder)))
    return partial(_by_answer, own)


def _by_function(name: str, function: Callable[..., Any], response: str, row: JsonObject) -> Score:
    try:
        value = function(response, row)
        if value is None:
            return unscored("the function gave no score")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"it returned {number}")
    except Exception as error:  # the author's: any of them is his message
        raise ConfigError(
            f"{name}: {type(error).__name__}: {error}; the row is {json.dumps(row, ensure_ascii=False):.200}",
            hint="mend it and repeat the command: answers are kept",
        ) from error
    return Score(value=number)


def _by_answer(own: OwnTask, response: str, row: JsonObject) -> Score:
    right = str(row.get(own.answer, ""))
    if own.grader == "number":
        return answers.gsm8k(response, right, "value")
    if own.grader == "contains":
        return passed(_plain(right) in _plain(response))
    if own.grader == "exact":
        return passed(_plain(response) == _plain(right))
    if own.grader == "choice":
        letter = _chosen(response)
        if letter is None:
            return unparsed("the reply names no choice")
        return passed(letter == right.strip().upper())
    found = list(re.finditer(own.pattern, response))
    if not found:
        return unparsed("the pattern does not match")
    if own.answer not in row:
        return passed(True)
    group = found[-1][found[-1].re.groups and 1]
    return (
        unparsed("group 1 of the pattern is empty")
        if group is None
        else passed(_plain(group) == _plain(right))
    )


def _chosen(response: str) -> str | None:
    text = _MARKS.sub("", response)
    found = next((said for pattern in _CHOICES if (said := pattern.findall(text))), None)
    return str(found[-1]) if found else None


def _plain(text: str) -> str:
    """Without case, outer punctuation and runs of spaces."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'*`")


def _judge(
    own: OwnTask, items: Sequence[Item], responses: Mapping[str, Sequence[str]], source: DataSource
) -> list[JudgeRequest]:
    sampling = Sampling(max_tokens=1024, temperature=0.0)
    requests = []
    for item in items:
        if item.id not in responses:
            continue
        values = {
            "rubric": _filled(own.rubric, item.fields["row"], own.name),
            "question": item.messages[-1].content,
            "response": responses[item.id][0],
        }
        text = _PLACEHOLDER.sub(lambda match, values=values: values[match[1]], JUDGE_PROMPT)  # type: ignore[misc]
        requests.append(JudgeRequest(id=item.id, part=1, messages=user(text), sampling=sampling))
    return requests


def _score_ratings(own: OwnTask, inputs: Inputs) -> Outcome:
    found = {one.id: judgments.rating(one.text, "last") for one in inputs.judgments}
    missing = Counter(str(score.reason) for score in found.values() if not score.is_scored)
    if num_absent := len(inputs.items) - len(found):
        missing["no judgment"] = num_absent
    values = [score.value for score in found.values() if score.value is not None]
    return Outcome(
        metrics={"rating": mean(values, inputs.seed)},
        unscored=missing,
        items={name: {"rating": score.value} for name, score in found.items()},
        reasons={name: str(score.reason) for name, score in found.items() if score.reason},
    )
