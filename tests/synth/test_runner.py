"""The engine: resume, retries, budgets, failure classes, redoing what changed, accounting that balance."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour, Sampling
from nemotron4.client.fake import scripted_reply
from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.records import Message
from nemotron4.runs import IncompleteError
from nemotron4.synth.endpoint import EndpointDownError
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.ledger import LedgerError
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.stages.filtering import _benchmarks
from nemotron4.synth.writer import Ledger
from tests.synth.conftest import PIPELINE, Bench, ServerThread

MakeRecipe = Callable[..., SynthRecipe]


def replaced(name: str, **changes: Any) -> list[dict[str, Any]]:
    """The pipeline with one stage changed."""
    return [stage | changes if stage["name"] == name else stage for stage in PIPELINE]


def test_a_run_makes_the_asked_numbers_and_the_books_balance(bench: Bench, recipe: MakeRecipe) -> None:
    outcome = bench.run(recipe())
    accounting = bench.accounting(recipe())
    assert outcome.ending == "finished"
    assert [accounting.stage(name).rows_made for name in ("macro", "sub", "open")] == [4, 12, 60]
    assert accounting.stage("respond").rows_made == 60 - accounting.stage("dedup").filtered.get(
        "duplicate", 0
    )
    assert outcome.calls == bench.model.calls == accounting.total("calls")
    assert accounting.num_pending == 0


def test_a_finished_run_makes_no_further_call(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    before = bench.rows("judge")
    assert bench.run(recipe()).calls == 0
    assert bench.rows("judge") == before


def test_two_runs_give_the_same_rows_whatever_fails_on_the_way(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    smooth = {stage["name"]: bench.rows(stage["name"]) for stage in PIPELINE}
    other = Bench(bench.folder / "other")
    rates = {"rate_limit": 0.1, "server_error": 0.1, "connection": 0.05, "timeout": 0.05}
    other.run(recipe(), FakeBehaviour(failure_rates=rates, latency_s=0.001, latency_spread=1.0))
    assert {stage["name"]: other.rows(stage["name"]) for stage in PIPELINE} == smooth
    assert other.accounting(recipe()).total("calls_failed") > 0


def test_a_budget_of_calls_stops_cleanly_and_a_larger_one_goes_on(bench: Bench, recipe: MakeRecipe) -> None:
    outcome = bench.run(recipe(budget={"calls": 30}))
    assert (outcome.ending, outcome.calls, bench.model.calls) == ("stopped", 30, 30)
    assert "30 calls" in outcome.reason
    assert bench.accounting(recipe()).num_pending > 0
    rest = bench.run(recipe())
    assert rest.ending == "finished"
    whole = Bench(bench.folder / "whole")
    assert whole.run(recipe()).calls == rest.calls + 30
    assert whole.rows("judge") == bench.rows("judge")


def test_budgets_of_tokens_and_money_count_over_all_starts(bench: Bench, recipe: MakeRecipe) -> None:
    priced = {"gen": {"form": "fake", "price_in": 1000.0, "price_out": 1000.0, "max_in_flight": 1}}
    assert "tokens" in bench.run(recipe(endpoint=priced, budget={"tokens": 3000})).reason
    accounting = bench.accounting(recipe())
    spent = accounting.total("prompt_tokens") + accounting.total("completion_tokens")
    assert 3000 <= spent < 4000
    assert accounting.total("money") == pytest.approx(spent / 1000)
    assert bench.run(recipe(endpoint=priced, budget={"money": 2.0})).calls == 0


def test_one_hopeless_prompt_costs_one_record(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    victim = next(iter(bench.rows("dedup").values()))["messages"][0][1]
    other = Bench(bench.folder / "other")
    other.run(recipe(), FakeBehaviour(hopeless=victim))
    accounting = other.accounting(recipe())
    assert accounting.stage("respond").failed == {"hopeless: bad_request": 1}
    assert len(other.rows("respond")) == len(bench.rows("respond")) - 1
    asked = sum(victim in str(request["messages"]) for request in other.model.requests)
    assert asked == 1


def test_what_may_pass_is_left_pending(bench: Bench, recipe: MakeRecipe) -> None:
    single = recipe(retry={"max_attempts": 1, "first_wait_s": 0.001})
    with pytest.raises(IncompleteError, match="left pending after 1 attempts each; the last: fake 503"):
        bench.run(single, FakeBehaviour(failure_rates={"server_error": 0.2}, seed=1))
    accounting = bench.accounting(single)
    assert accounting.num_failed == 0
    assert accounting.num_pending > 0
    assert bench.run(single).ending == "finished"
    assert bench.accounting(single).num_failed == 0


def test_failures_are_tried_again_only_when_asked(bench: Bench, recipe: MakeRecipe) -> None:
    single = recipe(retry={"max_attempts": 1, "first_wait_s": 0.001, "fail_transient": True})
    bench.run(single, FakeBehaviour(failure_rates={"server_error": 0.2}, seed=1))
    failed = bench.accounting(single).num_failed
    assert failed > 0
    assert bench.run(single).calls == 0
    ledger = Ledger(bench.folder / "ledger.sqlite")
    assert ledger.requeue_failed() == failed
    ledger.close()
    bench.run(single)
    assert bench.accounting(single).num_failed == 0


def test_changing_the_judge_redoes_the_judge_alone(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    num_pairs = len(bench.rows("respond"))
    answers = bench.rows("respond")
    outcome = bench.run(recipe(replaced("judge", max_tokens=99)))
    assert outcome.calls == 2 * num_pairs
    assert bench.rows("respond") == answers
    assert bench.accounting(recipe()).num_pending == 0


def test_changing_an_early_stage_redoes_all_below_it(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    bench.run(recipe(replaced("open", knobs={"n": 3})))
    assert bench.accounting(recipe()).stage("open").rows_made == 36
    fresh = Bench(bench.folder / "fresh")
    fresh.run(recipe(replaced("open", knobs={"n": 3})))
    assert fresh.rows("judge") == bench.rows("judge")


def test_a_change_back_is_answered_from_the_ledger(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    before = bench.rows("judge")
    bench.run(recipe(replaced("judge", max_tokens=99)))
    assert bench.run(recipe()).calls == 0
    assert bench.rows("judge") == before


def test_a_new_prompt_text_redoes_the_stages_that_use_it(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    book = bench.folder / "mine.toml"
    book.write_text('[subtopics]\nversion = 1\ntext = "Give {n} parts of {topic}."\n', encoding="utf-8")
    bench.run(recipe(prompts=str(book)))
    asked = Counter(request["messages"][0]["content"].split("\n")[0][:12] for request in bench.model.requests)
    assert "Name 4 broad" not in asked
    assert asked["Give 2 parts"] == 4


@pytest.mark.parametrize("kind", ["respond", "embed"])
def test_changed_fields_of_the_requests_ask_again(bench: Bench, recipe: MakeRecipe, kind: str) -> None:
    (bench.folder.parent / "p.jsonl").write_text('{"prompt": "tea"}\n{"prompt": "milk"}\n', encoding="utf-8")
    file = str(bench.folder.parent / "p.jsonl")
    stages = [
        {"name": "p", "kind": "prompt_file", "knobs": {"file": file, "task": "t"}},
        {"name": "out", "kind": kind, "takes": ["p"]},
    ]
    with ServerThread() as server:
        endpoint = {"url": server.url, "extra_body": {"dimensions": 8}}
        first = run_recipe(recipe(stages, endpoint={"gen": endpoint}), bench.folder)
        assert run_recipe(recipe(stages, endpoint={"gen": endpoint}), bench.folder).calls == 0
        endpoint["extra_body"] = {"dimensions": 4}
        assert run_recipe(recipe(stages, endpoint={"gen": endpoint}), bench.folder).calls == first.calls


def test_a_benchmark_file_with_more_items_is_looked_at_again(bench: Bench, recipe: MakeRecipe) -> None:
    text = "Why is the sky over the sea so often blue in the summer of this year?"
    (bench.folder.parent / "p.jsonl").write_text(f'{{"prompt": "{text}"}}\n', encoding="utf-8")
    file = bench.folder.parent / "bench.jsonl"
    stages = [
        {
            "name": "p",
            "kind": "prompt_file",
            "knobs": {"file": str(bench.folder.parent / "p.jsonl"), "task": "t"},
        },
        {"name": "out", "kind": "decontaminate", "takes": ["p"], "knobs": {"files": [str(file)]}},
    ]
    for content, number in (("Another text that has nothing to do with it.", 1), (text, 0)):
        file.write_text(f'{{"question": "{content}"}}\n', encoding="utf-8")
        _benchmarks.cache_clear()  # two starts are two processes
        bench.run(recipe(stages))
        assert len(bench.rows("out")) == number


def test_a_stage_added_later_gets_the_rows_that_exist(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe(PIPELINE[:4]))
    assert bench.run(recipe()).ending == "finished"
    whole = Bench(bench.folder / "whole")
    whole.run(recipe())
    assert whole.rows("judge") == bench.rows("judge")


def test_a_stage_taken_out_leaves_no_rows(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    shorter = recipe(PIPELINE[:4])
    assert bench.run(shorter).calls == 0
    assert bench.rows("judge") == {}
    bench.accounting(shorter)


def test_short_lists_are_topped_up_with_what_exists_shown(bench: Bench, recipe: MakeRecipe) -> None:
    def two_at_a_time(messages: Sequence[Message], sampling: Sampling) -> str:
        return "\n".join(scripted_reply(messages, sampling).splitlines()[:2])

    bench.run(recipe(PIPELINE[:1]), FakeBehaviour(script=two_at_a_time))
    assert len(bench.rows("macro")) == 4
    second = bench.model.requests[1]["messages"][0]["content"]
    shown = re.findall(r"^- (.*)$", second, re.MULTILINE)
    assert len(shown) == 2
    assert "numbered list of 2" in second


def test_a_list_that_stays_short_is_kept_and_counted(bench: Bench, recipe: MakeRecipe) -> None:
    script = lambda messages, sampling: "1. Tea\n2. Bread"  # noqa: E731
    bench.run(recipe(PIPELINE[:1]), FakeBehaviour(script=script))
    accounting = bench.accounting(recipe(PIPELINE[:1]))
    assert len(bench.rows("macro")) == 2
    assert accounting.stage("macro").counters["items_missing"] == 2


def test_a_model_converts_only_what_stands_in_the_reply(bench: Bench, recipe: MakeRecipe) -> None:
    def prose(messages: Sequence[Message], sampling: Sampling) -> str:
        if "word for word" in messages[0].content:
            return "- tea at noon\n- invented topic\n- old bread"
        return "I would choose tea at noon or perhaps old bread."

    bench.run(recipe(PIPELINE[:1]), FakeBehaviour(script=prose))
    assert sorted(row["topic"] for row in bench.rows("macro").values()) == ["old bread", "tea at noon"]


def test_no_list_at_all_fails_with_the_reply_in_the_reason(bench: Bench, recipe: MakeRecipe) -> None:
    script = lambda messages, sampling: "I cannot do that."  # noqa: E731
    with pytest.raises(IncompleteError, match="'macro': all of its 1 pieces of work failed: 1 content"):
        bench.run(recipe(), FakeBehaviour(script=script))
    accounting = bench.accounting(recipe())
    assert accounting.stage("macro").failed == {"content: no_list": 1}


def test_a_wrong_key_stops_the_run_and_keeps_the_work(bench: Bench, recipe: MakeRecipe) -> None:
    class Locked:
        name = "fake"

        def chat_request(self, messages: Any, sampling: Any) -> dict[str, Any]:
            return {}

        async def chat(self, messages: Any, sampling: Any) -> Any:
            from nemotron4.client import HopelessError

            raise HopelessError("401", kind="unauthorized", status=401)

        async def close(self) -> None: ...

    from nemotron4.synth.execute import run_recipe

    with pytest.raises(EndpointDownError, match="'gen': 401"):
        run_recipe(recipe(), bench.folder, models={"gen": Locked()})  # type: ignore[dict-item]
    assert bench.accounting(recipe()).stage("macro").pending == 1
    assert bench.run(recipe()).ending == "finished"


def test_an_endpoint_that_is_gone_stops_the_run_and_keeps_the_work(bench: Bench, recipe: MakeRecipe) -> None:
    patient = recipe(retry={"first_wait_s": 0.01, "max_wait_s": 0.02, "max_outage_s": 0.1})
    with pytest.raises(EndpointDownError, match="no connection for"):
        bench.run(patient, FakeBehaviour(failure_rates={"connection": 1.0}))
    assert bench.run(patient).ending == "finished"
    assert bench.accounting(patient).num_failed == 0


def test_retry_after_is_honoured(bench: Bench, recipe: MakeRecipe) -> None:
    behaviour = FakeBehaviour(failure_rates={"rate_limit": 0.2}, retry_after_s=0.02)
    assert bench.run(recipe(), behaviour).ending == "finished"


def test_a_bug_in_a_stage_stops_the_run_with_the_bug(bench: Bench, recipe: MakeRecipe) -> None:
    def broken(messages: Sequence[Message], sampling: Sampling) -> str:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        bench.run(recipe(), FakeBehaviour(script=broken))
    assert bench.run(recipe()).ending == "finished"


def test_only_one_process_writes_a_ledger(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe(PIPELINE[:1]))
    held = Ledger(bench.folder / "ledger.sqlite")
    with pytest.raises(LedgerError, match="in use by another run"):
        bench.run(recipe(PIPELINE[:1]))
    held.close()


def test_a_file_that_is_no_ledger_is_refused(bench: Bench, recipe: MakeRecipe) -> None:
    bench.folder.mkdir()
    (bench.folder / "ledger.sqlite").write_bytes(b"something else entirely" * 200)
    with pytest.raises(Nemotron4Error, match="cannot be used as a ledger"):
        bench.run(recipe())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a", "kind": "macro_topic"}], "unknown kind of stage 'macro_topic'"),
        ([{"name": "a", "kind": "respond"}], "must take at least one stage"),
        ([{"name": "a", "kind": "macro_topics", "knobs": {"m": 3}}], "unknown key 'm'"),
        ([{"name": "a", "kind": "macro_topics", "knobs": {"n": 0}}], "expected 1 or more"),
        (
            [*PIPELINE[:1], {"name": "b", "kind": "respond", "takes": ["macro"]}],
            "takes Prompt rows, but 'macro'",
        ),
        (
            [*PIPELINE[:3], {"name": "b", "kind": "exact_dedup", "takes": ["open"], "temperature": 1}],
            "no calls",
        ),
        ([*PIPELINE[:1], {"name": "b", "kind": "subtopics", "takes": ["makro"]}], "did you mean 'macro'"),
    ],
)
def test_a_wrong_recipe_names_the_stage_and_the_reason(
    bench: Bench, recipe: MakeRecipe, stages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.run(recipe(stages))


def test_a_preview_works_on_few_records_of_each_stage(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe(), stage_limit=2)
    accounting = bench.accounting(recipe())
    assert all(
        stage.done + sum(stage.filtered.values()) <= 2 or stage.name == "dedup" for stage in accounting.stages
    )
    assert accounting.stage("respond").done == 2


def test_progress_is_told_as_every_command_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "json")
    path = Path(__file__).parents[2] / "recipes" / "fake" / "synth.toml"
    assert main(["synth", "run", str(path), "--out", str(tmp_path / "run"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    last = next(line for line in reversed(lines) if "done" in line)
    assert (last["name"], last["unit"], last["failed"]) == ("fake", "rows", 0)
    assert last["done"] == sum(last["stages"].values()) > 100
    assert last["calls"] > 100
