"""A recipe of stages: a folder whose ``recipe.toml`` lists the commands that are run one after the other.

The runner knows no trainer and no evaluator: each stage names commands of ``nemotron4`` and what they make.
What a stage was given and what it made is kept with hashes in ``manifest.json``, written when the stage is
whole. The same command goes on after a kill: finished stages are passed over, the commands of the unfinished
one are repeated, and each of them continues by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemotron4 import __version__, config
from nemotron4.errors import ConfigError, DataError, unknown
from nemotron4.records import JsonObject
from nemotron4.runs import held, write_json

RECIPE_FILE = "recipe.toml"
MANIFEST = "manifest.json"
LOGS = "logs"
MAX_NESTED = 20  # values within values
PLACES = ("recipe", "out", "folder", "port", "url")
_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_.-]+)\}")

Command = tuple[str, ...]
Value = str | int | float | bool | list[str]


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What a stage works on when it is run whole, for the hours of ``--dry-run``.

    samples: rows that training reads, or that the data stage exports, or questions of an evaluation.
    tokens: of a sample, prompt and answers together; new ones where a model writes.
    efficiency: the share of the GPUs' peak (training), or of the planner's upper bound (a served model).
    """

    samples: int
    tokens: int
    efficiency: float
    gpu: str
    model: str = "nemotron4-340b"  # that writes, as `nemotron4 plan` names it

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 1 or not 0 < self.efficiency <= 1:
            raise ValueError("volume: samples and tokens are 1 or more, efficiency is in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class CommandStage:
    """Commands run in order. Each of ``makes`` must exist afterwards and is hashed.

    uses: files, folders and models that are hashed besides those that the commands name.
    serve: a server that runs meanwhile; it is waited for at ``{url}/health``.
    values: placeholders of this stage alone.
    like: an earlier stage that has the commands, and what else is not said here.
    each: the name of a list among the values; the stage is run once for each entry, as NAME-ENTRY.
    skip: the presets without this stage.
    minutes: expected on the machine that the recipe is written for; it only serves the time left.
    """

    name: str
    commands: tuple[Command, ...] = ()
    makes: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    serve: Command = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    like: str = ""
    each: str = ""
    skip: tuple[str, ...] = ()
    minutes: float = 0.0
    volume: Volume | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", self.name) or self.name in (*PLACES, LOGS):
            raise ValueError(f"name is {self.name!r}; expected small letters, digits, '-', '_' and '.'")
        if self.like and (self.commands or self.makes):
            raise ValueError(
                f"stage {self.name} has commands or makes, and like, which names a stage for them"
            )
        if not self.like and not (self.commands and self.makes):
            raise ValueError(f"stage {self.name} needs commands, and makes")
        for command in (*self.commands, *([self.serve] if self.serve else ())):
            is_script = command[:1] == ("python",) and command[1:] and command[1].endswith(".py")
            if len(command) < 2 or not (command[0] == "nemotron4" or is_script):
                raise ValueError(
                    f"stage {self.name}: {command} is neither nemotron4 ... nor python FILE.py ..."
                )

    def words(self) -> Iterator[str]:
        for command in (*self.commands, self.serve):
            yield from command
        yield from self.makes
        yield from self.uses


@dataclass(frozen=True, kw_only=True)
class StagedRecipe:
    """``values`` are placeholders of one's own, which ``preset.NAME`` replaces.

    Commands and paths may hold {recipe} (its folder), {out}, {folder} (of the stage, which exists), {NAME}
    (the folder of an earlier stage), {port}, {url} (of the served model) and the values. Placeholders within
    placeholders are filled first: {dpo-{seed}}.
    """

    name: str
    stage: tuple[CommandStage, ...]
    values: Mapping[str, Value] = field(default_factory=dict)
    preset: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    port: int = 18350

    def __post_init__(self) -> None:
        if not self.stage:
            raise ValueError("there is no [[stage]]")
        for name, changed in self.preset.items():
            if unknown := set(changed) - set(self.values):
                raise ValueError(f"preset.{name} has {sorted(unknown)}, which values does not have")
        if taken := set(self.values) & {*PLACES, *(stage.name for stage in self.stage)}:
            raise ValueError(f"values has {sorted(taken)}, which has a meaning already")


def load_staged(folder: Path, overrides: Sequence[str] = (), preset: str | None = None) -> StagedRecipe:
    """The recipe with the preset and the lists applied: every word holds only places."""
    path = folder / RECIPE_FILE if folder.is_dir() else folder
    recipe = config.load(StagedRecipe, path, overrides)
    own = config.load(StagedRecipe, path).values if overrides else recipe.values
    if added := [name for name in recipe.values if name not in own]:
        raise unknown("value", added[0], own)
    if preset is not None and preset not in recipe.preset:
        raise unknown("preset", preset, recipe.preset or ["none, the recipe has no presets"])
    values = {**recipe.values, **(recipe.preset[preset] if preset else {})}
    stages: list[CommandStage] = []
    whole: dict[str, CommandStage] = {}
    for stage in recipe.stage:
        whole[stage.name] = _whole(stage, whole)
        if preset not in stage.skip:
            stages += _copies(whole[stage.name], {**values, **whole[stage.name].values})
    names = [stage.name for stage in stages]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two stages are called {min(twice)}")
    for place, stage in enumerate(stages):
        _check_places(stage, names[:place])
    return replace(recipe, stage=tuple(stages), values=values)


def _whole(stage: CommandStage, earlier: Mapping[str, CommandStage]) -> CommandStage:
    """The stage with what it has of the one that it is like."""
    if not stage.like:
        return stage
    if stage.like not in earlier:
        raise unknown(f"like of stage {stage.name}", stage.like, earlier or ["none, it is the first"])
    model = earlier[stage.like]
    return replace(
        model, name=stage.name, values={**model.values, **stage.values}, uses=stage.uses or model.uses,
        each=stage.each or model.each, skip=stage.skip, minutes=stage.minutes or model.minutes,
    )  # fmt: skip


def _copies(stage: CommandStage, values: Mapping[str, Value]) -> Iterator[CommandStage]:
    """The stage with the values filled in, once for each entry of its list."""
    if not stage.each:
        yield _with_values(stage, values)
        return
    entries = values.get(stage.each)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"stage {stage.name}: each is {stage.each!r}; expected the name of a list in [values]"
        )
    for entry in entries:
        try:
            copy = replace(stage, name=f"{stage.name}-{entry}")
        except ValueError as error:
            raise ConfigError(f"stage {stage.name} for each {stage.each}: {error}") from error
        yield _with_values(copy, {**values, stage.each: entry})


