"""Dataclasses to and from plain values (JSON, TOML): the one writer and the one reader.

A field is written under its name, in the order of the class; tuples are lists, paths are texts. A reader
checks names and types, and says which field is wrong. What a class may say about its form:

``field(metadata=named("bytes"))``   the field has another name in files
``field(metadata=HIDDEN)``           the field is not written, nor read
``also_written``                     names and properties, written after the fields; a reader passes over them
``omits_defaults``                   fields that have their default are left out
``extra``                            "ignore" where rows may have columns of other programs
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from nemotron4.errors import ConfigError, Nemotron4Error, RequestError, raise_together, unknown_name

JsonObject = dict[str, Any]
WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Path: "a string",
}


class FieldError(ValueError):
    """A field is missing or wrong. Whoever knows the file adds its name and line. ``others``: more such."""

    others: Sequence[FieldError] = ()

    def __init__(self, message: str, *, path: str = "", hint: str | None = None) -> None:
        super().__init__(message)
        self.path, self.hint = path, hint


class JsonForm:
    """A dataclass with a form in JSON."""

    also_written: ClassVar[Mapping[str, str]] = {}
    omits_defaults: ClassVar[bool] = False
    extra: ClassVar[Literal["refuse", "ignore"]] = "refuse"

    def to_json(self) -> JsonObject:
        return write_fields(self)

    @classmethod
    def from_json(cls, row: JsonObject) -> Self:
        return cast("Self", read_fields(cls, row))


HIDDEN: Mapping[str, Any] = {"json_hidden": True}


def named(name: str) -> Mapping[str, Any]:
    """The metadata of a field that has another name in JSON."""
    return {"json_name": name}


# Writing


def to_json(value: Any) -> Any:
    """The value as JSON has it: a dataclass is an object of its fields, and so on inside."""
    if isinstance(value, JsonForm):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return write_fields(value)
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, AbstractSet):
        return sorted(to_json(entry) for entry in value)
    return str(value) if isinstance(value, Path) else value


def write_fields(value: Any) -> JsonObject:
    """A dataclass's fields, whatever its own ``to_json`` adds."""
    omits = getattr(value, "omits_defaults", False)
    row = {}
    for field in _written(cast("Any", type(value))):
        entry = getattr(value, field.name)
        if not (omits and _has_default(field) and entry == _default(field)):
            row[_json_name(field)] = to_json(entry)
    derived: Mapping[str, str] = getattr(value, "also_written", {})
    return row | {name: to_json(getattr(value, attribute)) for name, attribute in derived.items()}


@functools.cache
def _written(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(field for field in dataclasses.fields(kind) if "json_hidden" not in field.metadata)


def _json_name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("json_name", field.name))


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# Reading


