"""Megatron's indexed format, read and written; the files in golden/indexed are Megatron-core's."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest

from nemotron4.errors import DataError
from nemotron4.training.indexed import CorpusWriter, IndexedCorpus, is_corpus, token_type

GOLDEN = Path(__file__).parents[1] / "golden" / "indexed"
PLAIN = [[5, 6, 7, 0], [8, 0], [*range(10, 40), 0], [511, 300, 0]]
SENTENCES = [[5, 6, 7, 0], [8, 0], [1, 2, 3, 4, 9, 9, 0]]


@pytest.mark.parametrize(("name", "documents"), [("plain", PLAIN), ("sentences", SENTENCES)])
def test_megatrons_own_files_read(name: str, documents: list[list[int]]) -> None:
    corpus = IndexedCorpus(str(GOLDEN / name))
    assert corpus.num_documents == len(documents)
    assert [corpus.tokens(i).tolist() for i in range(len(documents))] == documents
    assert corpus.lengths(numpy.arange(len(documents))).tolist() == [len(each) for each in documents]
    assert corpus.tokens(2, 1, 3).tolist() == documents[2][1:3]
    assert corpus.num_tokens == sum(map(len, documents))


def test_what_is_written_is_byte_for_byte_what_megatron_writes(tmp_path: Path) -> None:
    writer = CorpusWriter(str(tmp_path / "ours"), "<i4")
    for document in PLAIN:
        writer.add(numpy.array(document, "<i4").tobytes(), numpy.array([len(document)], "<i4").tobytes())
    writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (GOLDEN / f"plain{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.bin", "ours.idx"]


def test_a_prefix_and_both_of_its_files_name_a_corpus() -> None:
    for suffix in ("", ".bin", ".idx"):
        assert is_corpus(f"{GOLDEN / 'plain'}{suffix}")
    assert not is_corpus(str(GOLDEN / "README.md"))


def test_small_vocabularies_take_two_bytes_a_token() -> None:
    assert (token_type(50_000), token_type(256_000)) == ("<u2", "<i4")


def broken(folder: Path, change: str) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"plain{suffix}", folder / f"c{suffix}")
    index, data = folder / "c.idx", folder / "c.bin"
    content = index.read_bytes()
    match change:
        case "no data":
            data.unlink()
        case "short data":
            data.write_bytes(data.read_bytes()[:-4])
        case "short index":
            index.write_bytes(content[:-8])
        case "no index":
            index.write_bytes(b"PK" + content[2:])
        case "version":
            index.write_bytes(content[:9] + b"\x02" + content[10:])
        case "floats":
            index.write_bytes(content[:17] + b"\x07" + content[18:])
        case "modes":
            index.write_bytes(content + bytes(4))
    return str(folder / "c")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no data", "no such file"), ("short data", "cut short"), ("short index", "cut short"),
        ("no index", "not an index"), ("version", "version 2"), ("floats", "type 7"), ("modes", "modes"),
    ],
)  # fmt: skip
def test_a_broken_corpus_is_named(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        IndexedCorpus(broken(tmp_path, change))
