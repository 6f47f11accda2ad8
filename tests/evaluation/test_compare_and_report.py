"""Two results side by side, and the report of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.errors import DataError
from nemotron4.evaluation import report
from nemotron4.evaluation.compare import versus_blocks
from nemotron4.evaluation.result import Result, load_result
from nemotron4.evaluation.task import Metric
from nemotron4.report import Table

Scored = Callable[..., Path]


@pytest.fixture
def scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scored:
    """Score GSM8K answers (right for the numbers given) into a folder."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": "q", "answer": f"#### {n}"}) + "\n" for n in range(20)))

    def run(name: str, right: set[int], *, seed: int = 0, model: str = "m<1>") -> Path:
        responses = tmp_path / f"{name}.jsonl"
        rows = [{"id": n, "response": f"#### {n if n in right else -1}"} for n in range(20)]
        responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / name / "gsm8k"
        command = ["eval", "score", "gsm8k", "--responses", str(responses), "--data", str(data)]
        assert main([*command, "--out", str(out), "--seed", str(seed), "--model", model]) == 0
        capsys.readouterr()
        return out

    return run


def test_compare_names_the_items_that_flipped(scored: Scored, capsys: Any) -> None:
    first, second = scored("first", set(range(10))), scored("second", set(range(2, 20)))
    assert main(["eval", "compare", str(first), str(second), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["comparable"]
    assert comparison["lost"]["strict"] == ["0", "1"]
    assert len(comparison["won"]["strict"]) == 10
    assert comparison["tests"]["strict"]["difference"] == pytest.approx(0.4)
    assert comparison["tests"]["strict"]["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert main(["eval", "compare", str(first), str(first)]) == 0
    assert "no difference beyond chance" in capsys.readouterr().out


def test_compare_refuses_other_definitions(scored: Scored, capsys: Any) -> None:
    first, second = scored("first", {1}), scored("second", {1}, seed=3)
    assert main(["eval", "compare", str(first), str(second), "--json"]) == 1
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["differences"] == {"seed": [0, 3]}
    assert comparison["tests"] == {}


def test_a_saved_result_is_read_back_as_it_was(scored: Scored) -> None:
    folder = scored("first", {1, 2})
    result = load_result(folder)
    assert result.metrics["strict"].value == 10
    assert result.to_json() == json.loads((folder / "result.json").read_text())
    assert result.items["1"] == {"strict": 1, "flexible": 1, "value": 1}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


@pytest.mark.filterwarnings("default")
def test_the_report_shows_ours_beside_the_published_values(
    scored: Scored, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    folder = scored("first", set(range(9)))
    out = tmp_path / "report"
    assert main(["eval", "report", str(folder.parent), "--out", str(out)]) == 0
    written = capsys.readouterr().out.split()
    assert {Path(path).name for path in written} == {"report.md", "report.html", "benchmarks.png"}
    text = (out / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| GSM8K 0-shot"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("45.00 [")
    assert cells[1].endswith("*")  # not the standard data file
    assert cells[2] == "92.3"
    assert "9/20" in text
    page = _Text()
    page.feed((out / "report.html").read_text())
    assert "m<1> (ours)" in page.seen  # names from results are escaped
    assert (out / "benchmarks.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_names_the_results_inside_a_run(scored: Scored, capsys: Any) -> None:
    folders = [scored("first", {1}).parent, scored("second", {1, 2}).parent]
    assert main(["eval", "compare", str(folders[0]), str(folders[1])]) == 1
    assert f"it holds {folders[0] / 'gsm8k'}" in capsys.readouterr().err


def test_two_results_of_one_model_are_two_columns(scored: Scored, tmp_path: Path) -> None:
    first, second = scored("first", {1}), scored("second", {1, 2})
    found = report.find_results([first, second.parent, first])  # one of them named twice
    assert [one.model for one in found] == ["m<1> (first)", "m<1> (second)"]
    (tmp_path / "old").mkdir()
    elsewhere = first.parent.rename(tmp_path / "old" / "second") / "gsm8k"
    paths = [str(elsewhere), str(second)]
    assert [one.place for one in report.find_results([elsewhere, second])] == paths
    table = next(
        block
        for block in report.report_blocks(report.find_results([elsewhere, second]), [])
        if isinstance(block, Table) and "(ours)" in "".join(block.columns)
    )
    assert table.columns[1:3] == [f"m<1> ({path}) (ours)" for path in paths]
    assert [row[1:3] for row in table.rows if any(row[1:3])] == [["5.00 [0.9, 23.6]*", "10.00 [2.8, 30.1]*"]]


def test_the_report_refuses_a_run_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result"):
        report.find_results([tmp_path])
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/run.json").write_text("{}")
    with pytest.raises(DataError, match="has no result yet"):
        report.find_results([tmp_path])


def test_a_result_of_another_judge_is_not_put_in_the_published_row(scored: Scored) -> None:
    from dataclasses import replace

    result = replace(load_result(scored("first", {1})), name="gsm8k (judge other)")
    found = [report.Found(Path("x"), result)]
    assert report.value_of(found, "m<1>", "gsm8k", "strict") is None


def test_the_report_says_whether_the_second_is_better_with_the_flips_inside_the_page(
    scored: Scored, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    first = scored("first", set(range(4)), model="A")
    second = scored("second", set(range(2, 20)), model="B")
    for folder, name in ((first, "first"), (second, "second")):  # answers as a run keeps them
        (folder / "responses.jsonl").write_bytes((tmp_path / f"{name}.jsonl").read_bytes())
    out = tmp_path / "report"
    assert main(["eval", "report", str(first.parent), str(second.parent), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "gsm8k, strict: B is better than A (p 0.00131, 20 items)." in text
    assert "B won 16; the first 10:" in text
    assert "B lost 2:" in text
    page = (out / "report.html").read_text()
    assert page.count("<details>") == 12
    assert "<b>A, A</b></p><pre>#### 0</pre>" in page
    assert "<b>B, B</b></p><pre>#### -1</pre>" in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="benchmarks.png' not in page  # one file that opens anywhere


def test_results_of_other_definitions_are_listed_as_not_comparable(
    scored: Scored, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    first, second = scored("first", {1}, model="A"), scored("second", {1}, seed=3, model="B")
    out = tmp_path / "report"
    assert main(["eval", "report", str(first.parent), str(second.parent), "--out", str(out)]) == 0
    assert "not comparable: seed" in (out / "report.md").read_text()


def test_one_unscored_item_leaves_the_others_compared_and_is_named(
    scored: Scored, tmp_path: Path, capsys: Any
) -> None:
    first, second = scored("first", {1, 2}), scored("second", {1})
    rows = [json.loads(line) for line in (second / "items.jsonl").read_text().splitlines()]
    (second / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert main(["eval", "compare", str(first), str(second), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["tests"]["strict"]["num_items"] == 19
    assert comparison["left_out"]["strict"] == ["19"]
    assert main(["eval", "compare", str(first), str(second)]) == 0
    assert "left out, scored by one only 1: 19" in capsys.readouterr().out


def test_shares_of_items_are_compared_in_the_percent_of_their_metric(tmp_path: Path) -> None:
    """IFEval's instructions, and means over epochs: neither 0 nor 1, and still percent."""

    def result(name: str, *shares: float) -> tuple[Path, Result]:
        items = {str(n): {"instruction_strict": share} for n, share in enumerate(shares)}
        metric = Metric(100 * sum(shares) / len(shares))
        more: dict[str, Any] = {
            "data_sha256": "",
            "prompt_sha256": "",
            "grader_sha256": "",
            "seed": 0,
            "unparsed": 0,
        }
        made = Result(
            task="ifeval",
            name="ifeval",
            metrics={"instruction_strict": metric},
            num_items=len(shares),
            unscored={},
            data_is_standard=True,
            model=name,
            items=items,
            **more,
        )
        return tmp_path / name, made

    blocks = versus_blocks([result("a", 0.5, 0.25, 1.0), result("b", 0.75, 0.5, 1.0)])
    (row,) = next(block for block in blocks if isinstance(block, Table)).rows
    assert row[2:4] == ["a: 58.33", "b: 75.00"]
    assert row[4].startswith("+16.67 ")


def test_items_of_an_own_task_have_another_name_than_its_metric(scored: Scored, tmp_path: Path) -> None:
    results = []
    for name, right in (("a", {1}), ("b", {1, 2})):
        folder = scored(name, right)
        found = load_result(folder)
        items = {item: {"score": values["strict"]} for item, values in found.items.items()}
        results.append((folder, replace(found, metrics={"accuracy": found.metrics["strict"]}, items=items)))
    (row,) = next(block for block in versus_blocks(results) if isinstance(block, Table)).rows
    assert row[4].startswith("+5.00 ")


@pytest.mark.parametrize(
    ("reason", "star"),
    [
        ("no response", "*"),
        ("request refused: bad_request", "*"),
        ("prompt does not fit the context", "*"),
        ("no judgment", "*"),
        ("no rating", ""),  # the benchmark leaves such an item out itself
    ],
)
def test_a_value_without_some_of_the_items_has_a_star(scored: Scored, reason: str, star: str) -> None:
    folder = scored("first", {1})
    result = replace(load_result(folder), data_is_standard=True, unscored={reason: 2})
    assert report.Found(folder, result).star == star
