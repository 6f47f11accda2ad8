"""``nemotron4 doctor data``: every kind of problem, found at its line, on a tiny real tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.training import stage
from nemotron4.training.doctor import examine as examine_sources
from nemotron4.training.doctor import histogram
from nemotron4.training.preview import marked
from nemotron4.training.reading import TrainingSource
from tests import tiny_models

PROMPT = [{"role": "user", "content": "Shall I compare thee?"}]


def examine(paths: list[Path], kind: str, model: str, **more):
    return examine_sources(
        [TrainingSource(path=str(path)) for path in paths], stage.kinds()[kind], model, **more
    )


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.nemotron_directory(tmp_path_factory.mktemp("model")))


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def topics(path: Path, kind, model: str) -> dict[int, str]:
    """Line -> topic of its finding, or "bad"."""
    found = examine([path], kind, model, max_length=100)
    lines = {int(f.where.rpartition(":")[2]): f.topic for f in found.findings}
    return lines | {int(p.where.rpartition(":")[2]): "bad" for p in found.problems}


def test_sft_problems_are_found_at_their_lines(tmp_path: Path, model: str) -> None:
    path = write(
        tmp_path / "sft.jsonl",
        [
            {"messages": [*PROMPT, answer("Thou art more lovely.")]},
            "{not json",
            {"messages": PROMPT},
            {"messages": [answer("first turns never train")]},
            {"messages": [*PROMPT, answer("long " * 200)]},
            {"messages": [*PROMPT, answer("Thou art more lovely.")]},
            {"input": "Rough wi", "output": "nds do shake"},
        ],
    )
    assert topics(path, "sft", model) == {
        2: "bad", 3: "bad", 4: "bad", 5: "bad", 6: "duplicates", 7: "merging_boundary"
    }  # fmt: skip


def test_preference_problems_are_found_at_their_lines(tmp_path: Path, model: str) -> None:
    def pair(chosen: str, rejected: str, *rewards: float) -> dict:
        names = ("chosen_reward", "rejected_reward")
        return {
            "prompt": PROMPT,
            "chosen": chosen,
            "rejected": rejected,
            **dict(zip(names, rewards, strict=False)),
        }

    path = write(
        tmp_path / "pairs.jsonl",
        [
            pair("yes", "no", 2, 1),
            pair("yes", "no", 1, 2),
            pair("same", "same", 2, 1),
            pair("yes", "no"),
            pair("yes", "no", 1, 1),
        ],
    )
    assert topics(path, "preference", model) == {
        2: "inverted_rewards", 3: "bad", 4: "without_rewards", 5: "equal_rewards"
    }  # fmt: skip


def test_a_plain_answer_is_trained_with_the_end_of_text(tmp_path: Path, model: str) -> None:
    row = {"input": "Rough winds", "output": " do shake"}
    found = examine([write(tmp_path / "a.jsonl", [row])], "sft", model)
    assert "never_stops" not in found.summary
    segment = found.samples[0].segments[0]
    assert segment.tokens[-1] in found.encoder.stop_ids()
    assert segment.is_trained[-1]


def test_a_marker_in_the_text_looks_different_from_a_real_one(tmp_path: Path, model: str) -> None:
    spelled = "<extra_id_1>"
    rows = [{"messages": [{"role": "user", "content": f"What is {spelled}?"}, answer("A marker.")]}]
    found = examine([write(tmp_path / "a.jsonl", rows)], "sft", model)
    (segment,) = found.samples[0].segments
    text = marked(segment, found.encoder.tokenizer)
    assert f"What is \\{spelled}?" in text
    assert text.count(f"\\{spelled}") == 1
    assert text.count(spelled) > 1, "the turns begin with real ones"


def test_the_command_reports_writes_the_clean_rows_and_fails(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"messages": [*PROMPT, answer("Thou art.")], "id": "kept as it is"}
    path = write(tmp_path / "sft.jsonl", [good, {"x": 1}, good])
    clean = tmp_path / "clean.jsonl"
    command = ["doctor", "data", str(path), "--kind", "sft", "--model", model]
    assert main([*command, "--write-clean", str(clean)]) == 1
    shown = capsys.readouterr()
    assert f"{path}:2: the row has fields x" in shown.out
    assert "[[Thou art." in shown.out
    assert "1 of 3 rows cannot be used" in shown.err
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [good]
    assert main([*command, "--max-bad-rows", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert (summary["rows"], summary["usable"], summary["bad"], summary["duplicates"]) == (3, 2, 1, 1)


def test_an_unknown_kind_names_the_known_ones(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", [])
    assert main(["doctor", "data", str(path), "--kind", "preferences", "--model", model]) == 1
    assert "did you mean 'preference'?" in capsys.readouterr().err


def test_a_wrong_argument_or_file_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", [])
    commands = [
        ["data", str(tmp_path / "no.jsonl"), "--kind", "sft", "--model", str(tmp_path)],
        ["data", str(rows), "--kind", "stf", "--model", str(tmp_path)],
        ["data", str(rows), "--kind", "sft", "--model", "no model"],
        ["data", str(rows), "--kind", "sft", "--model", str(tmp_path), "--benchmark", str(tmp_path / "no")],
        ["checkpoint", str(tmp_path / "no")],
        ["checkpoint", str(tmp_path), "--gpu", "h101"],
    ]
    program = (
        "import json, sys; from nemotron4.cli.main import main\n"
        "print([main(['doctor', *c]) for c in json.loads(sys.argv[1])], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{[1] * len(commands)} False"
    assert done.stderr.count("error: ") == len(commands)


def test_a_histogram_has_round_spans_that_hold_every_value() -> None:
    bars = histogram("tokens", [81.0, *(float(7 * i) for i in range(12, 120)), 989.0]).bars
    assert [bar.name for bar in bars[:2]] == ["0 to 100", "100 to 200"]
    assert sum(bar.value or 0 for bar in bars) == 110
    bars = histogram("reward", [i / 8 - 1 for i in range(20)]).bars
    assert bars[0].name == "-1 to -0.8"
    assert sum(bar.value or 0 for bar in bars) == 20
