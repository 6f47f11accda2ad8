"""Two and four gloo processes against one: losses, gradient norms and final weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(
    folder: Path, case: str, *, data: int = 1, tensor: int = 1, pipeline: int = 1, steps: int = 6,
    adapter: str = "none", fresh: bool = True,
) -> tuple[list[dict[str, float]], dict[str, list[float]]]:  # fmt: skip
    """Train under a layout; every recorded step, and the final weights."""
    assert fresh or folder.exists()
    out = folder.with_suffix(f".{data}{tensor}{pipeline}.json")
    size = data * tensor * pipeline
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    )
    arguments = [str(out), case, str(data), str(tensor), str(pipeline), str(steps), str(folder), adapter]
    program = ["-m", "tests.training.parallel_run"]
    process = subprocess.run(
        [sys.executable, *launcher, *program, *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=110,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "validation" for line in lines)
    return lines, json.loads(out.read_text())


def assert_same_run(one: tuple, many: tuple) -> None:
    (lines_one, weights_one), (lines_many, weights_many) = one, many
    assert len(lines_one) == len(lines_many) > 0
    for a, b in zip(lines_one, lines_many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6, abs=1e-6)
        if a["kind"] == "train":
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5, abs=1e-6)
            assert b["tokens"] == a["tokens"]
    assert weights_one.keys() == weights_many.keys()
    for name, values in weights_one.items():
        assert weights_many[name] == pytest.approx(values, rel=1e-5, abs=5e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("case", ["sft", "reward", "dpo", "rpo"])
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2)])
def test_every_layout_trains_as_one_process(
    tmp_path: Path, case: str, adapter: str, data: int, tensor: int
) -> None:
    one = run(tmp_path / "one", case, adapter=adapter)
    many = run(tmp_path / "many", case, adapter=adapter, data=data, tensor=tensor)
    assert_same_run(one, many)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (1, 2)), ((1, 2), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (2, 1))],
    ids=lambda layout: f"data {layout[0]} tensor {layout[1]}",
)
def test_a_checkpoint_resumes_under_another_layout(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    one = run(tmp_path / "one", "rpo")
    run(tmp_path / "many", "rpo", data=before[0], tensor=before[1], steps=3)
    many = run(tmp_path / "many", "rpo", data=after[0], tensor=after[1])
    assert_same_run(one, many)
