"""Files to rows: every row read, every problem named by file and line, none silently dropped.

A source is a file, a folder, a pattern or a data set of the hub. Lists, lines, tables and texts are told by
the file's name, compression too.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nemotron4.errors import ConfigError, DataError, import_optional
from nemotron4.records import FieldError
from nemotron4.row_files import SUFFIXES, is_separated, plain, plain_name, raw_rows
from nemotron4.training.encoding import Problem, ReadRow, RowKind
from nemotron4.training.indexed import is_corpus
from nemotron4.training.rows import Fields

HUB = "hub:"
LATIN_1 = 'say so if it is: --latin-1, or in a recipe { path = "...", encoding = "latin-1" }'


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Rows of one place. ``map``: our name of a column -> its name there. ``ignore``: columns to leave."""

    path: str
    weight: float | None = None  # its share of the samples; without weights every sample comes once an epoch
    limit: int | None = None  # the first rows only
    kind: str | None = None  # another kind of row that the stage reads
    map: dict[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight < 0:
            raise ConfigError(f"the weight of {self.path} is {self.weight}; expected 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the limit of {self.path} is {self.limit}; expected 1 or more")


@dataclass
class Ignored:
    """Columns that no row of a file was read by: file -> names."""

    columns: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, file: str, names: Sequence[str]) -> None:
        if names:
            self.columns.setdefault(file, {}).update(dict.fromkeys(names))

    def lines(self) -> list[str]:
        return [f"{file}: ignored: {', '.join(names)}" for file, names in self.columns.items()]


def read_rows(
    source: TrainingSource, kind: RowKind, ignored: Ignored | None = None
) -> Iterator[ReadRow | Problem]:
    """Every row of the source, good or bad. DataError only for a file that cannot be read at all."""
    ignored = Ignored() if ignored is None else ignored
    left = source.limit
    for file in [source.path] if source.path.startswith(HUB) else files_of(source.path):
        for where, value in kind.joined(_raw_rows(file, encoding=source.encoding)):
            if left is not None and left <= 0:
                return
            left = None if left is None else left - 1
            yield _parsed(where, value, source, kind, str(file), ignored)


def _parsed(
    where: str, value: Any, source: TrainingSource, kind: RowKind, file: str, ignored: Ignored
) -> ReadRow | Problem:
    if isinstance(value, str):
        return Problem(where, value)
    try:
        _check_texts(value)
        row = {name: entry for name, entry in value.items() if name not in source.ignore}
        for theirs in source.map.values():
            if theirs not in value:
                raise FieldError(f"field {theirs!r}, which the source's map names, is missing")
            row.pop(theirs, None)
        row |= {ours: value[theirs] for ours, theirs in source.map.items()}
        fields = Fields(row, is_text=is_separated(Path(file)))
        parsed = kind.parse(fields)
        ignored.add(file, [*fields.unread(), *(name for name in value if name in source.ignore)])
    except FieldError as error:
        return Problem(where, str(error))
    return ReadRow(where, parsed, value)


def _check_texts(value: Any) -> None:
    """FieldError for a text that no tokenizer can read: with NUL, or half of a surrogate pair."""
    if isinstance(value, str):
        if "\x00" in value:
            raise FieldError("a text has the character NUL")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise FieldError(f"a text has half of a surrogate pair, {value[error.start]!r}") from None
    elif isinstance(value, dict):
        for entry in value.values():
            _check_texts(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_texts(entry)


def refuse_too_many(problems: Sequence[Problem], num_rows: int, max_bad_rows: int) -> None:
    """DataError with the first problems if there are more than allowed."""
    if len(problems) > max_bad_rows:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"{len(problems)} of {num_rows} rows cannot be used (data.max_bad_rows is {max_bad_rows}):\n"
            f"{shown}{more}",
            hint="nemotron4 doctor data shows every one and writes a clean copy with --write-clean",
        )


# ---- which files


def files_of(path: str | Path) -> list[Path]:
    """The files behind a path: itself, those of a folder, or those of a pattern with ``*``.

    Of a folder that ``datasets`` saved to disk, what it lists. DataError for a folder without rows, and for
    one with several splits, of which one must be named.
    """
    folder = Path(path)
    if is_corpus(str(path)):
        raise DataError(f"{path}: an indexed corpus of tokens, which stage pretrain reads; rows are expected")
    if glob.has_magic(str(path)) and not folder.exists():
        found = sorted(Path(entry) for entry in glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"{path}: no file has such a name")
        return [file for entry in found for file in files_of(entry)]
    if not folder.is_dir():
        if not folder.exists():
            raise DataError(f"{path}: cannot be read: there is no such file")
        return [folder]
    state = folder / "state.json"
    if state.is_file():
        return [folder / entry["filename"] for entry in _saved_state(state)]
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        raise DataError(
            f"{path}: a data set with the splits {', '.join(splits)}", hint=f"name one: {folder / splits[0]}"
        )
    files = sorted(entry for entry in folder.iterdir() if _has_rows(entry))
    if not files:
        raise DataError(f"{path}: no file with rows is in the folder", hint=f"known: {', '.join(SUFFIXES)}")
    return files


def _saved_state(state: Path) -> list[dict[str, str]]:
    try:
        files: list[dict[str, str]] = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{state}: not the state of a saved data set: {error!r}") from error
    for entry in files:
        if Path(entry["filename"]).name != entry["filename"]:
            raise DataError(f"{state}: {entry['filename']!r} is not a plain file name")
    return files


def _has_rows(path: Path) -> bool:
    return plain_name(path).endswith(SUFFIXES) and not path.name.startswith(".")


# ---- raw rows


def _raw_rows(path: str | Path, *, encoding: str) -> Iterator[tuple[str, Any]]:
    """Of a file or a data set of the hub; see ``row_files.raw_rows``."""
    if str(path).startswith(HUB):
        return _hub_rows(str(path))
    return raw_rows(Path(path), encoding=encoding, hint=LATIN_1)


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    """``hub:ORG/NAME[/CONFIG][:split]`` through the package datasets, whose cache and settings apply."""
    for number, row in enumerate(hub_rows(name), start=1):
        yield f"{name}:{number}", plain(row)


@cache
def hub_rows(name: str) -> Any:
    """The data set itself; ``cache_files`` of it name its version."""
    datasets = import_optional("datasets", f"reading {name}")
    repository, _, split = name.removeprefix(HUB).partition(":")
    config = None
    if repository.count("/") == 2 and not Path(repository).exists():
        repository, _, config = repository.rpartition("/")
    try:
        found = datasets.load_dataset(repository, config, split=split or None)
    except Exception as error:  # every library below it has its own
        hint = f"a configuration is named so: {HUB}ORG/NAME/CONFIG:split"
        raise DataError(f"{name}: cannot be read: {error}", hint=hint) from error
    if not isinstance(found, datasets.Dataset):
        splits = ", ".join(found)
        raise DataError(f"{name}: a data set with the splits {splits}", hint=f"name one: {name}:{min(found)}")
    return found
