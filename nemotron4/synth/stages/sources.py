"""Rows from files: topics, documents, prompts with known answers, finished conversations."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.errors import ConfigError, DataError
from nemotron4.records import FieldError, JsonObject, Message, parse_messages
from nemotron4.synth.files import data_rows
from nemotron4.synth.rows import Dialogue, Document, Prompt, Root, Row, Topic
from nemotron4.synth.stage import Context, Filtered, Kind
from nemotron4.synth.words import count_words


@dataclass(frozen=True)
class DocumentKnobs:
    """A file of rows. Documents outside the length limits (in words) are filtered, not cut."""

    file: Path
    text_field: str = "text"
    id_field: str = "id"
    limit: int = 0
    min_words: int = 50
    max_words: int = 1100


@dataclass(frozen=True)
class PromptFileKnobs:
    """A file of prompts: ``messages`` or a text field; a true answer if there is one.

    answer_after: the answer is what follows this mark in the answer field ("####" in GSM8K).
    unsafe_field: a field that is true for prompts a safety classifier flagged; they get the tag ``unsafe``.
    """

    file: Path
    task: str
    text_field: str = "prompt"
    answer_field: str = ""
    answer_after: str = ""
    tests_field: str = ""
    unsafe_field: str = ""
    limit: int = 0


def document_roots(knobs: DocumentKnobs) -> Iterator[JsonObject]:
    for where, row in data_rows(knobs.file, knobs.limit):
        text = row.get(knobs.text_field)
        if not isinstance(text, str):
            raise DataError(f"{where}: field {knobs.text_field!r} is missing or not a text")
        number = re.split(r":| row ", where)[-1]
        given = row.get(knobs.id_field)
        yield {"id": number if given is None else str(given), "text": text}


async def documents(root: Root, context: Context, knobs: DocumentKnobs) -> Sequence[Row]:
    """Root -> document."""
    text = root.entry["text"]
    num_words = count_words(text)
    if not knobs.min_words <= num_words <= knobs.max_words:
        raise Filtered(
            "document length", f"{num_words} words; expected {knobs.min_words} to {knobs.max_words}"
        )
    return [Document(document_id=root.entry["id"], text=text, source=knobs.file.name)]


def prompt_roots(knobs: PromptFileKnobs) -> Iterator[JsonObject]:
    """The needed fields of each line, checked."""
    for where, row in data_rows(knobs.file, knobs.limit):
        entry: JsonObject = {"messages": _messages(row, knobs.text_field, where)}
        if knobs.answer_field:
            entry["answer"] = _answer(row.get(knobs.answer_field), knobs, where)
        if knobs.tests_field:
            entry["tests"] = _tests(row.get(knobs.tests_field), knobs, where)
        if knobs.unsafe_field and _is_true(row.get(knobs.unsafe_field), knobs.unsafe_field, where):
            entry["unsafe"] = True
        yield entry


def _answer(given: object, knobs: PromptFileKnobs, where: str) -> str:
    text = str(given) if isinstance(given, str | int | float) else ""
    _, mark, after = text.rpartition(knobs.answer_after) if knobs.answer_after else ("", "", text)
    if not after.strip() or (knobs.answer_after and not mark):
        expected = f" after {knobs.answer_after!r}" if knobs.answer_after else ""
        raise DataError(f"{where}: field {knobs.answer_field!r} holds no answer{expected}: {given!r:.60}")
    return after.strip()


_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


def _is_true(given: object, name: str, where: str) -> bool:
    """Also of a cell of CSV, where "false" is a text."""
    if not isinstance(given, str):
        return bool(given)
    if given.strip().lower() not in _TRUTHS:
        raise DataError(f"{where}: field {name!r} is {given!r:.60}; expected true or false")
    return _TRUTHS[given.strip().lower()]


def _listed(given: object) -> object:
    """The list that a text holds, as a cell of CSV does in JSON or Python's form; else what is given."""
    if not isinstance(given, str) or not given.lstrip().startswith("["):
        return given
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(given)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return given


def _tests(given: object, knobs: PromptFileKnobs, where: str) -> str:
    """No tests are no tests passed: what is not there must not become a program that runs."""
    given = _listed(given)
    tests = [given] if isinstance(given, str) else given
    if not isinstance(tests, list) or not any(tests) or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{where}: field {knobs.tests_field!r} holds no tests: {given!r:.60}")
    return "\n".join(tests)


def _turns(row: JsonObject, where: str) -> list[Message]:
    try:
        return list(parse_messages({"messages": _listed(row.get("messages"))}, "messages"))
    except FieldError as error:
        raise DataError(f"{where}: {error}") from error


def _messages(row: JsonObject, text_field: str, where: str) -> list[list[str]]:
    if isinstance(_listed(row.get("messages")), list):
        turns = _turns(row, where)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if turns and turns[-1].role == "user":
            return [[turn.role, turn.content] for turn in turns]
        raise DataError(f"{where}: the conversation has no user turn")
    text = row.get(text_field)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: neither 'messages' nor a text in field {text_field!r}")
    return [["user", text]]


async def imported_prompts(root: Root, context: Context, knobs: PromptFileKnobs) -> Sequence[Row]:
    """Root -> prompt."""
    entry = root.entry
    return [
        Prompt(
            messages=tuple(Message(role, text) for role, text in entry["messages"]),
            task=knobs.task,
            form="imported",
            answer=entry.get("answer"),
            tests=entry.get("tests"),
            tags=("unsafe",) if entry.get("unsafe") else (),
            meta={"source": knobs.file.name},
        )
    ]


