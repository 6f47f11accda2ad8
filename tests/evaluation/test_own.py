"""Tasks of one's own: every grader, what a folder may get wrong, Python functions, `eval list`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour
from tests.fake_serving import serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mine"


def write(folder: Path, toml: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "task.toml").write_text(toml)
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(folder: Path, responses: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    path = folder / "responses.jsonl"
    rows = [{"id": n, "response": text} for n, text in enumerate(responses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "score", str(folder), "--responses", str(path), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


GRADED = [
    ("choice", "", "B", ["B", "The answer is (B).", "(b)", "A. Because"], [1, 1, 0, 0]),
    ("choice", "", "B", ["I think the answer is B", "A good answer: B", "B because A", "I am"], [1, 1, 1, 0]),
    ("choice", "", "A", ["A is right", "A because I think so", "A, not B", "A good one"], [1, 1, 1, 0]),
    ("choice", "", "B", ["**B**", "ANSWER: B", "$\\boxed{B}$", "I'm sure the answer is B"], [1, 1, 1, 1]),
    ("choice", "", "B", ["A. Paris\nB. Rome\nAnswer: **B**", "B is wrong. The answer is A"], [1, 0]),
    ("number", "", 1e-05, ["It is 0.00001.", "5", "1e-5"], [1, 0, 1]),
    ("number", "", -5, ["It is \N{MINUS SIGN}5.", "5"], [1, 0]),
    ("number", "", "57", ["She makes $57.00.", "57,000", "it is 57"], [1, 0, 1]),
    ("exact", "", "Paris", [" paris. ", "Paris, France"], [1, 0]),
    ("contains", "", "Paris", ["It is PARIS!", "London"], [1, 0]),
    ("regex", "pattern = 'Answer:( x)?'", "x", ["Answer: x", "Answer: y"], [1, 0]),
    ("regex", "pattern = 'Answer: (.*)'", "Paris", ["Answer: x\nAnswer: Paris", "Paris"], [1, 0]),
]


@pytest.mark.parametrize(("grader", "more", "right", "responses", "expected"), GRADED)
def test_every_grader_decides(
    folder: Path, capsys: Any, grader: str, more: str, right: Any, responses: list[str], expected: list[int]
) -> None:
    toml = f'name = "mine"\nprompt = "Q: {{q}} {{x}}"\ngrader = "{grader}"\n{more}\n'
    write(
        folder, toml, [{"q": f"{n}?", "x": "{not a field}", "answer": right} for n in range(len(responses))]
    )
    result = score(folder, responses, capsys)
    assert result["numerators"]["accuracy"] == sum(expected)
    assert result["denominators"]["accuracy"] == len(expected)


def test_programs_are_taken_out_of_any_fence_and_run(folder: Path, capsys: Any) -> None:
    write(
        folder,
        'name = "mine"\nprompt = "{q}"\ngrader = "code"\n',
        [{"q": "f", "tests": ["assert f(1) == 2"]}, {"q": "f", "tests": "assert f(1) == 2"}],
    )
    result = score(folder, ["~~~\ndef f(x):\n    return x + 1\n~~~", "def f(x): return 0"], capsys)
    assert result["numerators"]["accuracy"] == 1
    assert result["reasons"] == {"AssertionError": 1}


def test_a_function_grades_and_may_leave_an_item_out(folder: Path, capsys: Any) -> None:
    write(
        folder,
        'name = "mine"\nprompt = "{q}"\ngrader = "python"\nfunction = "grade.py:grade"\n',
        [{"q": "a"}] * 3,
    )
    (folder / "grade.py").write_text(
        "def grade(response, row):\n    return None if response == 'skip' else len(response) / 4\n"
    )
    result = score(folder, ["abcd", "skip", "a"], capsys)
    assert result["metrics"]["mean"] == pytest.approx(0.625)
    assert result["unscored_reasons"] == {"the function gave no score": 1}


def test_results_of_two_versions_of_a_function_are_not_compared(folder: Path, capsys: Any) -> None:
    toml = 'name = "mine"\nprompt = "{q}"\ngrader = "python"\nfunction = "grade.py:grade"\n'
    write(folder, toml, [{"q": "a"}])
    (folder / "r.jsonl").write_text('{"id": 0, "response": "x"}\n')
    results = [str(folder / "first"), str(folder / "second")]
    for value, out in zip((0, 1), results, strict=True):
        (folder / "grade.py").write_text(f"def grade(response, row): return {value}\n")
        scoring = ["--responses", str(folder / "r.jsonl"), "--out", out]
        assert main(["eval", "score", str(folder), *scoring]) == 0
    capsys.readouterr()
    assert main(["eval", "compare", *results, "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["differences"]) == ["grader_sha256"]


def test_epochs_of_an_own_task_have_an_interval_and_pass_at_k(folder: Path, capsys: Any) -> None:
    toml = 'name = "mine"\nprompt = "{q}"\ngrader = "python"\nfunction = "grade.py:grade"\n'
    write(folder, toml, [{"q": "a"}] * 2)
    (folder / "grade.py").write_text("def grade(response, row): return float(response)\n")

    def scored(values: list[tuple[int, int, str]]) -> dict[str, Any]:
        rows = [{"id": item, "epoch": epoch, "response": text} for item, epoch, text in values]
        (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["eval", "score", str(folder), "--responses", str(folder / "r.jsonl"), "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    binary = scored([(0, 1, "1"), (1, 1, "0"), (0, 2, "0"), (1, 2, "0")])
    assert binary["metrics"]["accuracy"] == 25
    assert binary["metrics"]["accuracy (pass@2)"] == 50
    assert "accuracy" in binary["intervals"]
    # One epoch of zeros and ones, the other of shares: its metric has another name.
    mixed = scored([(0, 1, "1"), (1, 1, "0"), (0, 2, "0.5"), (1, 2, "0")])
    assert mixed["metrics"] == {"mean": 0.375, "looping": 0}


def test_a_judge_rates_by_a_rubric(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write(
        folder,
        'name = "mine"\nprompt = "{q}"\nsystem = "Be {mood}."\n'
        'grader = "judge"\nrubric = "Is it about {q}?"\n',
        [{"q": "cats", "mood": "kind"}, {"q": "dogs", "mood": "kind"}],
    )
    asked: list[str] = []

    def judge(messages: Any, sampling: Any) -> str:
        asked.append(messages[-1].content)
        return "Good. [[9]]" if "cats" in messages[-1].content else "Hm."

    with (
        serving(FakeBehaviour(script=lambda m, s: f"{m[0].content} {{rubric}}")) as model,
        serving(FakeBehaviour(script=judge), model="judge") as judging,
    ):
        command = ["eval", "run", str(folder), "--model", model, "--judge", judging, "--json"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "mine (judge judge)"
    assert result["metrics"]["rating"] == 9
    assert result["unscored"] == 1
    assert "[Rubric]\nIs it about cats?" in asked[0]
    assert "[Answer]\nBe kind. {rubric}" in asked[0]  # an answer is no template


def test_settings_replace_lines_of_the_file_and_are_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write(folder, 'name = "mine"\nprompt = "{q}"\ngrader = "exact"\n', [{"q": "a", "answer": "Say a"}])
    with serving(FakeBehaviour(script=lambda m, s: m[-1].content)) as model:
        command = ["eval", "run", str(folder), "--model", model, "--out", str(tmp_path / "out"), "--json"]
        assert main([*command, "--set", 'prompt="Say {q}"']) == 0
        assert main([*command, "--set", "promt=1"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["metrics"]["accuracy"] == 100
    assert result["name"] == "mine (prompt Say {q})"
    assert "unknown setting of mine 'promt'" in captured.err


def test_several_results_are_one_json_document(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write(folder, 'name = "mine"\nprompt = "{q}"\ngrader = "exact"\n', [{"q": "a", "answer": "a"}])
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    write(other, 'name = "yours"\nprompt = "{q}"\ngrader = "exact"\n', [{"q": "a", "answer": "b"}])
    with serving(FakeBehaviour(script=lambda m, s: m[-1].content)) as model:
        command = ["eval", "run", str(folder), str(other), "--model", model, "--out", str(tmp_path / "out")]
        assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(result["name"], result["metrics"]["accuracy"]) for result in results] == [
        ("mine", 100),
        ("yours", 0),
    ]


def test_a_setting_keeps_its_quotes_and_lines(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write(folder, 'name = "mine"\nprompt = "{q}"\ngrader = "exact"\n', [{"q": "a", "answer": 'a\n"it\'s"'}])
    with serving(FakeBehaviour(script=lambda m, s: m[-1].content)) as model:
        command = ["eval", "run", str(folder), "--model", model, "--out", str(tmp_path / "out"), "--json"]
        assert main([*command, "--set", 'prompt={q}\n"it\'s"']) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("grader", "row", "words"),
    [
        ("choice", {"answer": 1}, "field 'answer' is 1; expected the letter of a choice"),
        ("number", {"answer": "many"}, "field 'answer' is 'many'; expected a number"),
        ("exact", {"answer": None}, "field 'answer' is None; expected a text or a number"),
        ("contains", {"answer": "..."}, "field 'answer' is '...', of which nothing is left"),
        ("code", {"tests": []}, "field 'tests' is []; expected a list of asserts"),
    ],
)
def test_an_answer_that_none_could_equal_is_no_wrong_answer(
    folder: Path, capsys: Any, grader: str, row: dict[str, Any], words: str
) -> None:
    write(folder, f'name = "a"\nprompt = "{{q}}"\ngrader = "{grader}"\n', [{"q": "a"} | row])
    (folder / "r.jsonl").write_text('{"id": 0, "response": "x"}\n')
    assert main(["eval", "score", str(folder), "--responses", str(folder / "r.jsonl")]) == 1
    assert f"items.jsonl:1: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def grade(response, row): return row['x']\n", "grade.py:grade: KeyError: 'x'; the row is"),
        ("def grade(response, row): return 'good'\n", "could not convert string to float"),
        ("def grade(response, row): return float('nan')\n", "it returned nan"),
        ("import no_such_module as grade\n", "grade.py: cannot be loaded: ModuleNotFoundError"),
        ("def other(response, row): return 1\n", "grade.py: there is no function 'grade'"),
    ],
)
def test_what_a_function_does_wrong_is_said(folder: Path, capsys: Any, code: str, words: str) -> None:
    toml = 'name = "a"\nprompt = "{q}"\ngrader = "python"\nfunction = "grade.py:grade"\n'
    write(folder, toml, [{"q": "a"}])
    (folder / "grade.py").write_text(code)
    (folder / "r.jsonl").write_text('{"id": 0, "response": "x"}\n')
    assert main(["eval", "score", str(folder), "--responses", str(folder / "r.jsonl")]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('name = "a/b"\nprompt = "{q}"\ngrader = "exact"\n', "name is 'a/b'"),
        ('name = "a"\nprompt = "{q}"\ngrader = "regex"\n', "the grader 'regex' needs pattern"),
        ('name = "a"\nprompt = ""\ngrader = "exact"\n', "prompt is empty"),
        ('name = "a"\nprompt = "{{ q }}"\ngrader = "exact"\n', "write {q} for a field"),
        ('name = "a"\nprompt = "{q}"\ngrader = "regex"\npattern = "("\n', "pattern is no regular expression"),
        ('name = "a"\nprompt = "{q}"\ngrader = "exakt"\n', "grader is 'exakt'; expected 'choice'"),
        ('name = "a"\npromt = "{q}"\ngrader = "exact"\n', "unknown key 'promt'"),
        ('name = "a"\nprompt = "{question}"\ngrader = "exact"\n', "items.jsonl:1: unknown field 'question'"),
        ('name = "a"\nprompt = "{q}"\ngrader = "exact"\nanswer = "right"\n', "unknown field 'right'"),
        ('name = "a"\nprompt = "{q}"\ngrader = "python"\nfunction = "no.py:f"\n', "there is no Python file"),
        ('name = "a"\nprompt = "{q}"\ngrader = "exact"\ndata = "no.jsonl"\n', "no.jsonl: no such file"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, capsys: Any, toml: str, words: str) -> None:
    write(folder, toml, [{"q": "a", "answer": "b"}])
    (folder / "r.jsonl").write_text('{"id": 0, "response": "x"}\n')
    assert main(["eval", "score", str(folder), "--responses", str(folder / "r.jsonl")]) == 1
    assert words in capsys.readouterr().err


def test_a_function_may_return_the_task(folder: Path, capsys: Any) -> None:
    write(folder, 'name = "mine"\nprompt = "{q}"\ngrader = "exact"\n', [{"q": "a", "answer": "b"}])
    (folder / "make.py").write_text(
        "import dataclasses\nfrom pathlib import Path\nfrom nemotron4.evaluation.own import open_folder\n"
        "def task():\n    return dataclasses.replace(open_folder(Path(__file__).parent), title='By code')\n"
        "def other():\n    return 1\n"
    )
    (folder / "r.jsonl").write_text('{"id": 0, "response": "b"}\n')
    scoring = ["--responses", str(folder / "r.jsonl"), "--json"]
    assert main(["eval", "score", f"{folder / 'make.py'}:task", *scoring]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 100
    assert main(["eval", "score", f"{folder / 'make.py'}:other", *scoring]) == 1
    assert "returned int; expected nemotron4.evaluation.task.Task" in capsys.readouterr().err


def test_own_tasks_of_the_data_folder_are_listed_and_found_by_name(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "tasks" / "capitals"
    folder.parent.mkdir()
    write(
        folder,
        'name = "capitals"\ntitle = "Capitals"\nprompt = "{q}"\ngrader = "exact"\n',
        [{"q": 1, "answer": 2}],
    )
    assert main(["eval", "list", "--data-dir", str(tmp_path)]) == 0
    assert re.search(r"^ capitals +Capitals .* prompt *$", capsys.readouterr().out, re.M)
    (folder / "r.jsonl").write_text('{"id": 0, "response": "2"}\n')
    scoring = ["--responses", str(folder / "r.jsonl"), "--data-dir", str(tmp_path), "--json"]
    assert main(["eval", "score", "capitals", *scoring]) == 0
    assert main(["eval", "score", "capital", *scoring]) == 1
    assert "did you mean 'capitals'?" in capsys.readouterr().err
