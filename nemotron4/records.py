"""Rows on disk: what synthesis writes and training reads. JSON lines, optionally gzipped or zstd-compressed.

A reader names file, line and field in every refusal; a writer's file appears under its name only when whole.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, Self, TypeVar

from nemotron4.errors import DataError, import_optional
from nemotron4.runs import replacing

MAX_LINE_CHARACTERS = 2**26
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

JsonObject = dict[str, Any]


class FieldError(ValueError):
    """A field of a row is missing or wrong; the reader adds file and line."""


def require(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """The field's value, or FieldError if it is missing or not of the kind."""
    if name not in row:
        raise FieldError(f"field {name!r} is missing; expected {expected}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise FieldError(f"field {name!r} is {_shown(value)}; expected {expected}")
    return value


def optional_number(row: Mapping[str, Any], name: str) -> float | None:
    if row.get(name) is None:
        return None
    return float(require(row, name, (int, float), "a number or null"))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Message:
    """One turn. Roles: system, user, assistant, tool.

    ``more`` has what chat templates read besides: ``tool_calls``, ``tool_call_id``, ``name``. With ``trains``
    False an answer is context alone.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trains: bool = True

    @classmethod
    def parse(cls, value: object, where: str) -> Self:
        if not isinstance(value, dict):
            raise FieldError(f"{where} is {_shown(value)}; expected an object with role and content")
        try:
            role = require(value, "role", str, "a string")
            return cls(role.lower(), require(value, "content", str, "a string"))
        except FieldError as error:
            raise FieldError(f"{where}: {error}") from None

    def to_json(self) -> JsonObject:
        return {"role": self.role, "content": self.content, **self.more}


def parse_messages(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A non-empty list of messages in the given field."""
    values = require(row, name, list, "a list of messages")
    if not values:
        raise FieldError(f"field {name!r} is empty; expected at least one message")
    return tuple(Message.parse(value, f"{name}[{i}]") for i, value in enumerate(values))


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row of supervised fine-tuning: ``{"messages": [...], "id"?: str, "meta"?: {...}}``."""

    messages: tuple[Message, ...]
    id: str | None = None
    meta: JsonObject = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        return cls(messages=parse_messages(row, "messages"), id=row.get("id"), meta=row.get("meta") or {})

    def to_json(self) -> JsonObject:
        return _dropping_empty(
            {"id": self.id, "messages": [m.to_json() for m in self.messages], "meta": self.meta}
        )


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """A row of DPO and RPO: prompt messages, two answers, and the rewards that RPO needs.

    ``{"prompt": [...], "chosen": str, "rejected": str, "chosen_reward"?: x, "rejected_reward"?: x}``
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    id: str | None = None
    meta: JsonObject = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        return cls(
            prompt=parse_messages(row, "prompt"),
            chosen=require(row, "chosen", str, "a string"),
            rejected=require(row, "rejected", str, "a string"),
            chosen_reward=optional_number(row, "chosen_reward"),
            rejected_reward=optional_number(row, "rejected_reward"),
            id=row.get("id"),
            meta=row.get("meta") or {},
        )

    def to_json(self) -> JsonObject:
        return _dropping_empty(
            {
                "id": self.id,
                "prompt": [m.to_json() for m in self.prompt],
                "chosen": self.chosen,
                "rejected": self.rejected,
                "chosen_reward": self.chosen_reward,
                "rejected_reward": self.rejected_reward,
                "meta": self.meta,
            }
        )


@dataclass(frozen=True, kw_only=True)
class RewardSample:
    """A row of reward-model training: a conversation that ends with the judged answer, and its labels.

    ``{"messages": [...], "attributes": {"helpfulness": 3.0, ...}}``; an attribute that is absent or null
    is not trained.
    """

    messages: tuple[Message, ...]
    attributes: dict[str, float]
    id: str | None = None
    meta: JsonObject = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        given = require(row, "attributes", dict, f"an object with some of {', '.join(ATTRIBUTES)}")
        values = {name: optional_number(given, name) for name in given}
        attributes = {name: value for name, value in values.items() if value is not None}
        return cls(
            messages=parse_messages(row, "messages"),
            attributes=attributes,
            id=row.get("id"),
            meta=row.get("meta") or {},
        )

    def to_json(self) -> JsonObject:
        return _dropping_empty(
            {
                "id": self.id,
                "messages": [m.to_json() for m in self.messages],
                "attributes": self.attributes,
                "meta": self.meta,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote for one prompt. ``token_ids`` are the new tokens only.

    ``logprobs[i]`` is the raw log-probability (nats, temperature 1) of ``token_ids[i]``; None if not asked.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "abort"]
    num_prompt_tokens: int
    logprobs: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        logprobs = row.get("logprobs")
        return cls(
            text=require(row, "text", str, "a string"),
            token_ids=tuple(require(row, "token_ids", list, "a list of integers")),
            finish_reason=require(row, "finish_reason", str, "stop, length or abort"),
            num_prompt_tokens=require(row, "num_prompt_tokens", int, "an integer"),
            logprobs=None if logprobs is None else tuple(logprobs),
        )

    def to_json(self) -> JsonObject:
        return _dropping_empty(
            {
                "text": self.text,
                "token_ids": list(self.token_ids),
                "finish_reason": self.finish_reason,
                "num_prompt_tokens": self.num_prompt_tokens,
                "logprobs": None if self.logprobs is None else list(self.logprobs),
            }
        )


def _dropping_empty(row: JsonObject) -> JsonObject:
    return {name: value for name, value in row.items() if value is not None and value != {}}


class Record(Protocol):
    """A dataclass that knows its JSON form."""

    @classmethod
    def from_json(cls, row: JsonObject) -> Self: ...

    def to_json(self) -> JsonObject: ...


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, JsonObject]]:
    """Line number (from 1) and object of every non-blank line. DataError names file and line."""
    path = Path(path)
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})",
                hint="every line must be one JSON object",
            ) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: the line is {_shown(row)}; expected a JSON object")
        yield number, row


