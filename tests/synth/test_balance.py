"""Rows kept so that no task and no length outweighs the others, and keywords from code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemotron4.errors import ConfigError
from nemotron4.synth.stages import KINDS
from tests.synth.conftest import Bench, make_recipe


def rows_from(path: Path, tasks: dict[str, int]) -> dict[str, Any]:
    rows = [{"task": task, "n": i} for task, number in tasks.items() for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"name": "in", "kind": "row_file", "knobs": {"file": str(path)}}


@pytest.mark.parametrize(
    ("weights", "n", "kept"),
    [
        ({"math": 2, "code": 1}, 0, {"math": 8, "code": 4}),
        ({"math": 1, "code": 1}, 0, {"math": 8, "code": 8}),
        ({"math": 1, "code": 1}, 6, {"math": 3, "code": 3}),
        ({"math": 1}, 0, {"math": 8}),
    ],
)
def test_tasks_are_blended_by_weights(
    bench: Bench, tmp_path: Path, weights: dict[str, float], n: int, kept: dict[str, int]
) -> None:
    source = rows_from(tmp_path / "r.jsonl", {"math": 8, "code": 20, "other": 5})
    blend = {"name": "out", "kind": "blend", "takes": ["in"], "knobs": {"weights": weights, "n": n}}
    bench.run(make_recipe([source, blend]))
    assert Counter(row["columns"]["task"] for row in bench.rows("out").values()) == kept


def test_a_blend_without_rows_of_a_task_says_which(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", {"math": 3})
    knobs = {"weights": {"math": 1.0, "maths": 1.0}}
    recipe = make_recipe([source, {"name": "out", "kind": "blend", "takes": ["in"], "knobs": knobs}])
    bench.run(recipe)
    assert bench.accounting(recipe).stage("out").filtered == {"blend: no row of the task 'maths'": 3}


def test_pairs_are_balanced_by_length(bench: Bench, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(60)), encoding="utf-8"
    )
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(prompts), "task": "t"}},
        {"name": "answer", "kind": "respond", "takes": ["in"]},
        {"name": "judge", "kind": "judge_reward", "takes": ["answer"]},
        {"name": "out", "kind": "length_balance", "takes": ["judge"], "knobs": {"max_longer": 0.25}},
    ]
    bench.run(make_recipe(stages))
    pairs = bench.rows("out").values()
    longer = sum(len(row["chosen"]["text"]) > len(row["rejected"]["text"]) for row in pairs)
    assert 0 < longer <= 0.25 * len(pairs)
    dropped = bench.accounting(make_recipe(stages)).stage("out").filtered["length balance"]
    assert dropped + len(pairs) == len(bench.rows("judge"))


def test_keywords_come_from_code(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.py").write_text(
            "import json\nfrom os import path\njson.dumps(path.join(1))\n", encoding="utf-8"
        )
    (folder / "c.py").write_text("import json, re\n", encoding="utf-8")
    (folder / "d.py").write_text("print 'old'\n", encoding="utf-8")
    bench.run(
        make_recipe([{"name": "out", "kind": "code_keywords", "knobs": {"folder": str(folder), "n": 4}}])
    )
    assert {row["topic"] for row in bench.rows("out").values()} == {"json", "dumps", "join", "os.path"}
    with pytest.raises(ConfigError, match="no such folder"):
        next(iter(KINDS["code_keywords"].roots(KINDS["code_keywords"].knobs(folder=tmp_path / "none"))))  # type: ignore[misc]