def from_json(kind: Any, value: Any, path: str = "") -> Any:
    """The value as the type says: a dataclass from an object, a tuple from a list; or FieldError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, path)
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(path, value, " or ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        return _read_sequence(origin or kind, arguments, value, path)
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, dict):
            raise _mismatch(path, value, "a table")
        item = arguments[1] if arguments else Any
        return {key: from_json(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _mismatch(path, value, "a table")
        return _read_dataclass(cast("type", kind), value, path)
    return _read_scalar(kind, value, path)


def _read_dataclass(kind: type, value: Mapping[str, Any], path: str) -> Any:
    own = getattr(kind, "from_json", None)
    if own is None or own.__func__ is vars(JsonForm)["from_json"].__func__:
        return read_fields(kind, value, f"{path}.")
    try:
        return own(value)
    except FieldError as error:
        raise FieldError(f"{path}: {error}", path=path, hint=error.hint) from None


def read_fields(kind: type, values: Mapping[str, Any], prefix: str = "", **given: Any) -> Any:
    """A dataclass from an object, every name and type checked; ``given`` are fields that it does not hold.

    ``prefix`` is the dotted name, with its dot, of what the object is in.
    """
    hints = _hints(kind)
    fields = {_json_name(field): field for field in _written(kind) if field.init}
    derived = getattr(kind, "also_written", ())
    ignores = getattr(kind, "extra", "refuse") == "ignore"
    arguments = given
    problems: list[FieldError] = []
    for key, value in values.items():
        if key in fields:
            field = fields[key]
            if value is None and ignores and _has_default(field):
                continue  # rows of other programs write null for what is absent
            try:
                arguments[field.name] = from_json(hints[field.name], value, f"{prefix}{key}")
            except FieldError as error:
                arguments[field.name] = None
                problems.append(error)
        elif not ignores and key not in derived:
            message, hint = unknown_name("key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
            problems.append(FieldError(message, path=f"{prefix}{key}", hint=hint))
    for key, field in fields.items():
        if field.name not in arguments and not _has_default(field):
            expected = expected_words(hints[field.name])
            problems.append(FieldError(f"field {prefix + key!r} is missing; expected {expected}", path=""))
    if problems:
        raise _together(problems)
    try:
        return kind(**arguments)
    except FieldError:
        raise
    except ConfigError as error:
        raise _together([FieldError(e.message, hint=e.hint) for e in (error, *error.others)]) from error
    except ValueError as error:
        where = f"[{prefix.rstrip('.')}]: " if prefix else ""
        raise FieldError(f"{where}{error}") from error


def _together(problems: Sequence[FieldError]) -> FieldError:
    first, *rest = [each for problem in problems for each in (problem, *problem.others)]
    first.others = rest
    return first


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def expected_words(kind: Any) -> str:
    """``a list``, ``an integer or null``"""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else expected_words(each) for each in arguments)
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        return "a list"
    if origin in (dict, Mapping) or kind is dict or dataclasses.is_dataclass(kind):
        return "a table"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _read_union(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    first_error: FieldError | None = None
    for choice in choices:
        if choice is type(None):
            if value is None:
                return None
            continue
        try:
            return from_json(choice, value, path)
        except FieldError as error:
            first_error = first_error or error
    raise first_error or _mismatch(path, value, "null")


def _read_sequence(kind: Any, items: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(path, value, "a list")
    item = items[0] if items else Any
    converted, problems = [], []
    for i, entry in enumerate(value):
        try:
            converted.append(from_json(item, entry, f"{path}[{i}]"))
        except FieldError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    return tuple(converted) if kind is tuple else converted


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _mismatch(path, value, expected_words(kind))
    return value


def _mismatch(path: str, value: Any, expected: str) -> FieldError:
    return FieldError(f"{path or 'the value'} is {value!r:.200}; expected {expected}", path=path)


def shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# Checking what a program gives


def require_numbers(given: Any) -> None:
    """RequestError for a field of a dataclass that is no number of its type: whole, or finite; no texts.

    A mapping of numbers may hold -inf, which bans.
    """
    problems: list[Nemotron4Error] = []
    kind: type = type(given)
    for name, is_whole, is_needed in _numbers(kind):
        value = getattr(given, name)
        if value is None and not is_needed:
            continue
        is_number = isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            expected = "a whole number" if is_whole else "a finite number"
            problems.append(RequestError(f"{name} is {value!r}; expected {expected}"))
    for name, hint in _hints(kind).items():
        if hint == Mapping[int, float]:
            for key, value in getattr(given, name).items():
                if not isinstance(key, Integral) or not isinstance(value, Real) or not value < math.inf:
                    expected = "expected a whole number with a finite one"
                    problems.append(RequestError(f"{name} has {key!r}: {value!r}; {expected}"))
    raise_together(problems)


@functools.cache
def _numbers(kind: type) -> tuple[tuple[str, bool, bool], ...]:
    """(name, is whole, is needed) of the fields that hold a number."""
    unions = (None, Union, types.UnionType)
    hints = {n: get_args(hint) or (hint,) for n, hint in _hints(kind).items() if get_origin(hint) in unions}
    return tuple(
        (name, int in parts, type(None) not in parts)
        for name, parts in hints.items()
        if {*parts} <= {int, float, type(None)}
    )
