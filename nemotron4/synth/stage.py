"""What a stage is, the prompt texts it may use, and what its function is given."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from nemotron4 import config
from nemotron4.client import Reply, Reward, Sampling
from nemotron4.errors import ConfigError, Nemotron4Error, unknown_name
from nemotron4.records import JsonObject, Message
from nemotron4.synth.rows import Row

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

    def names(self) -> list[str]:
        return sorted(self._texts)

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
    for name, prompt in _parse(config.read_text(override), str(override)).items():
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


class Filtered(Nemotron4Error):  # noqa: N818 - a decision, not an error
    """A row leaves the pipeline by a rule; not a failure. ``rule`` is counted, the message is kept."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class Context(Protocol):
    """One piece of work, seen from its stage's function.

    The function must be deterministic apart from the replies: after a kill it runs again from the start, and
    the calls it has paid for are answered from the ledger.
    """

    @property
    def max_repairs(self) -> int: ...

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        sample: int = 0,
        endpoint: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_logprobs: int | None = None,
        schema: JsonObject | None = None,
        choice: tuple[str, ...] = (),
    ) -> Reply: ...

    async def score(self, messages: Sequence[Message], *, endpoint: str | None = None) -> Reward: ...

    async def complete(self, text: str, *, sample: int = 0, stop: tuple[str, ...] = ()) -> Reply:
        """Let the model go on with a raw text: no template is applied."""
        ...

    async def embed(self, text: str) -> None:
        """Ask for a text's vector; it stays in the ledger, for stages that see all rows."""
        ...

    async def run_python(self, function: str, row: JsonObject, *, batch_size: int, timeout_s: float) -> Any:
        """What a function of the recipe's author (FILE.py:NAME) returns for a row."""
        ...

    def prompt(self, name: str, **values: object) -> str:
        """A prompt text of the book with its placeholders filled in."""
        ...

    def random(self, purpose: str) -> random.Random:
        """A generator seeded by the run's seed, this record and the purpose."""
        ...

    def count(self, name: str, value: float = 1.0) -> None:
        """Add to a counter of the stage; stored with the work's effects."""
        ...


MapFunction = Callable[[Any, Context, Any], Awaitable[Sequence[Row | None]]]
Drop = tuple[str, str]  # rule, reason
BarrierFunction = Callable[[Iterable[tuple[bytes, Any]], Any], Mapping[bytes, Drop]]
# (record, row, packed vector) of every row
VectorFunction = Callable[[Iterable[tuple[bytes, Any, bytes]], Any], Mapping[bytes, Drop]]
RootFunction = Callable[[Any], Iterable[JsonObject]]


@dataclass(frozen=True)
class NoSettings:
    """For stages without any setting."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of stage.

    run: rows made of one row; None in the list stands for "the row itself passes". Raises Filtered to drop
    it. decide: for stages that must see all rows at once, the rows to drop. roots: for sources.
    version: raise it when the code changes what the stage makes.
    """

    summary: str
    takes: tuple[type, ...]
    makes: type | None  # None: the type it takes
    knobs: type = NoSettings
    run: MapFunction | None = None
    decide: BarrierFunction | None = None
    decide_by_vector: VectorFunction | None = None
    roots: RootFunction | None = None
    prompts: tuple[str, ...] = ()
    sampling: Sampling | None = None  # the default; None: this stage makes no calls
    version: int = 1
    makes_by: Callable[[Any], type] | None = None  # what it makes, where the knobs decide
    reads: Callable[[Any], set[str]] | None = None  # the columns that its templates name
    adds: Callable[[Any], Sequence[str]] | None = None  # the columns that it adds
    identity: Callable[[Any], Any] | None = None  # what besides the knobs decides its rows
    check: Callable[[Any], None] | None = None  # raises for knobs that cannot work, such as missing files
    answers: Callable[[Any], int] | None = None  # how many answers each row gets, for stages that answer
    compares: tuple[int, int] | None = None  # the least and the most answers, for judges
    needs: Callable[[Any], str] | None = None  # what not every endpoint gives, in words
    calls: Callable[[Any], float] | None = None  # expected calls per row, for `plan`
    fan_out: Callable[[Any], float] | None = None  # expected rows per row, for `plan`
