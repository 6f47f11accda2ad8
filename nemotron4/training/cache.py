"""Rendered rows on disk: tokenised once, memory-mapped, shared by the processes and the starts of a run.

A folder of the cache is named by a hash of what decides its samples: the files' contents, how they are read,
the tokenizer, the prompt format, the settings of lengths, and this package's own code. It appears whole.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from nemotron4.config import cache_dir
from nemotron4.json_form import to_json
from nemotron4.records import Message
from nemotron4.runs import publish
from nemotron4.text.tokenizer import tokenizer_hash
from nemotron4.training.encoding import Encoder, Problem, sample_hash
from nemotron4.training.indexed import IndexedCorpus, is_corpus
from nemotron4.training.reading import HUB, TrainingSource, files_of, hub_rows
from nemotron4.training.rollouts import PromptSample
from nemotron4.training.samples import Sample, SampleSequence, Segment

TYPES = {
    "tokens": "i", "trained": "b", "segments": "q", "samples": "q", "labels": "d", "label_ends": "q",
    "files": "i", "lines": "q", "extra_ends": "q",
}  # fmt: skip
INDEX, EXTRA = "index.json", "extra.jsonl"


def cache_folder() -> Path:
    """In the user's cache of pulled models."""
    return cache_dir() / "rows"