@dataclass(frozen=True)
class DialogueFileKnobs:
    """A file of whole conversations.

    form: messages (the field ``messages``), glaive (the fields ``system`` and ``chat`` of Glaive's function
    calling data), table_qa (``table`` as rows of cells with the head first, ``question``, ``answer``, and
    perhaps ``text`` around the table, as in FinQA and WikiTableQuestions).
    """

    file: Path
    task: str
    form: str = "messages"
    limit: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("messages", "glaive", "table_qa"):
            raise ValueError(f"form is {self.form!r}; expected messages, glaive or table_qa")


def dialogue_roots(knobs: DialogueFileKnobs) -> Iterator[JsonObject]:
    """The conversation of each line; it must end with an assistant turn."""
    for where, row in data_rows(knobs.file, knobs.limit):
        if knobs.form == "glaive":
            turns = glaive_turns(str(row.get("system", "")), str(row.get("chat", "")))
        elif knobs.form == "table_qa":
            turns = table_turns(row, where)
        else:
            turns = _turns(row, where)
        if not turns or turns[-1].role != "assistant" or all(turn.role != "user" for turn in turns):
            raise DataError(f"{where}: expected a user turn and, at the end, an assistant turn")
        yield {"messages": [[turn.role, turn.content] for turn in turns]}


_GLAIVE_TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE):[ ]?", re.MULTILINE)
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}


def glaive_turns(system: str, chat: str) -> list[Message]:
    """Glaive's text form: labelled turns, each assistant turn ended by ``<|endoftext|>``."""
    turns: list[Message] = []
    instruction = system.strip().removeprefix("SYSTEM:").strip()
    if instruction:
        turns.append(Message("system", instruction))
    labels = list(_GLAIVE_TURN.finditer(chat))
    ends = [label.start() for label in labels[1:]] + [len(chat)]
    for label, end in zip(labels, ends, strict=False):  # without a label there is no turn
        text = chat[label.end() : end].replace("<|endoftext|>", "").strip()
        turns.append(Message(_GLAIVE_ROLES[label[1]], text))
    return turns


def table_turns(row: JsonObject, where: str) -> list[Message]:
    """A question about a table, the table written in Markdown after the text that goes with it."""
    table, question, answer = _listed(row.get("table")), row.get("question"), row.get("answer")
    is_table = isinstance(table, list) and table and all(isinstance(cells, list) and cells for cells in table)
    if not is_table or not isinstance(question, str) or answer in (None, "", []):
        raise DataError(f"{where}: expected 'table' as a list of rows, 'question' as a text, and an 'answer'")
    assert isinstance(table, list)
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "| " + " | ".join("---" for _ in table[0]) + " |")
    parts = [str(row["text"]).strip()] if row.get("text") else []
    said = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    return [Message("user", "\n\n".join([*parts, "\n".join(lines), question])), Message("assistant", said)]


async def imported_dialogues(root: Root, context: Context, knobs: DialogueFileKnobs) -> Sequence[Row]:
    """Root -> dialogue."""
    messages = tuple(Message(role, text) for role, text in root.entry["messages"])
    return [Dialogue(messages=messages, task=knobs.task, meta={"source": knobs.file.name})]


@dataclass(frozen=True)
class CodeKeywordKnobs:
    """The ``n`` commonest names that the Python files below ``folder`` import or call: a keyword each."""

    folder: Path
    n: int = 200
    min_count: int = 2

    def __post_init__(self) -> None:
        if self.n < 1 or self.min_count < 1:
            raise ValueError("n and min_count must be 1 or more")


def keyword_roots(knobs: CodeKeywordKnobs) -> Iterator[JsonObject]:
    """By the number of files that use a name, then by name."""
    if not knobs.folder.is_dir():
        raise ConfigError(f"{knobs.folder}: there is no such folder")
    files: Counter[str] = Counter()
    for path in sorted(knobs.folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError):  # a file of another Python
            continue
        files.update(set(_names_used(tree)))
    common = sorted(files.items(), key=lambda entry: (-entry[1], entry[0]))
    for name, number in common[: knobs.n]:
        if number >= knobs.min_count:
            yield {"topic": name}


def _names_used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr


async def code_keywords(root: Root, context: Context, knobs: CodeKeywordKnobs) -> Sequence[Row]:
    """Root -> its keyword."""
    return [Topic(topic=root.entry["topic"], area="python")]


KINDS = {
    "code_keywords": Kind(
        summary="what Python files import and call most, as topics",
        takes=(), makes=Topic, knobs=CodeKeywordKnobs, roots=keyword_roots, run=code_keywords,
    ),
    "documents": Kind(
        summary="documents from a file of rows",
        takes=(), makes=Document, knobs=DocumentKnobs, roots=document_roots, run=documents,
    ),
    "prompt_file": Kind(
        summary="prompts from a file of rows, with true answers where there are any",
        takes=(), makes=Prompt, knobs=PromptFileKnobs, roots=prompt_roots, run=imported_prompts,
    ),
    "dialogue_file": Kind(
        summary="finished conversations from a file of rows",
        takes=(), makes=Dialogue, knobs=DialogueFileKnobs, roots=dialogue_roots, run=imported_dialogues,
    ),
}  # fmt: skip
