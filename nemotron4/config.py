"""Strict settings: TOML plus dotted overrides into frozen dataclasses; where the cache is."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from nemotron4.errors import ConfigError, together
from nemotron4.json_form import FieldError, read_fields

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
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})", hint="save it as UTF-8") from error
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
        child = (
            table[_place(override, parent, table)]
            if isinstance(table, list)
            else table.setdefault(parent, {})
        )
        if not isinstance(child, dict | list):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a table")
        table = child
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    table[_place(override, last, table) if isinstance(table, list) else last] = value


def _place(override: str, name: str, entries: list[Any]) -> int:
    if not name.isdecimal() or int(name) >= len(entries):
        raise ConfigError(f"override {override!r}: {name!r} is no place in a list of {len(entries)}, from 0")
    return int(name)


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
    source = source or Source("settings")
    try:
        return cast("Settings", read_fields(kind, values, prefix))
    except FieldError as error:
        raise together(_named(each, source) for each in (error, *error.others)) from error


def _named(error: FieldError, source: Source) -> ConfigError:
    key = error.path.split(".")[-1]
    synonym = source.synonyms.get(key)
    return ConfigError(
        f"{source.at(key) if key else source.name}: {error}",
        hint=f"here it is {synonym}" if synonym else error.hint,
    )


def cache_dir() -> Path:
    """``$NEMOTRON4_CACHE``, else ``$XDG_CACHE_HOME/nemotron4``, else ``~/.cache/nemotron4``."""
    if own := os.environ.get("NEMOTRON4_CACHE"):
        return Path(own).expanduser().absolute()
    return user_cache_dir()


def user_cache_dir() -> Path:
    """For what does not depend on where the models are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path counts as unset.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nemotron4"
