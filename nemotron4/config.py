"""Strict settings: TOML plus dotted overrides into frozen dataclasses. Unknown names are errors."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nemotron4.errors import ConfigError, unknown_name

Settings = TypeVar("Settings")


def load(kind: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a TOML file, apply ``dotted.name=value`` overrides, and build the dataclass ``kind``.

    Raises ConfigError naming the file, the line where it can be found, the key and the nearest known one.
    """
    values, source = read(path, overrides)
    return build(kind, values, source=source)


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Source]:
    """The values of a TOML file with the overrides applied, and where they come from."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(values, override)
    return values, Source(str(path), text)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``dotted.name=value`` in nested tables; the value is read as TOML, else taken as a string."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"override {override!r} has no '='", hint="write it as name=value")
    table: Any = values
    *parents, last = name.strip().split(".")
    for parent in parents:
        child = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        if not isinstance(child, dict | list):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a table")
        table = child
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    table[last] = value


@dataclasses.dataclass(frozen=True)
class Source:
    """Where values come from. ``synonyms``: what other programs call a key, with its full name here."""

    name: str
    text: str = ""
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    def at(self, key: str) -> str:
        """``file:line`` of the first line that sets the key, or the file's name."""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if line.split("=")[0].strip() == key or line.strip().strip("[]").split(".")[-1].strip() == key:
                return f"{self.name}:{number}"
        return self.name


def build(
    kind: type[Settings], values: Mapping[str, Any], *, source: Source | None = None, prefix: str = ""
) -> Settings:
    """A frozen dataclass from nested plain values, every key and type checked.

    ``prefix`` is the dotted name, with its dot, of the table that the values are from.
    """
    return typing.cast("Settings", _build(kind, values, source or Source("settings"), prefix))


def _build(kind: Any, values: Mapping[str, Any], source: Source, prefix: str) -> Any:
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            message, hint = unknown_name("key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
            if key in source.synonyms:
                hint = f"here it is {source.synonyms[key]}"
            raise ConfigError(f"{source.at(key)}: {message}", hint=hint)
        arguments[key] = _convert(hints[key], value, source, f"{prefix}{key}")
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in arguments and not has_default:
            raise ConfigError(f"{source.name}: key {prefix + name!r} is missing")
    try:
        return kind(**arguments)
    except ValueError as error:
        where = f" in [{prefix.rstrip('.')}]" if prefix else ""
        raise ConfigError(f"{source.name}{where}: {error}") from error


def _convert(kind: Any, value: Any, source: Source, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, source, name)
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(source, name, value, " or ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple, Sequence) or kind in (list, tuple):
        return _convert_sequence(origin or kind, arguments, value, source, name)
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, dict):
            raise _mismatch(source, name, value, "a table")
        item = arguments[1] if arguments else Any
        return {key: _convert(item, entry, source, f"{name}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _mismatch(source, name, value, "a table")
        return _build(kind, value, source, f"{name}.")
    return _convert_scalar(kind, value, source, name)


def _convert_union(choices: tuple[Any, ...], value: Any, source: Source, name: str) -> Any:
    first_error: ConfigError | None = None
    for choice in choices:
        if choice is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(choice, value, source, name)
        except ConfigError as error:
            first_error = first_error or error
    raise first_error or _mismatch(source, name, value, "null")


def _convert_sequence(kind: Any, items: tuple[Any, ...], value: Any, source: Source, name: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(source, name, value, "an array")
    item = items[0] if items else Any
    converted = [_convert(item, entry, source, f"{name}[{i}]") for i, entry in enumerate(value)]
    return tuple(converted) if kind is tuple else converted


def _convert_scalar(kind: Any, value: Any, source: Source, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise _mismatch(source, name, value, words.get(kind, getattr(kind, "__name__", str(kind))))
    return value


def _mismatch(source: Source, name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{source.at(name.split('.')[-1])}: {name} is {value!r}; expected {expected}")
