"""Weak to strong: each round generates data with the current model and trains a base on it.

The loop of the Nemotron-4 report (arXiv 2406.11704, "Iterative Weak-to-Strong Alignment"): the aligned model
of a round is the generator of the next. The driver knows no trainer: its recipe names the commands. What each
round used and made is with hashes in the round's ``manifest.json``, written after every step, so the same
command goes on after a kill; the commands of an unfinished step are repeated, and ``nemotron4 synth run`` and
``nemotron4 train`` continue by themselves.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron4 import config
from nemotron4.errors import ConfigError, DataError
from nemotron4.recipe import Command, hash_of
from nemotron4.records import JsonObject
from nemotron4.runs import write_json

MANIFEST = "manifest.json"
STEPS = ("generate", "train", "evaluate")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_KNOWN = ("round", "folder", "generator", "base", "data", "result", "port", "url")

Serve = Callable[[Sequence[str], Path], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Commands run in order. ``makes`` is the file or folder that must exist afterwards and is hashed.

    serve: a server that runs meanwhile; it is waited for at ``{url}/health``.
    """

    commands: tuple[Command, ...]
    makes: str
    serve: Command = ()


@dataclass(frozen=True, kw_only=True)
class RoundsRecipe:
    """``bases`` holds what each round trains, so its length is the number of rounds.

    Commands and paths may hold {round}, {folder} (of the round), {generator}, {base}, {data} (made by
    generate), {result} (made by train), {port} and {url} (of a served model).
    """

    name: str
    generator: str
    bases: tuple[str, ...]
    generate: StepConfig
    train: StepConfig
    evaluate: StepConfig | None = None
    port: int = 18340

    def __post_init__(self) -> None:
        if not self.bases:
            raise ValueError("bases is empty; expected one model for each round")
        for name, step in self.steps():
            for text in (step.makes, *step.serve, *(word for command in step.commands for word in command)):
                unknown = set(_PLACEHOLDER.findall(text)) - set(_KNOWN)
                if unknown:
                    raise ValueError(f"{name} has the unknown {sorted(unknown)}; known: {', '.join(_KNOWN)}")

    def steps(self) -> list[tuple[str, StepConfig]]:
        found = [(name, getattr(self, name)) for name in STEPS]
        return [(name, step) for name, step in found if step is not None]


@dataclass
class Round:
    """One round under way: its values for the placeholders, and its manifest on disk."""

    number: int
    folder: Path
    values: dict[str, str]
    manifest: JsonObject = field(default_factory=dict)

    def save(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)


def load_rounds(path: Path, overrides: Sequence[str] = ()) -> RoundsRecipe:
    return config.load(RoundsRecipe, path, overrides)


def run_rounds(
    recipe: RoundsRecipe,
    out: Path,
    *,
    run: Callable[[Sequence[str]], int],
    serve: Serve,
    report: Callable[[str], None],
) -> list[JsonObject]:
    """Run or continue all rounds in ``out``; returns their manifests.

    ``run`` executes a command and returns its exit status; ``serve`` keeps one up meanwhile.
    """
    generator = recipe.generator
    manifests = []
    for number, base in enumerate(recipe.bases, start=1):
        folder = out / f"round-{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "round": str(number), "folder": str(folder), "generator": generator, "base": base,
            "port": str(recipe.port), "url": f"http://127.0.0.1:{recipe.port}",
        }  # fmt: skip
        current = Round(number, folder, values)
        _open_manifest(current, recipe)
        for name, step in recipe.steps():
            _run_step(current, name, step, run, serve, report)
        manifests.append(current.manifest)
        generator = current.values["result"]
    return manifests


def identity(model: str) -> JsonObject:
    """A path with the hash of its content; a name that is no path stands for itself."""
    path = Path(model)
    return {"name": model, "sha256": hash_of(path) if path.exists() else None}


def _open_manifest(current: Round, recipe: RoundsRecipe) -> None:
    """Start the round's manifest, or check that the stored one belongs to the same round."""
    inputs = {name: identity(current.values[name]) for name in ("generator", "base")}
    path = current.folder / MANIFEST
    if not path.exists():
        current.manifest = {"recipe": recipe.name, "round": current.number, **inputs, "steps": {}}
        current.save()
        return
    current.manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, wanted in inputs.items():
        if current.manifest[name] != wanted:
            raise ConfigError(
                f"{path}: the round was begun with the {name} {current.manifest[name]}; now it is {wanted}",
                hint="take another --out, or restore the earlier model",
            )


def _run_step(
    current: Round,
    name: str,
    step: StepConfig,
    run: Callable[[Sequence[str]], int],
    serve: Serve,
    report: Callable[[str], None],
) -> None:
    made = {"generate": "data", "train": "result", "evaluate": "evaluation"}[name]
    commands = [_filled(command, current) for command in step.commands]
    done: Any = current.manifest["steps"].get(name)
    output = Path(_filled([step.makes], current)[0])
    current.values[made] = str(output)
    if done is not None:
        _check_done(current, name, commands, output, done)
        report(f"round {current.number}: {name} is done")
        return
    report(f"round {current.number}: {name}")
    started = time.monotonic()
    server = serve(_filled(step.serve, current), current.folder) if step.serve else contextlib.nullcontext()
    with server:
        for command in commands:
            status = run(command)
            if status != 0:
                raise DataError(
                    f"round {current.number}, {name}: {' '.join(command)!r} ended with status {status}",
                    hint="repeat the same command: it goes on with this step",
                )
    if not output.exists():
        raise DataError(f"round {current.number}, {name}: the commands did not make {output}")
    current.manifest["steps"][name] = {
        "commands": commands, "seconds": round(time.monotonic() - started, 1), made: identity(str(output)),
    }  # fmt: skip
    current.save()


def _check_done(
    current: Round, name: str, commands: Sequence[Sequence[str]], output: Path, done: JsonObject
) -> None:
    """A finished step is passed over, but only if it is the one that the recipe asks for."""
    where = f"{current.folder / MANIFEST}: the step {name}"
    if done["commands"] != [list(command) for command in commands]:
        raise ConfigError(f"{where} was done with other commands", hint="take another --out")
    stored = next(value for value in done.values() if isinstance(value, dict))
    if not output.exists() or hash_of(output) != stored["sha256"]:
        raise DataError(
            f"{where} made {output}, which is missing or changed",
            hint="restore it, or remove the step from the manifest to repeat it",
        )


def _filled(command: Sequence[str], current: Round) -> list[str]:
    def value(match: re.Match[str]) -> str:
        if match[1] not in current.values:
            raise ConfigError(f"{{{match[1]}}} is used before the step that makes it")
        return current.values[match[1]]

    return [_PLACEHOLDER.sub(value, word) for word in command]
