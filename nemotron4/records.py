"""Rows on disk: what synthesis writes and training reads. JSON lines, optionally gzipped or zstd-compressed.

A reader names file, line and field in every refusal; a writer's file appears under its name only when whole.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar, cast

from nemotron4.errors import DataError, import_optional
from nemotron4.json_form import FieldError as FieldError
from nemotron4.json_form import JsonForm, from_json, shown
from nemotron4.json_form import JsonObject as JsonObject
from nemotron4.runs import replacing

MAX_LINE_CHARACTERS = 2**26
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

AnyRecord = TypeVar("AnyRecord", bound="Record")


def require(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """The field's value, or FieldError if it is missing or not of the kind."""
    if name not in row:
        raise FieldError(f"field {name!r} is missing; expected {expected}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise FieldError(f"field {name!r} is {shown(value)}; expected {expected}")
    return value


def optional_number(row: Mapping[str, Any], name: str) -> float | None:
    if row.get(name) is None:
        return None
    return float(require(row, name, (int, float), "a number or null"))


@dataclass(frozen=True)
class Message(JsonForm):
    """One turn. Roles: system, user, assistant, tool.

    ``more`` has what chat templates read besides: ``tool_calls``, ``tool_call_id``, ``name``. With ``trains``
    False an answer is context alone.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trains: bool = True

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        for name in ("tool_calls", "function_call"):
            if row.get(name):
                raise FieldError(f"field {name!r} has a call of a tool; expected a text alone")
        return cls(require(row, "role", str, "a string").lower(), require(row, "content", str, "a string"))

    def to_json(self) -> JsonObject:
        return {"role": self.role, "content": self.content, **self.more}


def parse_messages(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A non-empty list of messages in the given field."""
    values = require(row, name, list, "a list of messages")
    if not values:
        raise FieldError(f"field {name!r} is empty; expected at least one message")
    return cast("tuple[Message, ...]", from_json(tuple[Message, ...], values, name))


class Record(JsonForm):
    """A row of a file: what is absent is left out, columns of other programs are passed over."""

    omits_defaults = True
    extra = "ignore"

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        for name in ("messages", "prompt"):
            if name in row:
                parse_messages(row, name)
        return super().from_json(row)


@dataclass(frozen=True, kw_only=True)
class Conversation(Record):
    """A row of supervised fine-tuning: ``{"messages": [...], "id"?: str, "meta"?: {...}}``."""

    id: str | int | None = None
    messages: tuple[Message, ...]
    meta: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreferencePair(Record):
    """A row of DPO and RPO: prompt messages, two answers, and the rewards that RPO needs.

    ``{"prompt": [...], "chosen": str, "rejected": str, "chosen_reward"?: x, "rejected_reward"?: x}``
    """

    id: str | int | None = None
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    meta: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RewardSample(Record):
    """A row of reward-model training: a conversation that ends with the judged answer, and its labels.

    ``{"messages": [...], "attributes": {"helpfulness": 3.0, ...}}``; an attribute that is absent or null
    is not trained.
    """

    id: str | int | None = None
    messages: tuple[Message, ...]
    attributes: dict[str, float]
    meta: JsonObject = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        given = require(row, "attributes", dict, f"an object with some of {', '.join(ATTRIBUTES)}")
        there = {name: value for name, value in given.items() if value is not None}
        return super().from_json(row | {"attributes": there})


@dataclass(frozen=True, kw_only=True)
class Generation(Record):
    """What a model wrote for one prompt. ``token_ids`` are the new tokens only.

    ``logprobs[i]`` is the raw log-probability (nats, temperature 1) of ``token_ids[i]``; None if not asked.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "abort"]
    num_prompt_tokens: int
    logprobs: tuple[float, ...] | None = None


def load_json(text: str | bytes, **options: Any) -> Any:
    """What ``json.loads`` gives; ValueError for an object with one key twice, of which it takes the last."""
    return json.loads(text, object_pairs_hook=_object, **options)


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, JsonObject]]:
    """Line number (from 1) and object of every non-blank line. DataError names file and line."""
    path = Path(path)
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = load_json(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})",
                hint="every line must be one JSON object",
            ) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: the line is {shown(row)}; expected a JSON object")
        if "\\ud" in line.lower() and not is_unicode(row):
            raise DataError(f"{path}:{number}: a text has half of a character pair (a lone surrogate)")
        yield number, row


def is_unicode(row: JsonObject) -> bool:
    """JSON can write half of a surrogate pair, which no file, terminal or tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line. DataError for another encoding and for a file cut short."""
    try:
        yield from numbered_lines(path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: not UTF-8 text: byte 0x{byte:02x} ({error.reason})",
            hint=f"iconv -f latin1 -t utf-8 {path.name} > new.jsonl, if it is Latin-1",
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


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


def write(path: str | os.PathLike[str], rows: Iterable[JsonForm | JsonObject]) -> int:
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
            return io.TextIOWrapper(io.BufferedReader(_ZstdReader(path)), encoding, newline=newline)
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


class _ZstdReader(io.RawIOBase):
    """Frames one after the other. zstandard's own reader takes a file that is cut short for a whole one."""

    def __init__(self, path: Path) -> None:
        self._make = _zstandard().ZstdDecompressor().decompressobj
        self._error: type[Exception] = _zstandard().ZstdError
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            is_between = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and is_between else b"") or self._file.read(4096)
            if not data and is_between:
                return 0
            if not data:
                raise EOFError("the compressed data is cut short")
            if is_between:
                self._frame = self._make()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


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
