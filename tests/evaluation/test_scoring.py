"""`nemotron4 eval score`: stored answers in, one JSON object out; each benchmark on a small file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.scoring import read_responses
from nemotron4.evaluation.task import Inputs, Item, Judgment, user
from nemotron4.evaluation.tasks import alpaca_eval
from nemotron4.grading.sandbox import SandboxError, open_sandbox

Rows = list[dict[str, Any]]


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def lines(name: str, rows: Rows) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run(
        task: str, data: Rows, responses: Rows | None = None, judgments: Rows | None = None
    ) -> dict[str, Any]:
        command = ["eval", "score", task, "--json", "--data", lines("data.jsonl", data)]
        if responses is not None:
            command += ["--responses", lines("responses.jsonl", responses)]
        if judgments is not None:
            command += ["--judgments", lines("judgments.jsonl", judgments)]
        status = main(command)
        captured = capsys.readouterr()
        if status:
            raise AssertionError(captured.err)
        printed: dict[str, Any] = json.loads(captured.out)
        return printed

    return run


GSM8K: Rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(4)]


def test_two_rows_of_one_id_are_refused(score: Any) -> None:
    """One would get the answer to the other."""
    row = {"subject": "art", "index": 0, "question": "?", "choices": list("abcd"), "answer": "A"}
    with pytest.raises(AssertionError, match="mmlu: id 'art/0' is on 2 rows of the data"):
        score(
            "mmlu", [row, {**row, "question": "Another?", "answer": "B"}], [{"id": "art/0", "response": "A"}]
        )


def test_gsm8k_reports_both_extractions_and_counts_what_is_missing(score: Any) -> None:
    responses = [
        {"id": 0, "response": "#### 0"},
        {"id": "1", "response": "The answer is 2"},
        {"id": 2, "response": "no idea"},
    ]
    result = score("gsm8k", GSM8K, responses)
    assert result["task"] == "gsm8k"
    third = pytest.approx(100 / 3)
    two_thirds = pytest.approx(200 / 3)
    assert result["metrics"] == {"strict": third, "flexible": two_thirds, "value": two_thirds, "looping": 0}
    assert result["numerators"] == {"strict": 1, "flexible": 2, "value": 2, "looping": 0}
    assert set(result["denominators"].values()) == {3}
    assert result["unscored"] == 1
    assert result["unscored_reasons"] == {"no response": 1}
    assert result["unparsed"] == 2
    assert result["data_is_standard"] is False


def test_mmlu_prints_the_subject_mean_beside_the_accuracy(score: Any) -> None:
    data = [
        {"subject": s, "index": n, "question": "q {x}", "choices": ["a", "b", "c", "d"], "answer": "B"}
        for s, count in (("law", 3), ("art", 1))
        for n in range(count)
    ]
    responses = [
        {"id": "law/0", "response": "B"},
        {"id": "law/1", "response": " B."},
        {"id": "law/2", "response": "A"},
        {"id": "art/0", "response": "The answer is B"},
    ]
    result = score("mmlu", data, responses)
    assert result["metrics"]["accuracy"] == 50
    assert result["metrics"]["macro_accuracy"] == pytest.approx(100 / 3)
    assert result["unparsed"] == 1


def test_ifeval_has_four_accuracies(score: Any) -> None:
    data = [
        {
            "key": 1000,
            "prompt": "p",
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
            "kwargs": [{}, {}],
        },
        {"key": 1001, "prompt": "p", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
    ]
    responses = [{"id": 1000, "response": "no comma"}, {"id": 1001, "response": 'Sure:\n"x"'}]
    result = score("ifeval", data, responses)
    assert result["numerators"] == {
        "prompt_strict": 0,
        "instruction_strict": 1,
        "prompt_loose": 1,
        "instruction_loose": 2,
        "looping": 0,
    }
    assert result["denominators"]["instruction_strict"] == 3
    assert result["metrics"]["prompt_loose"] == 50


def _needs_sandbox() -> None:
    try:
        open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def test_code_is_run_in_the_sandbox_and_says_so(score: Any) -> None:
    _needs_sandbox()
    data = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "test": "def check(c):\n    assert c(1) == 1\n",
        }
        for n in range(2)
    ]
    responses = [
        {"id": "HumanEval/0", "response": "```python\ndef f(x):\n    return x\n```"},
        {"id": "HumanEval/1", "response": "    return 2"},
    ]
    result = score("humaneval", data, responses)
    assert result["metrics"] == {"pass@1": 50, "pass@1_found": 50, "pass@1_raw": 0, "looping": 0}
    assert result["isolation"] in ("namespaces", "user-namespaces")


def test_mbpp_scores_its_378_tasks_and_counts_answers_to_others(score: Any) -> None:
    _needs_sandbox()
    data = [
        {"task_id": n, "prompt": "Write f.", "code": "", "test_imports": [], "test_list": ["assert f() == 1"]}
        for n in (2, 3, 5)  # 5 is in neither EvalPlus list
    ]
    responses = [{"id": n, "response": "```python\ndef f(): return 1\n```"} for n in (2, 3, 5)]
    result = score("mbpp", data, responses)
    assert (result["numerators"]["pass@1"], result["denominators"]["pass@1"]) == (2, 2)
    assert "1 answers to tasks outside this set left out" in result["notes"]
    assert score("mbpp_427", data, responses)["denominators"]["pass@1"] == 3


def test_mt_bench_drops_unreadable_ratings_and_takes_the_last(score: Any) -> None:
    data = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 101, "category": "reasoning", "turns": ["a", "b"]},
    ]
    judgments = [
        {"id": 81, "turn": 1, "text": "Others gave [[2]]. Rating: [[8]]"},
        {"id": 81, "turn": 2, "text": "Rating: eight"},
        {"id": 101, "turn": 1, "text": "[[4]]"},
    ]
    result = score("mt_bench", data, None, judgments)
    assert result["name"] == "mt_bench (judge not named)"
    assert result["metrics"] == {"total": 6, "turn_1": 6, "turn_2": None, "writing": 8, "reasoning": 4}
    assert result["unscored_reasons"] == {"no rating": 1, "no judgment": 1}
    assert score("mt_bench_first", data, None, judgments)["metrics"]["total"] == 3


def test_arena_hard_weighs_and_swaps_games(score: Any) -> None:
    data = [{"question_id": name, "turns": [{"content": "q"}]} for name in "xy"]
    judgments = [
        {"id": "x", "game": 1, "text": "[[B>>A]]"},
        {"id": "x", "game": 2, "text": "[[A=B]]"},
        {"id": "y", "game": 1, "text": "[[A>B]]"},
        {"id": "y", "game": 2, "text": "[[A>B]] no, [[B>A]]"},
    ]
    result = score("arena_hard", data, None, judgments)
    assert result["metrics"]["score"] == 70  # (3 + 0.5) of 5 battles
    assert result["metrics"]["lower"] <= 70 <= result["metrics"]["upper"]
    assert result["unscored_reasons"] == {"verdicts disagree": 1}


ALPACA: Rows = [{"instruction": f"i{n}", "output": "b" * (n + 1)} for n in range(3)]


def test_alpaca_eval_without_the_whole_set_has_no_length_controlled_rate(score: Any) -> None:
    responses = [{"id": n, "response": "x"} for n in range(3)]
    judgments = [
        {"id": 0, "logprobs": {"m": -0.1, "M": -30.0}, "model_shown": "m"},
        {"id": 1, "logprobs": [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -30.0}]},
    ]
    flat = [{"id": 0, "m": -0.1, "M": -30.0, "model_shown": "m"}, {"id": 1, "m": -0.1, "M": -30.0}]
    assert score("alpaca_eval", ALPACA, responses, flat)["metrics"]["win_rate"] == pytest.approx(50)
    result = score("alpaca_eval", ALPACA, responses, judgments)
    assert result["metrics"]["win_rate"] == pytest.approx(50)
    assert result["metrics"]["lc_win_rate"] is None
    assert result["unscored"] == 1


def test_alpaca_eval_refuses_judgments_without_log_probabilities(score: Any) -> None:
    with pytest.raises(AssertionError, match="no judgment has log-probabilities"):
        score("alpaca_eval", ALPACA, [{"id": 0, "response": "x"}], [{"id": 0, "text": "m"}])


def test_tfeval_counts_refused_on_topic_turns_against_the_distractors(score: Any) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "A loan?"), ("assistant", "Yes, a loan.")]
    data = [
        {
            "system_instruction": "You are a bank.",
            "conversation": [{"role": role, "content": content} for role, content in turns],
            "distractors": [
                {"bot turn": "yes - a loan", "distractor": "And football?"},
                {"bot turn": "Never said.", "distractor": "And cooking?"},
            ],
        }
    ]
    refusal = "This question is not relevant to the scenario."
    responses = [
        {"id": "0/on_topic/0", "response": refusal},
        {"id": "0/on_topic/1", "response": "A loan costs 3 %."},
        {"id": "0/distractor/0", "response": refusal},
        {"id": "0/distractor/1", "response": refusal},
    ]
    result = score("tfeval", data, responses)
    assert result["metrics"]["distractor_f1"] == pytest.approx(80)
    assert result["metrics"]["on_topic_f1"] == pytest.approx(200 / 3)
    assert result["metrics"]["distractor_precision"] == pytest.approx(200 / 3)
    assert any(note.startswith("1 distractors follow the last bot turn") for note in result["notes"])


def test_rewardbench_needs_every_subset_for_a_section(score: Any) -> None:
    data = [{"id": 1, "subset": "hep-go", "prompt": "p", "chosen": "c", "rejected": "r"}]
    result = score("rewardbench", data, [{"id": 1, "response": [1.0, -1.0]}])
    assert result["metrics"]["reasoning"] is None
    assert result["metrics"]["overall"] is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": 99, "response": "x"}], "responses.jsonl:1: id '99' is not in the benchmark"),
        (
            [{"id": 0, "response": "x"}, {"id": 0, "response": "y"}],
            "responses.jsonl:2: id '0' is answered twice",
        ),
        ([{"id": 0, "response": None}], "responses.jsonl:1: field 'response'"),
        ([{"task_id": 0, "solution": "x"}], "(?s)responses.jsonl:1: field 'id'.*are task_id, solution"),
    ],
)
def test_a_bad_row_names_its_file_and_line(score: Any, rows: Rows, expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        score("gsm8k", GSM8K, rows)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": 0, "response": ' + "1" * 5000 + "}", "answers.jsonl:1: not valid JSON"),
        ("[" * 100_000, "answers.jsonl:1: not valid JSON"),
        ('{"id": 0, "response": "a", "epoch": 900000000}', "has epoch 900000000, but 1 epochs"),
        ("", "gsm8k: nothing was scored: 1 no response"),
    ],
)
def test_odd_files_of_answers_are_one_line(tmp_path: Path, capsys: Any, line: str, expected: str) -> None:
    answers, data = tmp_path / "answers.jsonl", tmp_path / "data.jsonl"
    answers.write_text(line + "\n")
    data.write_text('{"question": "q", "answer": "#### 1"}\n')
    assert main(["eval", "score", "gsm8k", "--responses", str(answers), "--data", str(data)]) == 1
    assert expected in capsys.readouterr().err


def test_a_byte_order_mark_and_one_end_for_two_turns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "response": ["x", "y"], "finish_reason": "stop"}\n')
    item = Item(id="a", messages=user("q"), follow_ups=("again",))
    ((epoch,), _) = read_responses(path, [item], lambda name: False)
    assert epoch["a"].texts == ("x", "y")


@pytest.mark.parametrize(
    "given",
    [[{"token": "m"}], {"m": None}, {"m": "x"}, [1], {"content": [1]}, {"content": [{"top_logprobs": [1]}]}],
)
def test_log_probabilities_of_another_form_are_refused_by_their_judgment(given: Any) -> None:
    item = Item(id="0", messages=user("q"), fields={"baseline": "b"})
    judgment = Judgment(id="0", fields={"logprobs": given})
    inputs = Inputs(items=[item], responses={}, judgments=[judgment], source=DataSource(Path()))
    with pytest.raises(DataError, match="judgment 0: not log-probabilities"):
        alpaca_eval.score(inputs)


def test_gzipped_answers_and_line_separators_inside_texts_are_read(tmp_path: Path, capsys: Any) -> None:
    responses = tmp_path / "responses.jsonl.gz"
    row = {"id": 0, "response": "line\u2028separator\n#### 0"}
    responses.write_bytes(gzip.compress(json.dumps(row, ensure_ascii=False).encode()))
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps(GSM8K[0]).encode()))
    assert main(["eval", "score", "gsm8k", "--responses", str(responses), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["strict"] == 100


def test_a_missing_or_changed_standard_file_is_refused(tmp_path: Path, capsys: Any) -> None:
    responses = tmp_path / "r.jsonl"
    responses.write_text('{"id": 0, "response": "#### 1"}\n')
    command = ["eval", "score", "gsm8k", "--responses", str(responses), "--data-dir", str(tmp_path)]
    assert main(command) == 1
    assert "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14" in capsys.readouterr().err
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text(json.dumps(GSM8K[0]) + "\n")
    assert main(command) == 1
    assert "expected 3730d312" in capsys.readouterr().err


def test_scoring_needs_the_right_kind_of_file(score: Any) -> None:
    with pytest.raises(AssertionError, match="scored by a judge"):
        score("arena_hard", [{"question_id": "x", "turns": [{"content": "q"}]}], [])
    with pytest.raises(AssertionError, match="has no judge"):
        score("gsm8k", GSM8K, [], [])
    with pytest.raises(AssertionError, match="did you mean 'gsm8k'"):
        score("gsm", GSM8K, [])


def test_list_and_data_check_print_one_json_object(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", "list", "--json"]) == 0
    names = {row["task"] for row in json.loads(capsys.readouterr().out)["tasks"]}
    card = {"mt_bench", "ifeval", "mmlu", "gsm8k", "humaneval", "mbpp", "arena_hard", "alpaca_eval", "tfeval"}
    assert card <= names
    assert main(["eval", "data", "check", "--json", "--data-dir", str(tmp_path)]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {row["status"] for row in files} == {"missing"}
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval/input_data.jsonl").write_text("{}\n")
    assert main(["eval", "data", "check", "ifeval", "--data-dir", str(tmp_path)]) == 1
