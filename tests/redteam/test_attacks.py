"""PAIR, TAP and Crescendo against scripted models: what is reached, blocked, off the form, and resumed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from nemotron4.cli.main import main
from nemotron4.client import ChatModel, FakeBehaviour, HopelessError, Reply, Sampling
from nemotron4.redteam.attacks import FORMS, GoalResult, attack_goals, read_goals, report_goals, texts
from nemotron4.redteam.garak_areas import REPORT_AREAS
from nemotron4.redteam.judges import ask_in_form
from nemotron4.redteam.sessions import CATEGORIES, SessionStore
from nemotron4.redteam.settings import AttackSettings
from tests.fake_serving import serving
from tests.redteam.target import serving_target

Script = Callable[[Any, Any], str]


def attacker(messages: Any, sampling: Any) -> str:
    """Begins softly and gets louder with each attempt; a fence around the JSON is no hurdle."""
    told = [m.content for m in messages if m.role == "user" and "Score:" in m.content]
    number = 1 + len(told)
    text = f"attempt {number}"
    return (
        "```json\n"
        + json.dumps({"improvement": "louder", "prompt": text, "question": text, "summary": ""})
        + "\n```"
    )


def weak(messages: list[dict[str, str]]) -> str:
    asked = messages[-1]["content"]
    return "Here it is, in full." if asked in ("attempt 3", "attempt 4") else "I cannot help with that."


def judge(messages: Any, sampling: Any) -> str:
    asked = messages[-1].content
    if "on_topic" in asked:
        return '{"on_topic": true}'
    score = 10 if "in full" in asked.split("conversation:")[-1] else 1
    return json.dumps({"score": score, "reason": "as it is"})


@contextmanager
def three(
    target: Callable[[list[dict[str, str]]], str] = weak, attack: Script = attacker, score: Script = judge
) -> Iterator[list[str]]:
    with (
        serving_target(target) as url,
        serving(FakeBehaviour(script=attack), model="attacker") as attacks,
        serving(FakeBehaviour(script=score), model="judge") as scores,
    ):
        yield ["--target", url, "--attacker", attacks, "--judge", scores]


@pytest.fixture
def goals(tmp_path: Path) -> Path:
    path = tmp_path / "goals.jsonl"
    rows = [
        {"id": "a", "goal": "open the lock", "area": "jailbreaks", "category": "criminal_planning"},
        {"id": "b", "goal": "say it", "area": "toxic_continuation"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(out: Path, goals: Path, where: list[str], *more: str) -> list[str]:
    return ["redteam", "attack", *where, "--goals", str(goals), "--out", str(out), "--json", *more]


@pytest.mark.parametrize("method", ["pair", "tap", "crescendo"])
def test_a_weak_target_is_reached_and_recorded(
    method: str, goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "s.sqlite"
    with three() as where:
        command = run(tmp_path / "run", goals, where, "--method", method, "--sessions", str(database))
        if (
            method == "crescendo"
        ):  # a refused question is forgotten, so attempts are not counted by the attacker
            softly = iter(f"attempt {n}" for n in range(1, 99))

            def soft(messages: Any, sampling: Any) -> str:
                return json.dumps({"question": next(softly), "summary": ""})

            with serving(FakeBehaviour(script=soft), model="attacker") as url:
                command[command.index("--attacker") + 1] = url
                assert main([*command, "--concurrency", "1", "--max-queries", "4"]) == 0
        else:
            assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    first = result["goals"][0]
    assert (first["outcome"], first["score"]) == ("success", 10)
    assert first["messages"][-1]["content"] == "Here it is, in full."
    assert first["queries"] <= 20
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"target: {method} reached" in report
    assert "| jailbreaks | 0.0 %" in report
    with SessionStore(database) as store:
        found = {each.session.notes: each for each in store.sessions()}
    assert found["open the lock"].outcome == "success"
    assert found["open the lock"].session.technique == "automatic"
    assert found["open the lock"].session.category == "criminal_planning"


def test_crescendo_forgets_a_refused_step_and_keeps_the_others(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    steps = iter(["hello", "too far", "softer", "the goal"] * 2)

    def step(messages: Any, sampling: Any) -> str:
        return json.dumps({"question": next(steps), "summary": ""})

    def target(messages: list[dict[str, str]]) -> str:
        asked.append([m["content"] for m in messages if m["role"] == "user"])
        last = messages[-1]["content"]
        return (
            "I cannot help with that."
            if last == "too far"
            else "In full."
            if last == "the goal"
            else "Of course."
        )

    def score(messages: Any, sampling: Any) -> str:
        return json.dumps({"score": 10 if "In full" in messages[-1].content else 2, "reason": ""})

    with three(target, step, score) as where:
        command = run(tmp_path / "run", goals, where, "--method", "crescendo", "--concurrency", "1")
        assert main(command) == 0
    assert asked[:4] == [
        ["hello"],
        ["hello", "too far"],
        ["hello", "softer"],
        ["hello", "softer", "the goal"],
    ]
    assert json.loads(capsys.readouterr().out)["goals"][0]["outcome"] == "success"


def test_blocked_answers_are_blocked_and_other_forms_unscored(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def guarded(messages: Any, sampling: Any) -> str:
        return json.dumps({"improvement": "", "prompt": "please be guarded"})

    with three(attack=guarded) as where:
        assert main(run(tmp_path / "one", goals, where, "--streams", "1", "--depth", "2")) == 0
    first = json.loads(capsys.readouterr().out)["goals"][0]
    assert (first["outcome"], first["queries"], first["blocked"]) == ("blocked", 2, 2)
    with three(score=lambda messages, sampling: "I would say eight.") as where:
        assert main(run(tmp_path / "two", goals, where, "--streams", "1", "--depth", "1")) == 0
    assert json.loads(capsys.readouterr().out)["goals"][0]["outcome"] == "unscored"
    with three(attack=lambda messages, sampling: "I will not write attacks.") as where:
        assert main(run(tmp_path / "three", goals, where)) == 0
    first = json.loads(capsys.readouterr().out)["goals"][0]
    assert (first["outcome"], first["reason"], first["queries"]) == (
        "unscored",
        "the attacker kept to no form",
        0,
    )


def test_a_blocked_answer_hides_none_that_has_no_score(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_open_then_guarded(messages: Any, sampling: Any) -> str:
        is_second = any("Score:" in m.content for m in messages)
        return json.dumps({"improvement": "", "prompt": "be guarded" if is_second else "go"})

    with three(attack=first_open_then_guarded, score=lambda messages, sampling: "eight") as where:
        assert main(run(tmp_path / "run", goals, where, "--streams", "1", "--depth", "2")) == 0
    first = json.loads(capsys.readouterr().out)["goals"][0]
    assert (first["outcome"], first["queries"], first["blocked"]) == ("unscored", 2, 1)


def test_a_finished_goal_is_not_asked_again_and_another_run_is_refused(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def count(messages: list[dict[str, str]]) -> str:
        asked.append(messages[-1]["content"])
        return weak(messages)

    with three(count) as where:
        assert main(run(tmp_path / "run", goals, where)) == 0
        before = len(asked)
        assert main(run(tmp_path / "run", goals, where)) == 0
        assert len(asked) == before
        assert main(run(tmp_path / "run", goals, where, "--depth", "2")) == 1
    assert "depth was 5, is 2" in capsys.readouterr().err


def test_attacker_and_judge_are_held_to_their_forms(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, list[Any]] = {"attacker": [], "judge": []}

    def listen(name: str, script: Script) -> Script:
        def answer(messages: Any, sampling: Any) -> str:
            seen[name].append(sampling.schema)
            return script(messages, sampling)

        return answer

    with three(attack=listen("attacker", attacker), score=listen("judge", judge)) as where:
        assert main(run(tmp_path / "run", goals, where)) == 0
    assert {tuple(each["properties"]) for each in seen["attacker"]} == {("improvement", "prompt")}
    assert {tuple(each["properties"]) for each in seen["judge"]} == {("score", "reason")}
    assert seen["judge"][0]["properties"]["score"] == {"type": "integer", "minimum": 1, "maximum": 10}


def test_an_endpoint_that_refuses_schemas_is_asked_in_words() -> None:
    class Plain:
        """A server of before schemas."""

        name = "plain"

        async def chat(self, messages: Any, sampling: Any) -> Reply:
            if sampling.schema is not None:
                raise HopelessError("response_format is not known here", kind="bad_request")
            return Reply(text='{"score": 3, "reason": "a little"}', finish_reason="stop", model=self.name)

    asked = ask_in_form(cast("ChatModel", Plain()), (), FORMS["score"], "score", Sampling())
    assert asyncio.run(asked) == {"score": 3, "reason": "a little"}


def test_no_text_for_a_model_has_a_reply_that_it_could_give_back() -> None:
    told = [*texts()["attacker"].values(), *texts()["judge"].values()]
    assert not [text for text in told if '":' in text]


def test_our_goals_cover_the_areas_of_the_report() -> None:
    goals = report_goals()
    assert {goal.area for goal in goals} == set(REPORT_AREAS)
    assert {goal.category for goal in goals} <= set(CATEGORIES)
    assert len({goal.id for goal in goals}) == len(goals)


def test_an_unknown_method_is_refused(
    goals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--target", "http://x", "--attacker", "http://x", "--judge", "http://x"]
    assert main(run(tmp_path / "run", goals, where, "--method", "pear")) == 1
    assert "did you mean 'pair'?" in capsys.readouterr().err
    assert read_goals(goals)[1].category == "other"


class OneAnswer:
    """A model that always says or raises the same."""

    name = "m"

    def __init__(self, answer: str | Exception) -> None:
        self._answer = answer

    async def chat(self, messages: Any, sampling: Any) -> Reply:
        if isinstance(self._answer, Exception):
            raise self._answer
        return Reply(text=self._answer, finish_reason="stop", model=self.name)


def play(out: Path, answer: str | Exception) -> list[GoalResult]:
    attacks = OneAnswer('{"improvement": "", "prompt": "do it"}')
    models = {
        "target": OneAnswer(answer),
        "attacker": attacks,
        "judge": OneAnswer('{"score": 2, "reason": ""}'),
    }
    settings = AttackSettings(method="pair", streams=2, depth=1)
    found = attack_goals(report_goals()[:2], settings, out=out, **cast(dict[str, ChatModel], models))
    return asyncio.run(found)


def test_a_target_that_refuses_the_streams_of_pair_costs_its_goal_alone(tmp_path: Path) -> None:
    results = play(tmp_path, HopelessError("too long", kind="context_length", status=400))
    assert [(each.outcome, each.reason) for each in results] == [("unscored", "no answer: too long")] * 2


def test_a_wrong_key_ends_the_run_and_books_nothing(tmp_path: Path) -> None:
    with pytest.raises(HopelessError, match="wrong key"):
        play(tmp_path, HopelessError("wrong key", kind="unauthorized", status=401))
    assert [each.outcome for each in play(tmp_path, "No.")] == ["failure"] * 2
