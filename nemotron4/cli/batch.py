"""A file of prompts through one engine: every row answered once, a bounded number at a time.

A run with output ``answers.jsonl`` keeps ``answers.jsonl.partial`` while it works: a first line that says
what the run is made of, then one line for each finished row. When the last row is there, ``answers.jsonl``
appears whole, with ``answers.jsonl.run.json`` (what the run was made of), and the partial file goes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from nemotron4 import records
from nemotron4.cli.answering import RowAnswers, Wanted, is_failed
from nemotron4.cli.console import note
from nemotron4.cli.rows import SEED_RULE
from nemotron4.client.interface import TransientError
from nemotron4.engine import InferenceEngine, SamplingParams
from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.json_form import to_json
from nemotron4.progress import Progress
from nemotron4.records import JsonObject
from nemotron4.runs import RowLog, differences, in_flight, run_stoppable, write_json
from nemotron4.text.answers import EngineStoppedError


class Output:
    """The output file of one run: its finished rows, and its name once all are there."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Start or continue the run; refused: an output of another run, or of another process."""
        if str(path) == "-":
            raise DataError(
                "output is -: answers go to a file, where a kill loses none of them",
                hint="name a file and print it afterwards",
            )
        self.path = path
        self._run = dict(run)
        self._partial = path.with_name(path.name + ".partial")
        self._record = path.with_name(path.name + ".run.json")
        earlier = self._recorded()
        # A run that recorded no rule goes on by the first one.
        self.seed_rule = SEED_RULE if earlier is None else earlier.get("seed_rule", 1)
        if self.seed_rule != 1:
            self._run["seed_rule"] = self.seed_rule
        self._log: RowLog | None = None
        if self._partial.exists() or not self._is_finished():
            self._log = RowLog(self._partial, key=itemgetter("row"), settings=self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.close()

    @property
    def log(self) -> RowLog | None:
        """Rows ``{"row": number, "value": answer}`` of the unfinished run; None when it is complete."""
        return self._log

    def finish(self) -> None:
        """All rows are there: write them in input order under the output's name."""
        assert self._log is not None, "a complete output is not finished twice"
        log = self._log
        numbers = sorted(number for number in log.keys if isinstance(number, int))
        write_json(self._record, self._run)
        records.write(self.path, (line for number in numbers for line in _lines(log[number]["value"])))
        self._partial.unlink()

    def _recorded(self) -> Mapping[str, Any] | None:
        """What the run was made of that left these files."""
        try:
            if self._partial.exists():
                with self._partial.open(encoding="utf-8") as lines:
                    earlier = json.loads(lines.readline())["run"]
            else:
                earlier = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return earlier if isinstance(earlier, dict) else None

    def _is_finished(self) -> bool:
        """True when the output exists and this very run wrote it."""
        if not self.path.exists():
            return False
        earlier = self._recorded()
        found = [] if earlier is None else differences(earlier, self._run)
        if earlier is None or found:
            raise DataError(
                f"{self.path} exists already"
                + (f" and is of another run: {'; '.join(found[:3])}" if found else ""),
                hint="choose another output, or remove it",
            )
        return True


def _lines(value: JsonObject | list[JsonObject]) -> list[JsonObject]:
    """A row's output lines; earlier versions kept the one line itself."""
    return value if isinstance(value, list) else [value]


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line number (from 1) and bytes of every line that is not blank."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def as_json(params: SamplingParams) -> JsonObject:
    """The settings that differ from their defaults, for a record of the run."""
    changed = {
        field.name: getattr(params, field.name)
        for field in dataclasses.fields(params)
        if getattr(params, field.name) != getattr(SamplingParams(), field.name)
    }
    return {name: to_json(value) for name, value in changed.items()}


def answer_file(
    load_engine: Callable[[], InferenceEngine],
    path: Path,
    output: Output,
    wanted: Wanted,
    *,
    max_in_flight: int,
) -> None:
    """Answer every row of the file that the output does not hold yet, then give the output its name.

    The engine is loaded when there is something to answer.
    """
    log = output.log
    assert log is not None, "a complete output needs no answers"
    num_rows = sum(1 for _ in numbered_lines(path))
    if log.num_torn_bytes:
        note("an unfinished row of an earlier start was dropped")
    if len(log) < num_rows:
        engine = load_engine()
        try:
            with Progress(num_rows, len(log)) as progress:
                rule, count = output.seed_rule, progress.add_token
                rows = RowAnswers(engine, wanted, seed_rule=rule, count_token=count)
                run_stoppable(_answer_rows(rows, path, log, progress, max_in_flight=max_in_flight))
        except (EngineStoppedError, TransientError) as error:
            raise Nemotron4Error(
                error.message, hint="the finished rows are kept: repeat the command"
            ) from error
        finally:
            engine.close()
    output.finish()


async def _answer_rows(
    rows: RowAnswers, path: Path, log: RowLog, progress: Progress, *, max_in_flight: int
) -> None:
    """A row that cannot be served becomes an error record in its place. An engine that fails ends the run."""

    async def answer(item: tuple[int, bytes]) -> JsonObject:
        number, line = item
        return {"row": number, "value": await rows.answer(number, line)}

    def keep(finished: list[JsonObject]) -> None:
        log.append(*finished)
        progress.add(len(finished), num_failed=sum(any(map(is_failed, row["value"])) for row in finished))

    todo = (item for item in numbered_lines(path) if item[0] not in log)
    try:
        await in_flight(todo, answer, keep, limit=max_in_flight)
    finally:
        await rows.close()
