"""Windows of an indexed corpus: what the seed decides, what trains, and what it costs at any size."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy
import pytest

from nemotron4.errors import ConfigError, DataError
from nemotron4.training import corpus as corpus_module
from nemotron4.training import run
from nemotron4.training.corpus import CorpusWindows, Packing
from nemotron4.training.dataset import BLOCK, Dataset, block_counts
from nemotron4.training.indexed import CorpusWriter, IndexedCorpus
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.samples import Segment
from nemotron4.training.shuffling import Permutation
from tests import tiny_models

END = 2


def write_corpus(prefix: Path, documents: list[list[int]]) -> str:
    writer = CorpusWriter(str(prefix), "<i4")
    for document in documents:
        writer.add(numpy.array(document, "<i4").tobytes(), numpy.array([len(document)], "<i4").tobytes())
    writer.finish()
    return str(prefix)


def numbered(num: int, *, seed: int = 0) -> list[list[int]]:
    """Documents of distinct tokens, each with an end."""
    lengths = numpy.random.default_rng(seed).integers(0, 40, num)
    starts = numpy.cumsum([10, *lengths])
    return [[*range(a, b), END] for a, b in pairwise(starts.tolist())]


def windows(prefix: str, *, max_length: int = 16, crosses: bool = False, seed: int = 1) -> CorpusWindows:
    packing = Packing(max_length, END, 10**6, crosses)
    return CorpusWindows(IndexedCorpus(prefix), packing, seed=seed)


def predictions(segments: list[Segment]) -> Counter[tuple[int, int]]:
    return Counter(pair for segment in segments for pair in pairwise(segment.tokens))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_visits_every_place_once_and_is_undone(size: int) -> None:
    order = Permutation(size, key=5)
    places = numpy.arange(size, dtype=numpy.uint64)
    found = order(places)
    assert sorted(found.tolist()) == list(range(size))
    assert order.inverse(found).tolist() == places.tolist()
    if size > 10:
        assert found.tolist() != Permutation(size, key=6)(places).tolist()


def test_a_permutation_has_no_visible_order() -> None:
    found = Permutation(100_000, key=1)(numpy.arange(100_000, dtype=numpy.uint64)).astype(float)
    assert abs(numpy.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert abs(numpy.corrcoef(numpy.arange(100_000), found)[0, 1]) < 0.02


@pytest.mark.parametrize("crosses", [False, True])
def test_every_token_is_predicted_once_whatever_the_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crosses: bool
) -> None:
    monkeypatch.setattr(corpus_module, "GROUP", 16)
    documents = numbered(100)
    found = windows(write_corpus(tmp_path / "c", documents), crosses=crosses)
    samples = [found[i] for i in range(len(found))]
    assert max(sample.num_tokens for sample in samples) <= 16
    assert all(segment.num_trained == len(segment.tokens) - 1 for s in samples for segment in s.segments)
    made = predictions([segment for sample in samples for segment in sample.segments])
    within = Counter(pair for document in documents for pair in pairwise([END, *document]))
    if crosses:
        assert all(len(sample.segments) == 1 for sample in samples)
        inside = Counter(pair for document in documents for pair in pairwise(document))
        assert inside <= made
        assert sum(made.values()) == sum(map(len, documents)) - len(found._ends)
    else:
        assert made == within


def test_the_seed_alone_decides_the_order_of_documents(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", numbered(60))
    first, again, other = (windows(prefix, seed=seed) for seed in (1, 1, 2))
    assert first[:] == again[:]
    assert first[:] != other[:]


def test_an_epoch_visits_each_window_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    found = windows(write_corpus(tmp_path / "c", numbered(60)))
    orders = [[found.order(epoch)[place] for place in range(len(found))] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(len(found)))] * 2
    assert orders[0] != orders[1]


def test_documents_that_begin_with_the_separator_get_no_second_one(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[END, 10, 11, END], [END, 12, END]])
    found = windows(prefix, max_length=64)
    assert sorted(segment.tokens for segment in found[0].segments) == [(END, 10, 11, END), (END, 12, END)]


def test_a_token_of_another_vocabulary_is_named(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[5, 900, END]])
    found = CorpusWindows(IndexedCorpus(prefix), Packing(16, END, 512), seed=0)
    with pytest.raises(DataError, match="document 0 has token 900"):
        found[0]


class Imagined:
    """A corpus that is computed: ``num_documents`` of 500 to 1,523 tokens."""

    prefix = "imagined"
    fingerprint = "imagined"

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents

    def lengths(self, documents: numpy.ndarray) -> numpy.ndarray:
        return 500 + (documents * 2_654_435_761 >> 7) % 1024

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        length = int(self.lengths(numpy.array([document]))[0])
        return numpy.full(min(length, length if stop is None else stop) - start, 7)


def test_memory_does_not_grow_with_the_corpus() -> None:
    peaks = []
    for num in (600_000, 2_400_000):
        tracemalloc.start()
        found = CorpusWindows(Imagined(num), Packing(4096, END, 100), seed=0)
        for place in range(0, len(found), len(found) // 3):
            found[found.order(0)[place]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]


# ---- mixtures


def test_each_block_of_a_mixture_has_its_shares() -> None:
    assert block_counts((0.7, 0.15, 0.15)) == (45_875, 9_831, 9_830)
    assert block_counts((1.0, 0.0, 1e-9)) == (65_535, 0, 1)
    assert sum(block_counts((0.1, 0.2, 0.3, 0.4, 1 / 3))) == BLOCK


def test_a_position_far_away_is_found_without_those_before_it() -> None:
    def at(position: int) -> tuple[int, int]:
        data = Dataset(range(300), 3, (100, 200), (3.0, 1.0))  # type: ignore[arg-type]
        return data._drawn(position)

    far = 2_000_000_000 - 2_000_000_000 % BLOCK
    drawn = [at(far), at(far + 1), at(far + 2)]
    assert drawn == [at(far + i) for i in range(3)]
    assert all(visit >= far // BLOCK * block_counts((3.0, 1.0))[source] for source, visit in drawn)


# ---- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("start"))


def recipe(folder: Path, start: Path, name: str, **more: object) -> Recipe:
    rng = numpy.random.default_rng(0)
    for part in ("a", "b"):
        if not (folder / f"{part}.idx").exists():
            write_corpus(folder / part, [[*rng.integers(20, 400, 30).tolist(), 3] for _ in range(40)])
    sources = [{"path": str(folder / part), "weight": weight} for part, weight in (("a", 3.0), ("b", 1.0))]
    values: dict = {
        "stage": "pretrain",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": sources, "max_length": 32},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 64},
        "run": {"directory": str(folder / name), "max_steps": 4, "save_every": 1},
    }
    for key, value in more.items():
        values[key] = values.get(key, {}) | value  # type: ignore[operator]
    return build(values)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_blend_of_corpora_trains_and_resumes_on_the_same_curve(tmp_path: Path, start: Path) -> None:
    whole = recipe(tmp_path, start, "whole")
    run.train(whole)
    run.train(recipe(tmp_path, start, "parts", run={"max_steps": 2}))
    # Another cut into rows changes rounding alone.
    parts = recipe(tmp_path, start, "parts", batch={"row_tokens": 128})
    run.train(parts)
    assert losses(parts.run.directory) == pytest.approx(losses(whole.run.directory), rel=1e-5)


def test_crossing_documents_is_a_setting_of_text_and_corpora(tmp_path: Path, start: Path) -> None:
    crossing = recipe(tmp_path, start, "crossing", data={"cross_documents": True})
    run.train(crossing)
    run.train(recipe(tmp_path, start, "apart"))
    assert losses(crossing.run.directory) != losses(tmp_path / "apart")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "sft"}, "does not read"),
        ({"weight": None}, "give each a weight"),
        ({"ignore": ["id"]}, "no ignore"),
    ],
)
def test_what_a_corpus_cannot_do_is_refused(tmp_path: Path, start: Path, change: dict, said: str) -> None:
    found = recipe(tmp_path, start, "run")
    sources = [{"path": str(tmp_path / part), "weight": 1.0} | change for part in ("a", "b")]
    for source in sources:
        source.pop("stage", None)
        if source["weight"] is None:
            del source["weight"]
    values = {
        "stage": change.get("stage", "pretrain"),
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": sources, "max_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "run": {"directory": str(found.run.directory), "max_steps": 1},
    }
    with pytest.raises(ConfigError, match=said):
        run.train(build(values))
