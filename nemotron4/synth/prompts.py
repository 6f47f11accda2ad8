"""The prompt book: every text that is sent to a model, with version and checked placeholders.

The texts stand in ``prompt_texts.toml``. A user's file of the same form replaces single ones. A
placeholder is a name in braces; other braces are ordinary text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.records import JsonObject

_PLACEHOLDER = re.compile(r"\{([a-z][a-z_0-9]*)\}")


@dataclass(frozen=True)
class PromptText:
    """One text. ``version`` tells apart texts that were used for data already made."""

    name: str
    version: int
    text: str

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(_PLACEHOLDER.findall(self.text))


class PromptBook:
    """All prompt texts of a run."""

    def __init__(self, texts: Iterable[PromptText]) -> None:
        self._texts = {text.name: text for text in texts}

    def __contains__(self, name: str) -> bool:
        return name in self._texts

    def names(self) -> list[str]:
        return sorted(self._texts)

    def text(self, name: str) -> PromptText:
        return self._texts[name]

    def render(self, name: str, values: Mapping[str, object]) -> str:
        """The text with its placeholders replaced, in one pass: braces inside a value stay as they are."""
        prompt = self._texts[name]
        missing = prompt.placeholders - set(values)
        if missing:
            raise ConfigError(f"prompt {name!r}: no value for {sorted(missing)}; given: {sorted(values)}")
        return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), prompt.text)

    def identity(self, names: Iterable[str]) -> JsonObject:
        """What of the book decides a stage's requests."""
        return {name: [self._texts[name].version, self._texts[name].text] for name in names}


def load_prompts(override: Path | None = None) -> PromptBook:
    """The shipped book, with single texts replaced by a user's file."""
    shipped = _parse(
        resources.files("nemotron4.synth").joinpath("prompt_texts.toml").read_text("utf-8"), "prompts"
    )
    if override is None:
        return PromptBook(shipped.values())
    try:
        text = override.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{override}: cannot be read: {error.strerror}") from error
    for name, prompt in _parse(text, str(override)).items():
        if name not in shipped:
            message, hint = unknown_name("prompt", name, shipped)
            raise ConfigError(f"{override}: {message}", hint=hint)
        required = shipped[name].placeholders
        if prompt.placeholders != required:
            raise ConfigError(
                f"{override}: prompt {name!r} has the placeholders {sorted(prompt.placeholders)}; "
                f"expected {sorted(required)}"
            )
        shipped[name] = prompt
    return PromptBook(shipped.values())


def _parse(text: str, source: str) -> dict[str, PromptText]:
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    found: dict[str, PromptText] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != {"version", "text"}:
            raise ConfigError(f"{source}: [{name}] must hold exactly the keys version and text")
        if not isinstance(table["version"], int) or not isinstance(table["text"], str):
            raise ConfigError(f"{source}: [{name}]: version must be an integer and text a string")
        found[name] = PromptText(name, table["version"], table["text"].strip())
    return found
