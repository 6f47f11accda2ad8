"""Megatron's indexed format, memory-mapped: ``PREFIX.bin`` has the tokens, ``PREFIX.idx`` where each text is.

An ``.idx`` file, little-endian: nine bytes ``MMIDIDX\\0\\0``, version 1 (8 bytes), a code of the tokens' type
(1), the number of sequences (8), the number of documents and one (8); then for each sequence its length (4),
for each its place in the ``.bin`` in bytes (8), and the first sequence of each document, with the number of
sequences behind them (8). NeMo, Megatron-LM and Megatron-Bridge write and read it; datatrove writes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from nemotron4.errors import DataError
from nemotron4.runs import flush, publish, replacing

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point numbers
SMALL_VOCABULARY = 65_500  # below it Megatron stores tokens in two bytes
CHUNK = 2**20
SAMPLED_BYTES = 2**20

Numbers = NDArray[Any]


def is_corpus(path: str) -> bool:
    """Whether the path is the prefix of an indexed corpus, or one of its two files."""
    prefix = prefix_of(path)
    return Path(f"{prefix}.idx").is_file() or path != prefix


def prefix_of(path: str) -> str:
    return path.removesuffix(".idx").removesuffix(".bin")


class IndexedCorpus:
    """The documents of one prefix. Nothing but the header is in memory."""

    def __init__(self, path: str) -> None:
        self.prefix = prefix_of(path)
        self.index, self.data = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for file in (self.index, self.data):
            if not file.is_file():
                raise DataError(f"{file}: there is no such file; an indexed corpus is a .bin and an .idx")
        with self.index.open("rb") as stream:
            header = stream.read(34)
        if len(header) < 34 or header[:9] != MAGIC:
            raise DataError(f"{self.index}: not an index of Megatron's: it does not begin with {MAGIC!r}")
        version, code, self.num_sequences, num_ends = struct.unpack("<QBQQ", header[9:])
        if version != VERSION:
            raise DataError(f"{self.index}: version {version}; expected {VERSION}")
        if code not in TYPES:
            raise DataError(
                f"{self.index}: tokens of type {code}; expected one of {', '.join(map(str, TYPES))}"
            )
        self.dtype = numpy.dtype(TYPES[code])
        self.num_documents = num_ends - 1
        self._map()

    def _map(self) -> None:
        places = 34 + 4 * self.num_sequences, 34 + 12 * self.num_sequences
        expected, found = places[1] + 8 * (self.num_documents + 1), self.index.stat().st_size
        if found == expected + self.num_sequences:
            raise DataError(f"{self.index}: a corpus of several modes (text and images); only text is read")
        if found != expected or self.num_documents < 0:
            raise DataError(f"{self.index}: {found} bytes; its header says {expected}: is it cut short?")
        self._lengths = _mapped(self.index, "<i4", 34, self.num_sequences)
        self._places = _mapped(self.index, "<i8", places[0], self.num_sequences)
        self._first = _mapped(self.index, "<i8", places[1], self.num_documents + 1)
        # Where a document is one sequence, as in files for language models, its number is the sequence's.
        self._is_plain = self.num_documents == self.num_sequences
        size, end = self.data.stat().st_size, 0
        if self.num_sequences:
            end = int(self._places[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != end:
            raise DataError(f"{self.data}: {size} bytes; its index says {end}: is it cut short?")
        self.num_tokens = size // self.dtype.itemsize
        self._tokens = _mapped(self.data, self.dtype.str, 0, self.num_tokens)

    def lengths(self, documents: Numbers) -> Numbers:
        """Tokens of each of the documents, int64."""
        if self._is_plain:
            return self._lengths[documents].astype(numpy.int64)
        firsts, ends = self._first[documents], self._first[documents + 1]
        lasts = numpy.maximum(ends - 1, firsts)
        sizes = (self._places[lasts] - self._places[firsts]) // self.dtype.itemsize + self._lengths[lasts]
        return numpy.where(ends > firsts, sizes, 0).astype(numpy.int64)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Numbers:
        """Tokens ``start:stop`` of a document."""
        length = int(self.lengths(numpy.array([document]))[0])
        sequence = document if self._is_plain else int(self._first[document])
        if not length:
            return numpy.empty(0, self.dtype)
        at = int(self._places[sequence]) // self.dtype.itemsize
        return self._tokens[at + start : at + (length if stop is None else min(stop, length))]

    @cached_property
    def fingerprint(self) -> str:
        """Of both files: their sizes, and the first and the last megabyte of each."""
        digest = hashlib.sha256()
        for path in (self.index, self.data):
            size = path.stat().st_size
            digest.update(f"{path.suffix} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLED_BYTES))
                file.seek(max(0, size - SAMPLED_BYTES))
                digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()


def _mapped(path: Path, dtype: str, offset: int, count: int) -> Numbers:
    if not count:
        return numpy.empty(0, dtype)
    return numpy.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def token_type(vocab_size: int) -> str:
    """Of the tokens on disk: what Megatron takes for a vocabulary of this size."""
    return "<u2" if vocab_size < SMALL_VOCABULARY else "<i4"


def write_index(path: Path, lengths: Path, dtype: str) -> None:
    """The ``.idx`` of a ``.bin`` with one document after the other, from a file of their lengths (int32)."""
    count = lengths.stat().st_size // 4
    code = next(code for code, name in TYPES.items() if name == dtype)
    with replacing(path) as file, lengths.open("rb") as source:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, count, count + 1))
        for block in _blocks(source):
            file.write(block.tobytes())
        source.seek(0)
        at = 0
        for block in _blocks(source):
            ends = at + numpy.cumsum(block, dtype=numpy.int64)
            file.write(((ends - block) * numpy.dtype(dtype).itemsize).astype("<i8").tobytes())
            at = int(ends[-1])
        for start in range(0, count + 1, CHUNK):
            file.write(numpy.arange(start, min(start + CHUNK, count + 1), dtype="<i8").tobytes())


def _blocks(source: BinaryIO) -> Iterator[Numbers]:
    while data := source.read(4 * CHUNK):
        yield numpy.frombuffer(data, "<i4")


class CorpusWriter:
    """Appends documents to ``PREFIX.bin.partial``; what ``keep`` returned from survives a kill.

    ``PREFIX.bin`` and ``PREFIX.idx`` appear when it is finished.
    """

    def __init__(self, prefix: str, dtype: str, *, kept_tokens: int = 0, kept_documents: int = 0) -> None:
        self._prefix, self._dtype = prefix, numpy.dtype(dtype)
        self.partial, self.lengths = Path(f"{prefix}.bin.partial"), Path(f"{prefix}.lengths.partial")
        self.num_tokens, self.num_documents = kept_tokens, kept_documents
        kept = (kept_tokens * self._dtype.itemsize, 4 * kept_documents)
        self._files = []
        for path, size in zip((self.partial, self.lengths), kept, strict=True):
            file = path.open("ab")
            if file.tell() < size:
                raise DataError(f"{path}: {file.tell()} bytes; {size} were kept: delete the partial files")
            file.truncate(size)
            self._files.append(file)

    def add(self, tokens: bytes, lengths: bytes) -> None:
        """Documents: their tokens in the corpus's type, and the length of each as int32."""
        for file, data in zip(self._files, (tokens, lengths), strict=True):
            file.write(data)
        self.num_tokens += len(tokens) // self._dtype.itemsize
        self.num_documents += len(lengths) // 4

    def keep(self) -> None:
        """Have everything so far on the disk."""
        for file in self._files:
            file.flush()
            flush(Path(file.name))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def finish(self) -> None:
        self.keep()
        self.close()
        write_index(Path(f"{self._prefix}.idx"), self.lengths, self._dtype.str)
        publish(self.partial, Path(f"{self._prefix}.bin"))
        self.lengths.unlink()
        flush(self.partial.parent)
