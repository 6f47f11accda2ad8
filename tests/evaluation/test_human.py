"""The human evaluation: blind, random and repeatable orders, resumed, win + tie + loss = 100."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour
from nemotron4.errors import ConfigError, DataError
from nemotron4.evaluation.human import Study
from nemotron4.evaluation.human_results import Comparison, evaluate
from tests.fake_serving import serving

MODELS = ("ours", "base", "third")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Six prompts in two categories, and answers that never name their model."""
    prompts = [{"id": f"p{n}", "prompt": f"Question {n}?", "category": "ab"[n % 2]} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for at, model in enumerate(MODELS):
        rows = [{"id": f"p{n}", "response": f"Text {at} of {n}"} for n in range(6)]
        if model == "third":
            rows.pop()
        (tmp_path / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def new(inputs: Path, *, models: str | None = None, seed: int = 0) -> int:
    sources = models or ",".join(f"{model}={inputs / f'{model}.jsonl'}" for model in MODELS)
    command = [
        "eval",
        "human",
        "new",
        "--out",
        str(inputs / "study"),
        "--prompts",
        str(inputs / "prompts.jsonl"),
    ]
    return main([*command, "--models", sources, "--seed", str(seed)])


@pytest.fixture
def study(inputs: Path, capsys: pytest.CaptureFixture[str]) -> Study:
    assert new(inputs) == 0
    capsys.readouterr()
    return Study(inputs / "study")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def rate_all(study: Study, annotator: str, levels: dict[str, int], length: str = "just_right") -> None:
    for prompt in study.complete_prompts:
        for model in study.answer_order(annotator, prompt.id):
            values = {"helpfulness": levels[model], "truthfulness": levels[model], "length": length}
            study.rate(annotator, prompt.id, model, values)


def test_a_prompt_without_all_answers_is_left_out_and_counted(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(inputs) == 0
    assert "1 of 6 prompts lack an answer" in capsys.readouterr().err
    assert new(inputs) == 0  # again: nothing changes
    assert new(inputs, seed=1) == 1  # another study
    assert "another run: seed was 0, is 1" in capsys.readouterr().err


def test_orders_are_random_per_annotator_and_the_same_every_time(study: Study) -> None:
    orders = [tuple(study.answer_order(f"person{n}", "p0")) for n in range(60)]
    assert len(set(orders)) == 6  # every order of three
    assert max(Counter(order[0] for order in orders).values()) < 40
    again = Study(study.folder)
    assert [tuple(again.answer_order(f"person{n}", "p0")) for n in range(60)] == orders
    assert [p.id for p in again.prompt_order("ada")] == [p.id for p in study.prompt_order("ada")]


def test_rating_hides_the_models_and_goes_on_where_it_stopped(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "human", "rate", str(study.folder), "--annotator", "ada"]
    one = ["4", "3", "just_right"]
    typed(monkeypatch, *one, *one, "5")  # leaves in the third answer
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "what was answered before is kept" in shown.err
    assert "answer A" in shown.out
    assert not any(model in shown.out + shown.err.split("hint")[0] for model in MODELS)
    assert len(study.ratings()) == 2
    typed(monkeypatch, "0", "5", "3", *(one * 12))
    assert main(command) == 0
    ratings = study.ratings()
    assert len(ratings) == 15
    first = study.prompt_order("ada")[0].id
    third = study.answer_order("ada", first)[2]
    (last,) = [r for r in ratings if (r.prompt, r.model) == (first, third)]
    assert (last.helpfulness, last.truthfulness, last.length, last.position) == (0, 5, "too_long", 2)
    typed(monkeypatch, *(["5", "5", "1"] * 3))
    assert main([*command, "--again", first]) == 0  # the last rating of an answer counts
    assert {r.helpfulness for r in study.ratings() if r.prompt == first} == {5}


def test_a_wrong_answer_is_refused_and_nothing_is_kept_of_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "6")
    assert main(["eval", "human", "rate", str(study.folder), "--annotator", "ada"]) == 1
    assert "not a number from 0 to 5" in capsys.readouterr().err
    assert study.ratings() == []
    assert main(["eval", "human", "rate", str(study.folder), "--annotator", "../x"]) == 1


def test_report_compares_the_same_annotator_on_the_same_prompt(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    rate_all(study, "ada", {"ours": 5, "base": 3, "third": 3})
    rate_all(study, "bob", {"ours": 2, "base": 4, "third": 4}, length="too_long")
    result = evaluate(study, "base")
    overall = {c.model: c for c in result.comparisons if (c.axis, c.category) == ("helpfulness", "all")}
    assert dict(overall["ours"].counts) == {"win": 5, "tie": 0, "loss": 5}
    assert overall["third"].percent == {"win": 0.0, "tie": 100.0, "loss": 0.0}
    # Every prompt has one win and one loss, so drawing prompts again changes nothing.
    assert overall["ours"].intervals["win"].lower == overall["ours"].intervals["win"].upper == 0.5
    by_category = {
        c.category: c.total for c in result.comparisons if (c.model, c.axis) == ("ours", "truthfulness")
    }
    assert by_category == {"all": 10, "a": 6, "b": 4}
    assert result.lengths["ours"] == {"too_short": 0, "just_right": 5, "too_long": 5}
    (pair,) = result.agreements
    named = pair.questions
    assert (pair.first, pair.second, named["helpfulness"].num_items) == ("ada", "bob", 15)
    assert named["helpfulness"].kappa is not None
    assert named["helpfulness"].kappa < 0
    assert named["length"].kappa == 0
    assert main(["eval", "human", "report", str(study.folder), "--baseline", "base"]) == 0
    assert "50.00 [50.0, 50.0]" in capsys.readouterr().out


def test_ratings_without_a_partner_are_counted_and_not_compared(study: Study) -> None:
    study.rate("ada", "p0", "ours", {"helpfulness": 5, "truthfulness": 5, "length": "too_short"})
    study.rate("ada", "p0", "base", {"helpfulness": 5})  # not whole yet
    result = evaluate(study, "base")
    assert (result.num_ratings, result.unpaired, result.comparisons) == (1, 1, ())
    with pytest.raises(ConfigError, match="unknown model 'bse'"):
        evaluate(study, "bse")


@pytest.mark.parametrize("counts", [(1, 1, 1), (19, 0, 1), (2, 2, 3), (134, 1, 1)])
def test_percentages_sum_to_100(counts: tuple[int, int, int]) -> None:
    values = Comparison("m", "helpfulness", "all", dict(zip(("win", "tie", "loss"), counts, strict=True)), {})
    assert sum(round(100 * value) for value in values.percent.values()) == 10_000


def test_answers_are_asked_from_a_server_once(inputs: Path) -> None:
    asked: list[str] = []

    def script(messages: Any, sampling: Any) -> str:
        asked.append(messages[-1].content)
        return "An answer."

    with serving(FakeBehaviour(script=script, hopeless="Question 3")) as url:
        sources = f"base={inputs / 'base.jsonl'},live={url}"
        assert new(inputs, models=sources) == 0
        assert new(inputs, models=sources) == 0
    assert len(asked) == 5  # one is refused for good, and none is asked twice
    assert len(Study(inputs / "study").complete_prompts) == 5


def test_stored_rows_hold_no_more_than_a_rating(study: Study) -> None:
    rate_all(study, "ada", dict.fromkeys(MODELS, 3))
    stored = study.store.judgments()[0]
    assert set(stored.to_json()) == {"item", "answer", "annotator", "at", "values"}
    assert set(stored.values) == {"helpfulness", "truthfulness", "length"}


def test_judgments_are_exported_as_said_and_as_pairs(study: Study, tmp_path: Path) -> None:
    rate_all(study, "ada", {"ours": 5, "base": 3, "third": 3})
    out = tmp_path / "out.jsonl"
    command = ["eval", "human", "export", str(study.folder), "--out", str(out)]
    assert main(command) == 0
    assert len(out.read_text().splitlines()) == 15
    assert main([*command, "--form", "preference"]) == 0
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["meta"]["chosen_model"], row["meta"]["rejected_model"]) for row in pairs} == {
        ("ours", "base"),
        ("ours", "third"),
    }


def test_a_pair_is_of_people_who_rated_both(study: Study) -> None:
    for who, model, level in (("ada", "ours", 3), ("bob", "base", 5), ("eve", "ours", 4), ("eve", "base", 2)):
        study.rate(who, "p0", model, {"helpfulness": level})
    (pair,) = study.export("preference").rows
    assert pair.to_json()["meta"] == {"chosen_model": "ours", "rejected_model": "base", "annotators": 1}


def test_a_study_keeps_its_answers_and_says_so(inputs: Path, study: Study, capsys: Any) -> None:
    """Other answers or settings of the same command were taken for the ones there."""
    (inputs / "base.jsonl").write_text('{"id": "p0", "response": "Another text."}\n')
    assert new(inputs) == 1
    assert "base.jsonl:1: there is another answer to prompt 'p0' already" in capsys.readouterr().err
    sources = ",".join(f"{model}=http://127.0.0.1:1" for model in MODELS)
    command = ["eval", "human", "new", "--out", str(inputs / "study"), "--models", sources]
    assert main([*command, "--prompts", str(inputs / "prompts.jsonl"), "--max-tokens", "7"]) == 1
    assert "max_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"models": [], "seed": 0, "prompts": [["a", [5], "c"]]}']
)
def test_a_folder_of_something_else_is_no_study(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(DataError, match=r"study\.json: not a study of this version"):
        Study(tmp_path)
