"""Finished conversations from files: human-written data, document and table questions, function calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.errors import ConfigError, DataError
from nemotron4.records import JsonObject, Message, read_json_lines
from nemotron4.synth.rows import Dialogue, Root, Row
from nemotron4.synth.stage import Context, Kind


@dataclass(frozen=True)
class DialogueFileKnobs:
    """A JSON lines file of whole conversations.

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
    if not knobs.file.exists():
        raise ConfigError(f"{knobs.file}: there is no such file")
    for number, (line, row) in enumerate(read_json_lines(knobs.file)):
        if knobs.limit and number >= knobs.limit:
            return
        where = f"{knobs.file}:{line}"
        if knobs.form == "glaive":
            turns = glaive_turns(str(row.get("system", "")), str(row.get("chat", "")))
        elif knobs.form == "table_qa":
            turns = table_turns(row, where)
        else:
            values = row.get("messages")
            if not isinstance(values, list):
                raise DataError(f"{where}: field 'messages' is missing; expected a list of messages")
            turns = [Message.parse(value, f"{where}: messages[{i}]") for i, value in enumerate(values)]
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
    table, question, answer = row.get("table"), row.get("question"), row.get("answer")
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


KINDS = {
    "dialogue_file": Kind(
        summary="finished conversations from a JSON lines file",
        takes=(), makes=Dialogue, knobs=DialogueFileKnobs, roots=dialogue_roots, run=imported_dialogues,
    ),
}  # fmt: skip
