"""Files of texts to an indexed corpus: in parallel, in the files' order, resumed after any interruption.

While it is written, ``PREFIX.run.partial`` records how many rows are in it. At the end ``PREFIX.json`` says
what it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron4.checkpoint import open_checkpoint
from nemotron4.errors import ConfigError
from nemotron4.json_form import to_json
from nemotron4.progress import Progress
from nemotron4.runs import RowLog, differences, write_json
from nemotron4.text.parallel_encoding import BATCH_CHARACTERS, encode_batches
from nemotron4.text.tokenizer import Tokenizer, tokenizer_hash
from nemotron4.training.encoding import PlainText, Problem
from nemotron4.training.indexed import CorpusWriter, token_type
from nemotron4.training.reading import HUB, Ignored, TrainingSource, files_of, read_rows, refuse_too_many

KEEP_BYTES = 2**26  # of tokens, between two records of how far the corpus is


@dataclass(frozen=True)
class Tokenized:
    """What a corpus has, and the rows that it has not."""

    prefix: str
    documents: int
    tokens: int
    rows: int = 0
    problems: tuple[Problem, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Batch:
    """Rows up to ``last``, the number of the last one read; the texts of the good ones."""

    places: tuple[str, ...]
    texts: tuple[str, ...]
    last: int
    problems: tuple[Problem, ...]


def tokenize(
    sources: Sequence[TrainingSource],
    model: str,
    prefix: str,
    *,
    num_workers: int,
    max_bad_rows: int = 0,
    keep_bytes: int = KEEP_BYTES,
) -> Tokenized:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``, or go on with them; each document ends with the end of text.

    DataError for more bad rows than allowed, when all are read.
    """
    tokenizer = open_checkpoint(model).tokenizer()
    end_id = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    if end_id is None:
        raise ConfigError(f"{model}: its tokenizer has no token that ends a text")
    settings = _settings(sources, tokenizer, end_id)
    record = Path(f"{prefix}.json")
    if Path(f"{prefix}.idx").exists() and Path(f"{prefix}.bin").exists():
        return _finished(record, prefix, settings)
    Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    with RowLog(Path(f"{prefix}.run.partial"), settings=settings) as log:
        last = max(log.rows, key=lambda row: row["id"], default=None)
        try:
            found = _write(
                sources, tokenizer, end_id, prefix, log, last, num_workers, max_bad_rows, keep_bytes,
                lambda made: write_json(record, {**settings, **to_json(made)}),
            )  # fmt: skip
        except BaseException:
            if not any(row["documents"] for row in log.rows):
                log.path.unlink()  # nothing is lost, and the corrected command is not another run
            raise
        log.path.unlink()
    return found


def _settings(sources: Sequence[TrainingSource], tokenizer: Tokenizer, end_id: int) -> dict[str, Any]:
    """What a corpus is made of; files by name and size, because a hash of them all is another pass."""
    files = {
        str(file): file.stat().st_size
        for source in sources
        if not source.path.startswith(HUB)
        for file in files_of(source.path)
    }
    return {
        "sources": [to_json(source) for source in sources],
        "files": files,
        "tokenizer": tokenizer_hash(tokenizer),
        "end_of_document": end_id,
        "type": token_type(tokenizer.vocab_size),
    }


def _finished(record: Path, prefix: str, settings: dict[str, Any]) -> Tokenized:
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    found = differences({name: known.get(name) for name in settings}, settings)
    if found:
        raise ConfigError(
            f"{prefix}.idx exists, and is of other texts: {'; '.join(found[:3])}",
            hint="name another --out, or delete it",
        )
    for left in ("lengths.partial", "run.partial"):  # of a start that was killed when all was written
        Path(f"{prefix}.{left}").unlink(missing_ok=True)
    names = ("prefix", "documents", "tokens", "rows")
    problems = tuple(Problem(**problem) for problem in known["problems"])
    return Tokenized(
        **{name: known[name] for name in names}, problems=problems, ignored=tuple(known["ignored"])
    )


def _write(
    sources: Sequence[TrainingSource],
    tokenizer: Tokenizer,
    end_id: int,
    prefix: str,
    log: RowLog,
    last: dict[str, Any] | None,
    num_workers: int,
    max_bad_rows: int,
    keep_bytes: int,
    on_whole: Callable[[Tokenized], None],
) -> Tokenized:
    """``on_whole`` is told what the corpus is before the files of a whole one appear."""
    kept = last or {"id": 0, "tokens": 0, "documents": 0, "problems": []}
    dtype = token_type(tokenizer.vocab_size)
    writer = CorpusWriter(prefix, dtype, kept_tokens=kept["tokens"], kept_documents=kept["documents"])
    problems = [Problem(**problem) for problem in kept["problems"]]
    ignored = Ignored()
    rows = int(kept["id"])
    waiting: list[_Batch] = []

    def texts() -> Iterator[tuple[str, ...]]:
        for batch in _batches(sources, ignored, rows):
            waiting.append(batch)
            yield batch.texts

    def keep() -> None:
        writer.keep()
        state = {"tokens": writer.num_tokens, "documents": writer.num_documents}
        log.append({"id": rows, **state, "problems": [to_json(problem) for problem in problems]})

    with Progress(None, rows, unit="rows", name="tokenize") as progress, closing(writer):
        unkept = 0
        encoded = encode_batches(texts(), tokenizer, end_id=end_id, dtype=dtype, num_workers=num_workers)
        try:
            for part in encoded:
                batch = waiting.pop(0)
                writer.add(part.tokens, part.lengths)
                problems += batch.problems
                problems += [Problem(batch.places[place], message) for place, message in part.failed]
                progress.add(batch.last - rows, detail=f"{writer.num_tokens / 1e6:,.1f} M tokens")
                rows = batch.last
                unkept += len(part.tokens)
                if unkept >= keep_bytes:
                    keep()
                    unkept = 0
        finally:
            encoded.close()
            keep()
        refuse_too_many(problems, rows, max_bad_rows)
        made = Tokenized(
            prefix, writer.num_documents, writer.num_tokens, rows, tuple(problems), tuple(ignored.lines())
        )
        on_whole(made)
        writer.finish()
    return made


def _batches(sources: Sequence[TrainingSource], ignored: Ignored, num_done: int) -> Iterator[_Batch]:
    """The rows behind the first ``num_done``; the last batch may have problems alone."""
    places: list[str] = []
    texts: list[str] = []
    problems: list[Problem] = []
    number = size = 0
    for source in sources:
        for read in read_rows(replace(source, kind=None), PlainText(), ignored):
            number += 1
            if number <= num_done:
                continue
            if isinstance(read, Problem):
                problems.append(read)
                continue
            places.append(read.where)
            texts.append(read.row.text)
            size += len(read.row.text)
            if size >= BATCH_CHARACTERS:
                yield _Batch(tuple(places), tuple(texts), number, tuple(problems))
                places, texts, problems, size = [], [], [], 0
    if number > num_done:
        yield _Batch(tuple(places), tuple(texts), number, tuple(problems))