def numbered_lines(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line; DataError for one that only fills memory, as in a gzip bomb."""
    with open_text(path, encoding) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_CHARACTERS + 1):
            number += 1
            if len(line) > MAX_LINE_CHARACTERS:
                raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE_CHARACTERS} characters")
            yield number, line


@dataclass(frozen=True)
class AskedPrompt:
    """Something to ask: a row with ``prompt`` or ``messages``, and ``id`` and ``category`` if it has them."""

    id: str
    messages: tuple[Message, ...]
    category: str | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[AskedPrompt]:
    """Prompts to ask, one a line. Without an id it is the number of its line; ids must differ."""
    found: dict[str, AskedPrompt] = {}
    for number, row in read_json_lines(path):
        try:
            if "messages" in row:
                messages = parse_messages(row, "messages")
            else:
                messages = (Message("user", require(row, "prompt", str, "a string (or give messages)")),)
        except FieldError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        name, category = str(row.get("id", number)), row.get("category")
        if name in found:
            raise DataError(f"{path}:{number}: id {name!r} is on more than one row", hint="ids must differ")
        found[name] = AskedPrompt(name, messages, category if isinstance(category, str) else None)
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return list(found.values())


def read(path: str | os.PathLike[str], kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The rows of a file as records of one kind; the first bad one raises DataError with file:line."""
    for number, row in read_json_lines(path):
        try:
            yield kind.from_json(row)
        except FieldError as error:
            raise DataError(f"{path}:{number}: {error}") from error


def write(path: str | os.PathLike[str], rows: Iterable[Record | JsonObject]) -> int:
    """Write rows as JSON lines, atomically; returns their number. ``.gz`` and ``.zst`` compress."""
    path = Path(path)
    count = 0
    with replacing(path) as raw, _compressed_writer(raw, path) as stream:
        for row in rows:
            value = row if isinstance(row, dict) else row.to_json()
            stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def open_text(path: Path, encoding: str = "utf-8-sig", *, newline: str | None = None) -> io.TextIOBase:
    """The file as text, decompressed by its suffix, no byte order mark; DataError if it is not there."""
    try:
        if path.suffix == ".gz":
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding=encoding, newline=newline)
        if path.suffix == ".zst":
            reader = _zstandard().ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
            return io.TextIOWrapper(reader, encoding, newline=newline)
        return path.open(encoding=encoding, newline=newline)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _compressed_writer(raw: BinaryIO, path: Path) -> Any:
    if path.suffix == ".gz":
        # No file name and no time in the header: equal rows give equal bytes.
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
    if path.suffix == ".zst":
        return _zstandard().ZstdCompressor().stream_writer(raw, closefd=False)
    return io.BufferedWriter(_Unclosed(raw))


class _Unclosed(io.RawIOBase):
    """Lets a BufferedWriter end without closing the file below it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._raw.write(data)


def _zstandard() -> Any:
    return import_optional("zstandard", "reading and writing .zst files")
