"""The typed rows that stages take and make, their JSON form in the ledger, and the identities of everything.

Records, calls, seeds and configurations are hashes of what made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from nemotron4.errors import DataError
from nemotron4.records import JsonObject, Message


@dataclass(frozen=True, kw_only=True)
class Root:
    """Where a source stage starts: the number of a request for topics, or one entry of a file."""

    index: int
    entry: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A subject to ask about. ``area``: general, math or python."""

    topic: str
    area: str = "general"
    above: str | None = None  # the macro topic it was derived from
    level: str | None = None  # school or programming level


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text to ask about."""

    document_id: str
    text: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A verifiable instruction: its type in the IFEval registry and the arguments of its checker."""

    type: str
    arguments: JsonObject
    text: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to answer: the last message is a user turn."""

    messages: tuple[Message, ...]
    task: str
    topic: str | None = None
    form: str = "draft"  # draft, revision, imported, single, persistent, second_turn
    constraints: tuple[Constraint, ...] = ()
    answer: str | None = None  # the true answer, where there is one
    tests: str | None = None  # Python asserts, for code
    document_id: str | None = None
    tags: tuple[str, ...] = ()
    meta: JsonObject = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer to a prompt."""

    text: str
    model: str
    sample: int
    finish_reason: str
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt with several answers."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """A pair: which answer was chosen, which rejected, who judged and what the scores were."""

    prompt: Prompt
    chosen: Response
    rejected: Response
    judge: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    scores: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation for supervised fine-tuning; it ends with an assistant turn."""

    messages: tuple[Message, ...]
    task: str
    topic: str | None = None
    tags: tuple[str, ...] = ()
    scores: JsonObject = field(default_factory=dict)
    meta: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ColumnRow:
    """Columns of any names, for stages of one's own."""

    columns: JsonObject


Row = Root | Topic | Document | Prompt | Answered | JudgedPair | Dialogue | ColumnRow

# The names that rows have in the ledger.
_KINDS: dict[str, type[Any]] = {
    "root": Root, "topic": Topic, "document": Document, "prompt": Prompt,
    "answered": Answered, "judged": JudgedPair, "dialogue": Dialogue, "record": ColumnRow,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _KINDS.items()}


# (name, default) of each field; MISSING, which equals nothing, where there is none.
_DEFAULTS: dict[type[Any], list[tuple[str, Any]]] = {
    kind: [
        (f.name, f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
        for f in dataclasses.fields(kind)
    ]
    for kind in (*_KINDS.values(), Constraint, Response)
}


def encode(row: Row) -> JsonObject:
    """The row as JSON, without fields that hold their default."""
    return {"kind": _NAMES[type(row)], **_fields(row)}


def _fields(value: Any) -> JsonObject:
    result: JsonObject = {}
    for name, default in _DEFAULTS[type(value)]:
        content = getattr(value, name)
        if content != default:
            result[name] = _plain(content)
    return result


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is tuple:
        return [_plain(entry) for entry in value]
    if kind is Message:
        return [value.role, value.content]
    return _fields(value) if kind in _DEFAULTS else value


def decode(value: Mapping[str, Any]) -> Row:
    """The inverse of ``encode``."""
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise DataError(f"a row of unknown kind {kind!r} in the ledger; known: {', '.join(_KINDS)}")
    row: Row = _KINDS[kind](**_nested(fields))
    return row


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    for name, content in fields.items():
        if name == "messages":
            fields[name] = tuple(Message(role, text) for role, text in content)
        elif name == "prompt":
            fields[name] = Prompt(**_nested(dict(content)))
        elif name in ("chosen", "rejected"):
            fields[name] = Response(**content)
        elif name == "responses":
            fields[name] = tuple(Response(**entry) for entry in content)
        elif name == "constraints":
            fields[name] = tuple(Constraint(**entry) for entry in content)
        elif name == "tags":
            fields[name] = tuple(content)
    return fields


ID_BYTES = 16


def canonical(value: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def digest(*parts: Any) -> bytes:
    return hashlib.blake2b(canonical(parts), digest_size=ID_BYTES).digest()


def record_id(stage: str, parent: bytes | None, ordinal: int) -> bytes:
    """Where a record comes from, not what it says: equal texts stay two records."""
    return digest("record", stage, None if parent is None else parent.hex(), ordinal)


def call_key(request: Any, record: bytes, sample: int) -> bytes:
    """A call is what goes over the wire (model, messages, sampling), for one record and one sample index."""
    return digest("call", request, record.hex(), sample)


def call_seed(run_seed: int, record: bytes, stage: str, sample: int) -> int:
    """The sampling seed of one call, in [0, 2^31)."""
    return int.from_bytes(digest("seed", run_seed, record.hex(), stage, sample)[:4], "big") >> 1


def shard_of(root: bytes, num_shards: int) -> int:
    return int.from_bytes(root[:8], "big") % num_shards
