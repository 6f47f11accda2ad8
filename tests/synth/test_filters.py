"""Reasons to drop a text, near-duplicates against the slow comparison of all pairs, contamination."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.cli.main import main
from nemotron4.errors import ConfigError
from nemotron4.synth.duplicates import SHINGLE_BYTES, find_near_duplicates
from nemotron4.synth.filters import (
    BenchmarkIndex,
    find_similar,
    load_benchmarks,
    repetition,
    rouge_l,
)
from nemotron4.synth.parsing import normalise
from tests.synth.conftest import Bench, make_recipe


def test_text_in_circles_is_seen_and_prose_passes() -> None:
    assert repetition("I like tea and I like bread. " * 12) is not None
    assert (
        repetition("\n".join(["the same line again"] * 4 + ["another one"] * 3 + ["x y z"] * 4)) is not None
    )
    prose = (
        "Bridges carry roads over rivers. Early builders used timber, as forests stood nearby, while Roman "
        "engineers preferred stone arches that lasted for centuries. Steel later allowed much longer spans."
    )
    assert repetition(prose) is None
    assert repetition("Short.") is None


def slow_lcs(first: list[str], second: list[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        same = first[i] == second[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rouge_l_equals_the_table_of_the_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    common = slow_lcs(a, b)
    expected = 0.0 if not common else 2 * common / (len(a) + len(b))
    assert rouge_l(a, b) == pytest.approx(expected)


def test_diversity_drops_the_later_of_two_similar_texts() -> None:
    texts = ["write a poem about the sea", "bake some bread", "write a poem about the old sea"]
    assert list(find_similar(texts, 0.7)) == [2]
    assert find_similar(texts, 0.99) == {}


def word_salad(draw: random.Random, number: int) -> list[str]:
    words = [
        f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "ra") for b in ("ren", "sto", "vik", "dal", "pum", "gi")
    ]
    texts = [" ".join(draw.choices(words, k=draw.randint(8, 20))) for _ in range(number)]
    for i in range(0, number, 3):  # every third text gets a nearly equal twin
        copy = texts[i].split()
        copy[draw.randrange(len(copy))] = draw.choice(words)
        texts.append(" ".join(copy))
    return texts


def jaccard(first: str, second: str) -> float:
    a, b = (
        {text[i : i + SHINGLE_BYTES] for i in range(max(1, len(text) - SHINGLE_BYTES + 1))}
        for text in (normalise(first), normalise(second))
    )
    return len(a & b) / len(a | b)


def test_near_duplicates_agree_with_the_comparison_of_all_pairs() -> None:
    texts = word_salad(random.Random(5), 150)
    found = find_near_duplicates(texts, 0.75)
    slow: dict[int, int] = {}
    for later in range(len(texts)):
        for earlier in range(later):
            if earlier not in slow and jaccard(texts[later], texts[earlier]) >= 0.75:
                slow[later] = earlier
                break
    assert slow
    assert set(found) <= set(slow)  # nothing is dropped that is not similar to a kept one
    assert len(set(slow) - set(found)) <= 0.02 * len(slow)


def test_equal_and_short_texts_are_found() -> None:
    assert find_near_duplicates(["Tea", "tea!", "Bread", "x", "", "tea"], 0.75) == {1: 0, 5: 0}
    assert find_near_duplicates(["茶的历史和文化", "茶的历史和文化。"], 0.75) == {1: 0}


def test_a_large_bucket_of_copies_keeps_one() -> None:
    assert len(find_near_duplicates(["the very same question"] * 50 + ["another text"], 0.75)) == 49


LONG_ITEM = (
    "A baker mixes seven bowls of brown flour with half as many bowls of white flour so how many loaves of "
    "bread will she have on the table by noon today"
)


def index(*items: str) -> BenchmarkIndex:
    made = BenchmarkIndex()
    for i, item in enumerate(items):
        made.add(f"item{i}", item)
    return made


def test_thirteen_shared_words_are_a_hit_that_names_the_item() -> None:
    shared = " ".join(LONG_ITEM.split()[3:16])
    assert index("Some other text of a certain length that is never met here", LONG_ITEM).find(
        f"Before it, {shared.upper()}! And after."
    ) == ("item1", "13 words in a row")


def test_ten_shared_words_count_only_with_half_of_the_item() -> None:
    words = LONG_ITEM.split()
    ten = " ".join(words[:11])
    assert index(LONG_ITEM).find(f"{ten} zzz") is None
    spread = " ".join([*words[:11], "zzz", *words[12:22]])
    found = index(LONG_ITEM).find(spread)
    assert found is not None
    assert "of the item" in found[1]


def test_short_items_must_be_the_whole_text() -> None:
    short = index("What is the capital of France?")
    assert short.find("what is the capital of france") == ("item0", "the whole item")
    assert (
        short.find("Tell me: what is the capital of France, and why do so many people travel there?") is None
    )
    assert short.find("What is the capital of Spain?") is None


def test_benchmark_files_are_read_and_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl.gz"
    rows = [{"turns": ["Compose a long letter to a friend about the travels you made last summer in Italy"]}]
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    found = load_benchmarks([path]).find(rows[0]["turns"][0])
    assert found is not None
    assert found[0] == "bench.jsonl.gz:1"
    with pytest.raises(ConfigError, match="there is no such file"):
        load_benchmarks([tmp_path / "missing.jsonl"])


TABLE: list[tuple[str, dict[str, object], list[str]]] = [
    ("quality", {}, ["什么是光合作用？", "光合成とは何ですか。", "การสังเคราะห์ด้วยแสงคืออะไร"]),
    ("quality", {"language": "en", "min_words": 1}, ["Convert 10 km to miles", "Hi"]),
    ("near_dedup", {}, ["What is 12+25?", "What is 12+26?"]),
    ("exact_dedup", {}, ["What is 2*3?", "What is 23?"]),
]


@pytest.mark.parametrize(("kind", "knobs", "texts"), TABLE)
def test_good_prompts_are_kept(
    kind: str, knobs: dict[str, object], texts: list[str], bench: Bench, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(file), "task": "t"}},
        {"name": "out", "kind": kind, "takes": ["in"], "knobs": knobs},
    ]
    bench.run(make_recipe(stages))
    assert len(bench.rows("out")) == len(texts)


def test_a_filter_says_what_it_dropped_by_language(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    texts = ["Hi", "Привет", "Tell me of tea, please."]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(file), "task": "t"}},
        {"name": "out", "kind": "quality", "takes": ["in"]},
    ]
    bench.run(make_recipe(stages, export={"prompts": ["out"]}))
    assert main(["synth", "status", str(bench.folder), "--dropped", "1", "--json"]) == 0
    [rule] = json.loads(capsys.readouterr().out)["dropped"]
    assert (rule["stage"], rule["rule"], rule["rows"]) == ("out", "too short", 2)
    assert rule["languages"] == {"Latin, short": 1, "Cyrillic, short": 1}
    assert rule["examples"]["Latin, short"] == [["Hi", "1 words; at least 3 are asked"]]
    assert main(["synth", "export", str(bench.folder)]) == 0
    assert "Привет" in (bench.folder / "export" / "README.md").read_text(encoding="utf-8")