def cache_key(sources: Sequence[TrainingSource], kind: object, encoder: Encoder) -> str:
    """Changes with anything that changes the samples."""
    used = encoder.prompt_format
    today = datetime.date.today().isoformat() if used is not None and used.writes_date else None
    facts: dict[str, Any] = {
        "sources": [
            replace(source, weight=None).__dict__ | {"files": source_hashes(source)} for source in sources
        ],
        "kind": repr(kind) if hasattr(kind, "__dataclass_fields__") else type(kind).__qualname__,
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "format": None if used is None else [used.name, used.template, used.date or today],
        "encoder": [
            encoder.max_length, encoder.over_long, encoder.bos_id, encoder.virtual_ids, encoder.row_tokens
        ],
        "code": _code_hash(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def source_hashes(source: TrainingSource) -> dict[str, str]:
    """A hash of each file's content; of a data set of the hub the files of its version."""
    if source.path.startswith(HUB):
        return {source.path: repr(hub_rows(source.path).cache_files)}
    if is_corpus(source.path):
        return {source.path: IndexedCorpus(source.path).fingerprint}
    return {str(file): file_hash(file) for file in files_of(source.path)}


def file_hash(path: Path) -> str:
    """SHA-256 of the content; remembered by name, size and time, so a large file is read once."""
    stat = path.stat()
    return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, time_ns: int) -> str:
    memory = (
        cache_folder() / "hashes" / hashlib.sha256(f"{path}\n{size}\n{time_ns}".encode()).hexdigest()[:32]
    )
    if size > 2**26 and memory.is_file():
        return memory.read_text(encoding="ascii")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if size > 2**26:
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(found, encoding="ascii")
    return found


@cache
def _code_hash() -> str:
    """Of the code that renders rows, so that a changed rule makes no use of old samples."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("text", "training", "training/stages"):
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def stored(
    key: str, make: Callable[[], Iterable[Sample | Problem]], ignored: Callable[[], list[str]]
) -> StoredSamples:
    """The samples of ``key``, made now if the cache lacks them; one process makes them, others wait."""
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).is_file():
            with locked(folder.with_suffix(".lock")):
                if not (folder / INDEX).is_file():
                    _write(folder, make(), ignored)
        return StoredSamples(folder)
    except OSError:  # a cache that cannot be written costs time, not the run
        with tempfile.TemporaryDirectory(prefix="nemotron4-rows-", ignore_cleanup_errors=True) as elsewhere:
            _write(Path(elsewhere) / key, make(), ignored)
            return StoredSamples(Path(elsewhere) / key)  # mapped files outlive their names


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, made: Iterable[Sample | Problem], ignored: Callable[[], list[str]]) -> None:
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index = _write_arrays(partial, made)
        index["ignored"] = ignored()
        (partial / INDEX).write_text(json.dumps(index), encoding="utf-8")
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_arrays(folder: Path, made: Iterable[Sample | Problem]) -> dict[str, Any]:
    ends = dict.fromkeys(("segments", "samples", "label_ends", "extra_ends"), 0)
    names: dict[str, int] = {}
    problems: list[Problem] = []
    digest = hashlib.sha256()
    num = longest = num_trained = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in TYPES}
        extra = stack.enter_context((folder / EXTRA).open("wb"))

        def put(name: str, values: Iterable[Any]) -> None:
            array(TYPES[name], values).tofile(files[name])

        for sample in made:
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            num += 1
            digest.update(sample_hash(sample).encode())
            for segment in sample.segments:
                put("tokens", segment.tokens)
                put("trained", segment.is_trained)
                ends["segments"] += len(segment.tokens)
                put("segments", [ends["segments"]])
                longest = max(longest, len(segment.tokens))
                num_trained += segment.num_trained
            ends["samples"] += len(sample.segments)
            ends["label_ends"] += len(sample.labels)
            file, _, line = sample.where.rpartition(":")
            put("labels", sample.labels)
            put("files", [names.setdefault(file, len(names))])
            put("lines", [int(line)])
            ends["extra_ends"] += extra.write(_extra(sample))
            for name in ("samples", "label_ends", "extra_ends"):
                put(name, [ends[name]])
    return {
        "num": num,
        "hash": digest.hexdigest(),
        "longest": longest,
        "num_trained": num_trained,
        "files": list(names),
        "problems": to_json(problems),
    }


def _extra(sample: Sample) -> bytes:
    if not isinstance(sample, PromptSample):
        return b""
    prompt: Any = sample.prompt
    if not isinstance(prompt, str):
        prompt = [[m.role, m.content, dict(m.more)] for m in prompt]
    return json.dumps({"prompt": prompt, "fields": sample.fields}, default=str).encode() + b"\n"


class StoredSamples(SampleSequence):
    """Samples in a folder of the cache; one is made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.arrays: Mapping[str, Any] = {
            name: _mapped(folder / f"{name}.bin", TYPES[name]) for name in TYPES
        }
        self._extra = _mapped(folder / EXTRA, "B")

    @property
    def problems(self) -> list[Problem]:
        return [Problem(**values) for values in self.facts["problems"]]

    def __len__(self) -> int:
        return int(self.facts["num"])

    def sample(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        segments = tuple(self._segment(i) for i in range(*self._span("samples", index)))
        labels = tuple(self.arrays["labels"][slice(*self._span("label_ends", index))].tolist())
        where = f"{self.facts['files'][self.arrays['files'][index]]}:{self.arrays['lines'][index]}"
        start, stop = self._span("extra_ends", index)
        if start == stop:
            return Sample(segments, labels, where)
        values = json.loads(self._extra[start:stop].tobytes())
        prompt = values["prompt"]
        if not isinstance(prompt, str):
            prompt = tuple(Message(role, content, more) for role, content, more in prompt)
        return PromptSample(segments, labels, where, prompt=prompt, fields=values["fields"])

    def _span(self, name: str, index: int) -> tuple[int, int]:
        ends = self.arrays[name]
        return (int(ends[index - 1]) if index else 0), int(ends[index])

    def _segment(self, index: int) -> Segment:
        part = slice(*self._span("segments", index))
        trained = tuple(map(bool, self.arrays["trained"][part].tolist()))
        return Segment(tuple(self.arrays["tokens"][part].tolist()), trained)


def _mapped(path: Path, kind: str) -> Any:
    dtype = numpy.dtype(kind)
    if not path.stat().st_size:
        return numpy.empty(0, dtype)
    return numpy.memmap(path, dtype, mode="r")