def _with_values(stage: CommandStage, values: Mapping[str, Value]) -> CommandStage:
    def value(name: str) -> str | None:
        found = values.get(name)
        if isinstance(found, list):
            raise ConfigError(f"stage {stage.name}: {{{name}}} is a list", hint=f'write each = "{name}"')
        return None if found is None else str(found).lower() if isinstance(found, bool) else str(found)

    def fill(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(_fill(word, value) for word in words)

    return replace(
        stage, commands=tuple(map(fill, stage.commands)), serve=fill(stage.serve), makes=fill(stage.makes),
        uses=fill(stage.uses),
    )  # fmt: skip


def _fill(word: str, value: Callable[[str], str | None]) -> str:
    """Replace the innermost placeholders that have a value, until none has."""
    for _ in range(MAX_NESTED):
        filled = _PLACEHOLDER.sub(lambda match: match[0] if (v := value(match[1])) is None else v, word)
        if filled == word:
            return word
        word = filled
    raise ConfigError(f"the values of the recipe name each other in a circle: {word[:80]}")


def _check_places(stage: CommandStage, earlier: Sequence[str]) -> None:
    for word in stage.words():
        for name in _PLACEHOLDER.findall(word):
            if name not in PLACES and name not in earlier:
                raise unknown(f"placeholder of stage {stage.name}", name, (*PLACES, *earlier))


@dataclass(frozen=True)
class Places:
    """Where a recipe is run."""

    recipe: Path
    out: Path
    port: int
    find_model: Callable[[str], Path | None] = lambda name: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fill(self, word: str, stage: CommandStage) -> str:
        known = {"recipe": self.recipe, "out": self.out, "folder": self.out / stage.name, "port": self.port,
                 "url": self.url}  # fmt: skip
        return _PLACEHOLDER.sub(lambda match: str(known.get(match[1], self.out / match[1])), word)

    def command(self, command: Command, stage: CommandStage) -> list[str]:
        return [self.fill(word, stage) for word in command]

    def inputs(self, stage: CommandStage) -> dict[str, Path]:
        """What exists of the paths and models that the commands name, but for what the stage makes itself."""
        found: dict[str, Path] = {}
        made = [Path(self.fill(text, stage)) for text in stage.makes]
        for word in (*(w for command in (*stage.commands, stage.serve) for w in command[1:]), *stage.uses):
            for part in _paths_in(word):
                path = Path(self.fill(part, stage))
                if "{folder}" in part or part in ("{out}", "{recipe}", ".", "/"):
                    continue
                place = path if path.exists() else self.find_model(str(path))
                if place is not None and not any(each.is_relative_to(path) for each in made):
                    found[part] = place
        return found


def _paths_in(word: str) -> list[str]:
    """``data.train=["a.jsonl", "b.jsonl"]`` names a.jsonl and b.jsonl."""
    value = word.partition("=")[2] or word
    return re.findall(r'"([^"]+)"', value) or [value]


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files in the order of their names."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{file.relative_to(path).as_posix()}\n{hash_of(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


@dataclass
class StagedRun:
    """A recipe under way in ``places.out``."""

    recipe: StagedRecipe
    places: Places
    preset: str | None = None
    manifest: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.places.out / MANIFEST
        settings = {"recipe": self.recipe.name, "preset": self.preset}
        if not path.exists():
            self.manifest = {**settings, "nemotron4": __version__, "stages": {}}
            return
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(self.manifest, dict) or not isinstance(self.manifest.get("stages"), dict):
            raise DataError(f"{path}: not the manifest of a recipe's run", hint="take another --out")
        for name, wanted in settings.items():
            if self.manifest.get(name) != wanted:
                raise ConfigError(
                    f"{path} is of another run: {name} was {self.manifest.get(name)!r}, is {wanted!r}",
                    hint="take another --out",
                )

    def is_done(self, stage: CommandStage) -> bool:
        """Whether it is finished, and with these commands, inputs and outputs; else it says what differs."""
        done = self.manifest["stages"].get(stage.name)
        if done is None:
            return False
        again = f"--again {stage.name} repeats it and what follows; or take another --out"
        if done["commands"] != [list(command) for command in stage.commands]:
            raise ConfigError(f"stage {stage.name} was done with other commands", hint=again)
        for kind, current in (
            ("inputs", self.places.inputs(stage)),
            ("outputs", {text: Path(self.places.fill(text, stage)) for text in stage.makes}),
        ):
            for text, digest in done[kind].items():
                path = current.get(text)
                if path is None or not path.exists() or hash_of(path) != digest:
                    raise DataError(
                        f"stage {stage.name}: {path or text} of its {kind} is missing or changed", hint=again
                    )
        return True

    def forget(self, name: str) -> list[Path]:
        """Drop this stage and those after it; returns the folders that they were made in."""
        names = [stage.name for stage in self.recipe.stage]
        if name not in names:
            raise unknown("stage", name, names)
        later = names[names.index(name) :]
        for each in later:
            self.manifest["stages"].pop(each, None)
        self._save()
        return [folder for each in later if (folder := self.places.out / each).exists()]

    def run(self, stage: CommandStage, run: Callable[[Sequence[str]], int], serve: Any) -> None:
        """Run a stage's commands; DataError if one fails or something is not made."""
        inputs = {text: hash_of(path) for text, path in self.places.inputs(stage).items()}
        (self.places.out / stage.name).mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        server = serve(self.places.command(stage.serve, stage)) if stage.serve else contextlib.nullcontext()
        with server:
            for command in stage.commands:
                words = self.places.command(command, stage)
                if status := run(words):
                    raise DataError(
                        f"stage {stage.name}: {' '.join(words)!r} ended with status {status}",
                        hint="repeat the same command: it goes on with this stage",
                    )
        outputs = {}
        for text in stage.makes:
            path = Path(self.places.fill(text, stage))
            if not path.exists():
                raise DataError(f"stage {stage.name}: the commands did not make {path}")
            outputs[text] = hash_of(path)
        self.manifest["stages"][stage.name] = {
            "commands": [list(command) for command in stage.commands],
            "inputs": inputs,
            "outputs": outputs,
            "seconds": round(time.monotonic() - started, 1),
        }
        self._save()

    def _save(self) -> None:
        write_json(self.places.out / MANIFEST, self.manifest)

    def seconds_left(self, elapsed_s: float = 0.0, child_left_s: float = 0.0) -> float | None:
        """Of all unfinished stages, by the expected minutes at the speed so far; None if there are none."""
        done = self.manifest["stages"]
        finished = [s for s in self.recipe.stage if s.name in done and s.minutes]
        expected_s = 60 * sum(stage.minutes for stage in finished)
        speed = sum(done[stage.name]["seconds"] for stage in finished) / expected_s if expected_s else 1.0
        first, *rest = [60 * speed * s.minutes for s in self.recipe.stage if s.name not in done] or [0.0]
        left_s = max(first - elapsed_s, child_left_s, 0.0) + sum(rest)
        return left_s if any(stage.minutes for stage in self.recipe.stage) else None


@contextlib.contextmanager
def staged_run(recipe: StagedRecipe, places: Places, preset: str | None = None) -> Iterator[StagedRun]:
    """The run of a recipe in a folder, for this process alone."""
    with held(places.out):
        yield StagedRun(recipe, places, preset)
