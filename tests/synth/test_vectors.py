"""Rows alike in meaning, by the vectors of any /v1/embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron4.errors import ConfigError, DataError
from nemotron4.synth.duplicates import cluster, find_alike, unpack_vectors
from nemotron4.synth.execute import run_recipe
from tests.synth.conftest import Bench, ServerThread, make_recipe

TEXTS = [
    "The tide follows the moon",
    "the moon follows the tide",
    "Bread needs flour",
    "What is 1 + 2?",
    "What is 2 + 1?",
]


def stages(path: Path, *more: dict[str, Any]) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return [{"name": "in", "kind": "prompt_file", "knobs": {"file": str(path), "task": "t"}}, *more]


EMBED = {"name": "embed", "kind": "embed", "takes": ["in"]}
GOOD = {"name": "good", "kind": "quality", "takes": ["embed"]}
DEDUP = {"name": "out", "kind": "embed_dedup", "takes": ["good"]}


def test_rows_alike_are_dropped_and_calls_counted(bench: Bench, tmp_path: Path) -> None:
    with ServerThread() as server:
        recipe = make_recipe(
            stages(tmp_path / "p.jsonl", EMBED, GOOD, DEDUP), endpoint={"gen": {"url": server.url}}
        )
        assert run_recipe(recipe, bench.folder).calls == 5
        assert server.calls["/v1/embeddings"] == 5
        kept = [row["messages"][0][1].lower() for row in bench.rows("out").values()]
        assert len(kept) == 4
        assert {"what is 1 + 2?", "what is 2 + 1?", "bread needs flour"} < set(kept)
        assert run_recipe(recipe, bench.folder).calls == 0
    accounting = bench.accounting(recipe)
    assert accounting.stage("out").filtered == {"alike": 1}
    assert accounting.total("prompt_tokens") == sum(len(text.split()) for text in TEXTS)


def test_clusters_are_capped(bench: Bench, tmp_path: Path) -> None:
    cap = {"name": "out", "kind": "cluster_sample", "takes": ["embed"], "knobs": {"clusters": 1, "n": 2}}
    bench.run(make_recipe(stages(tmp_path / "p.jsonl", EMBED, cap)))
    assert len(bench.rows("out")) == 2


def test_vectors_must_come_from_above(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares vectors, which no stage above it makes"):
        bench.run(make_recipe(stages(tmp_path / "p.jsonl", DEDUP | {"takes": ["in"]})))


def test_every_pair_is_looked_at() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(3000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = find_alike(vectors, 0.9)
    kept: list[int] = []
    for i in range(len(vectors)):
        scores = vectors[kept] @ vectors[i] if kept else np.zeros(0)
        is_alike = bool(len(scores)) and scores.max() >= 0.9
        assert is_alike == (i in found)
        if not is_alike:
            kept.append(i)


def test_clusters_hold_what_belongs_together() -> None:
    draw = np.random.default_rng(1)
    centres = np.eye(3, 16, dtype=np.float32)
    vectors = np.concatenate([centre + 0.05 * draw.normal(size=(50, 16)) for centre in centres])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels, likeness = cluster(vectors, 3, seed=5)
    assert all(len(set(labels[i : i + 50])) == 1 for i in (0, 50, 100))
    assert likeness.min() > 0.8


def test_vectors_of_two_models_are_refused() -> None:
    with pytest.raises(DataError, match="vectors of 2 lengths"):
        unpack_vectors([b"\0" * 8, b"\0" * 12])
