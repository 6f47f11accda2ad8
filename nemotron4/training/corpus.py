"""Windows of an indexed corpus: documents in an order that the seed decides, packed, in constant memory.

The documents go through a permutation that is computed place by place, and GROUP of them that follow each
other in it are one group. A group's documents are laid end to end and cut into windows; a table of how many
windows the groups have finds a window by its number, so a run goes on from its number of samples alone. The
table has 8 bytes for each GROUP documents: 1 MB for 8 billion, made by one pass over their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy

from nemotron4.errors import DataError
from nemotron4.runs import replacing
from nemotron4.training.cache import cache_folder, locked
from nemotron4.training.indexed import Numbers
from nemotron4.training.samples import Sample, SampleSequence, Segment
from nemotron4.training.shuffling import Permutation, key_of

GROUP = 65_536
PASS_CHUNK = 2**18
KEPT_FROM = 2**24  # documents, whose pass takes seconds


class Documents(Protocol):
    """What windows need of a corpus; ``IndexedCorpus`` is one."""

    prefix: str
    num_documents: int

    @property
    def fingerprint(self) -> str: ...

    def lengths(self, documents: Numbers) -> Numbers: ...

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Numbers: ...


@dataclass(frozen=True)
class Packing:
    """How documents become windows of ``max_length`` tokens.

    Without ``crosses`` a window's pieces do not see each other, and the separator is put before each
    document that does not begin with one, so that its first token trains. A window begins with the last token
    of the one before, so no prediction is lost.
    """

    max_length: int
    separator: int
    vocab_size: int
    crosses: bool = False


@dataclass(frozen=True)
class _Group:
    documents: Numbers
    ends: Numbers  # of each document in the group's stream


class CorpusWindows(SampleSequence):
    """The windows of the first ``limit`` documents, in the seed's order."""

    def __init__(self, corpus: Documents, packing: Packing, *, seed: int, limit: int | None = None) -> None:
        self._corpus, self._packing = corpus, packing
        self._num = min(corpus.num_documents, limit or corpus.num_documents)
        if not self._num:
            raise DataError(f"{corpus.prefix}: the corpus has no document")
        self._seed = seed
        self._order = Permutation(self._num, key_of("documents", seed))
        first = corpus.tokens(0, 0, 1)
        has_own = bool(len(first)) and int(first[0]) == packing.separator
        self._num_front = int(not packing.crosses and not has_own)
        self._ends = numpy.cumsum(self._num_windows())
        self._group = lru_cache(maxsize=2)(self._read_group)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the windows."""
        return f"{self._corpus.fingerprint} {self._num} {self._packing}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, epoch: int) -> WindowOrder:
        """In which order an epoch visits the windows: group after group, shuffled within each."""
        return WindowOrder(self._ends, key_of("windows", self._seed, epoch))

    def sample(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(numpy.searchsorted(self._ends, index, side="right"))
        group = self._group(number)
        start = (index - _before(self._ends, number)) * (self._packing.max_length - 1)
        stop = min(start + self._packing.max_length, int(group.ends[-1]))
        pieces = self._pieces(group, start, stop)
        if self._packing.crosses:
            pieces = [numpy.concatenate(pieces)]
        segments = tuple(_segment(piece) for piece in pieces if len(piece) > 1)
        return Sample(segments, where=f"{self._corpus.prefix}:window {index}")

    def _pieces(self, group: _Group, start: int, stop: int) -> list[Numbers]:
        """``start:stop`` of a group's stream, cut where documents end."""
        pieces = []
        place = int(numpy.searchsorted(group.ends, start, side="right"))
        while start < stop:
            begin, end = _before(group.ends, place), int(group.ends[place])
            piece = self._piece(int(group.documents[place]), start - begin, min(stop, end) - begin)
            pieces.append(piece)
            start, place = end, place + 1
        return pieces

    def _piece(self, document: int, start: int, stop: int) -> Numbers:
        front = self._num_front
        tokens = self._corpus.tokens(document, max(0, start - front), stop - front).astype(numpy.int64)
        is_known = (tokens >= 0) & (tokens < self._packing.vocab_size)
        if not is_known.all():
            wrong = int(tokens[~is_known][0])
            raise DataError(
                f"{self._corpus.prefix}: document {document} has token {wrong}; the model has ids below "
                f"{self._packing.vocab_size}",
                hint="was the corpus written with another tokenizer?",
            )
        if start < front:
            return numpy.concatenate([numpy.array([self._packing.separator]), tokens])
        return tokens

    def _read_group(self, number: int) -> _Group:
        start = number * GROUP
        places = numpy.arange(start, min(start + GROUP, self._num), dtype=numpy.uint64)
        documents = self._order(places).astype(numpy.int64)
        return _Group(documents, numpy.cumsum(self._corpus.lengths(documents) + self._num_front))

    def _num_windows(self) -> Numbers:
        """Of each group; of a large corpus from the user's cache, where one process puts them for all."""
        if self._num < KEPT_FROM:
            return self._counted()
        path = cache_folder() / "windows" / f"{key_of(self.fingerprint, self._seed):016x}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                with replacing(path) as file:
                    numpy.save(file, self._counted())
        found: Numbers = numpy.load(path)
        return found

    def _counted(self) -> Numbers:
        """One pass over the lengths in their own order, whatever the permutation."""
        tokens = numpy.zeros(-(-self._num // GROUP), numpy.int64)
        for start in range(0, self._num, PASS_CHUNK):
            documents = numpy.arange(start, min(start + PASS_CHUNK, self._num), dtype=numpy.uint64)
            groups = (self._order.inverse(documents) // numpy.uint64(GROUP)).astype(numpy.int64)
            lengths = self._corpus.lengths(documents.astype(numpy.int64)) + self._num_front
            tokens += numpy.bincount(groups, weights=lengths, minlength=len(tokens)).astype(numpy.int64)
        return numpy.maximum(0, -(-(tokens - 1) // (self._packing.max_length - 1)))


@dataclass(frozen=True)
class WindowOrder:
    """The number of the window at each place of an epoch."""

    ends: Numbers
    key: int

    def __getitem__(self, place: int) -> int:
        number = int(numpy.searchsorted(self.ends, place, side="right"))
        begin = _before(self.ends, number)
        within = Permutation(int(self.ends[number]) - begin, key_of(self.key, number))
        return begin + within[place - begin]


def _before(ends: Numbers, number: int) -> int:
    return int(ends[number - 1]) if number else 0


def _segment(tokens: Numbers) -> Segment:
    return Segment(tuple(tokens.tolist()), (False, *[True] * (len(tokens) - 1)))
