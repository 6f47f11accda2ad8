"""``nemotron4 recipe``: run a folder's stages one after the other, each of them an ordinary command."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.options import JsonOption, SetOption
from nemotron4.errors import unknown

if TYPE_CHECKING:
    from nemotron4.recipe import CommandStage, StagedRun

TAIL_LINES = 15

app = group("Run a recipe of stages: generate data, train, evaluate. A run survives kill -9: repeat it.")


@app.callback()
def recipe() -> None:
    """Keeps ``run`` a sub-command while it is the only one."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with recipe.toml.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run; the same command resumes it.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="The recipe's other values of this name.")] = None,
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    again: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Remove and repeat this stage and all after it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every stage; run nothing.")] = False,
    slurm: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --dry-run: a batch script for each stage.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run or continue every stage; DIR/manifest.json has their hashes."""
    from nemotron4.errors import ConfigError
    from nemotron4.recipe import Places, load_staged, staged_run

    loaded = load_staged(folder, overrides or [], preset)
    names = [stage.name for stage in loaded.stage]
    if until is not None and until not in names:
        raise unknown("stage", until, names)
    here = folder if folder.is_dir() else folder.parent
    places = Places(here, out or Path("OUT"), loaded.port, _find_model)
    if dry_run:
        if again is not None:
            raise ConfigError("--again removes stages, and --dry-run nothing", hint="leave one of them out")
        if until is not None:
            loaded = replace(loaded, stage=loaded.stage[: names.index(until) + 1])
        from nemotron4.cli.recipe_check import show_dry_run

        show_dry_run(loaded, places, slurm=slurm, as_json=as_json)
        return
    if slurm is not None:
        raise ConfigError("--slurm goes with --dry-run", hint="add --dry-run")
    if out is None:
        raise ConfigError("--out is missing", hint="give the folder of the run: --out DIR")
    with staged_run(loaded, places, preset) as current:
        for removed in current.forget(again) if again is not None else []:
            shutil.rmtree(removed)
        for number, stage in enumerate(loaded.stage, start=1):
            _run_stage(current, stage, f"stage {number} of {len(names)}, {stage.name}")
            if stage.name == until:
                break
    if as_json:
        print_json(current.manifest)
        return
    for name, done in current.manifest["stages"].items():
        for text in done["outputs"]:
            stage = next(s for s in loaded.stage if s.name == name)
            print(f"{name}\t{places.fill(text, stage)}")


def _find_model(name: str) -> Path | None:
    """The files of a pulled model."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.errors import CheckpointError

    try:
        return resolve(name)
    except CheckpointError:
        return None


def _run_stage(current: StagedRun, stage: CommandStage, title: str) -> None:
    from nemotron4.cli.child_server import own_command, run_child, served
    from nemotron4.errors import DataError
    from nemotron4.recipe import LOGS

    if current.is_done(stage):
        note(f"{title}: is done")
        return
    logs = current.places.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)

    log = logs / f"{stage.name}.txt"
    with log.open("a", encoding="utf-8") as lines, _Shown(current, title) as shown:

        def hear(line: str) -> None:
            lines.write(f"{line}\n")
            lines.flush()
            shown.hear(line)

        try:
            current.run(
                stage,
                lambda command: run_child(own_command(command), on_line=hear),
                lambda command: served(command, current.places.port, logs / f"{stage.name}.server.txt"),
            )
        except DataError as error:
            tail = "".join(f"\n    {line}" for line in shown.lines[-TAIL_LINES:])
            raise DataError(f"{error.message}; {log} ends with:{tail}", hint=error.hint) from error


class _Shown:
    """One line for the whole: the stage, what its command said last, and the time that is left."""

    def __init__(self, current: StagedRun, title: str) -> None:
        from nemotron4.progress import LiveText

        self.lines: list[str] = []
        self._current, self._title = current, title
        self._started_s = time.monotonic()
        self._said, self._left_s = "", 0.0
        self._live = LiveText(self._text)

    def __enter__(self) -> _Shown:
        self._live.start()
        self._live.print(self._text())
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def hear(self, line: str) -> None:
        """A line of the command: progress as JSON, or text."""
        told = _as_progress(line)
        if told is None:
            self.lines = [*self.lines[-TAIL_LINES:], line]
            self._said = line.strip() or self._said
        elif "note" in told:
            self._said = told["note"]
        elif "line" in told:
            self._said, self._left_s = told["line"], told["left_s"] or 0.0
        else:
            of = f" of {told['total']:,}" if told["total"] is not None else ""
            self._said = f"{told['name'] or 'progress'}: {told['done']:,}{of} {told['unit']}"
            self._left_s = told["left_s"] or 0.0
        self._live.changed()

    def _text(self) -> str:
        from nemotron4.progress import duration

        elapsed_s = time.monotonic() - self._started_s
        left_s = self._current.seconds_left(elapsed_s, self._left_s)
        left = f"; all stages: about {duration(left_s)} left" if left_s is not None else ""
        said = f": {self._said[:100]}" if self._said else ""
        return f"{self._title}{said}, {duration(elapsed_s)}{left}"


def _as_progress(line: str) -> dict[str, Any] | None:
    """What ``NEMOTRON4_PROGRESS=json`` makes of a line of progress."""
    if not line.startswith("{"):
        return None
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and (told.keys() >= {"unit", "left_s"} or "note" in told) else None
