"""What was paid counts, what may pass stays pending, what is broken stops the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeChatModel
from nemotron4.client.retry import RateLimit
from nemotron4.errors import Nemotron4Error
from nemotron4.records import JsonObject
from nemotron4.runs import IncompleteError
from nemotron4.synth.endpoint import EndpointDownError, ModelEndpoint
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.recipe import EndpointConfig, RetryConfig, SynthRecipe
from tests.synth.conftest import Bench, ServerThread, make_recipe

NULL = orjson.dumps({"choices": [{"message": {"content": None}}], "usage": {"prompt_tokens": 10}})
TOPICS = [f"topic {i}" for i in range(40)]
STAGES: list[dict[str, Any]] = [
    {"name": "topics", "kind": "given_topics", "knobs": {"topics": TOPICS}},
    {"name": "open", "kind": "open_questions", "takes": ["topics"], "knobs": {"n": 1}},
]
PATIENCE = {"first_wait_s": 0.01, "max_wait_s": 0.05, "max_attempts": 4, "max_outage_s": 0.3}


def said(content: Any, **message: Any) -> bytes:
    return orjson.dumps({"choices": [{"message": {"content": content, **message}, "finish_reason": "stop"}]})


def recipe_at(url: str, **fields: Any) -> SynthRecipe:
    return make_recipe(**({"stages": STAGES, "endpoint": {"gen": {"url": url}}, "retry": PATIENCE} | fields))


def always(body: bytes, status: int = 200, wait: float | None = None) -> Callable[..., Any]:
    return lambda number, request: (status, body, wait)


def test_a_budget_of_two_calls_makes_two_calls_over_any_number_of_starts(bench: Bench) -> None:
    with ServerThread(odd=always(NULL)) as server:
        recipe = recipe_at(server.url, budget={"calls": 2})
        for _ in range(4):
            assert run_recipe(recipe, bench.folder).ending == "stopped"
    assert server.number == 2
    accounting = bench.accounting(recipe)
    assert (accounting.total("calls"), accounting.total("prompt_tokens")) == (2, 20)


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"choices": [{"message": {"content": "\\ud800"}}]}', b'{"error": {"code": 503}}']
)
def test_what_cannot_be_used_is_counted_and_asked_for_again(bench: Bench, body: bytes) -> None:
    def odd(number: int, request: JsonObject) -> tuple[int, bytes, float | None] | None:
        return (200, body, None) if number % 2 else None

    with ServerThread(odd=odd) as server:
        recipe = recipe_at(server.url, endpoint={"gen": {"url": server.url, "max_in_flight": 1}})
        assert run_recipe(recipe, bench.folder).ending == "finished"
    accounting = bench.accounting(recipe)
    assert accounting.num_failed == 0
    assert accounting.total("calls") == server.number == 80
    assert accounting.total("calls_unusable") == 40


def test_the_shards_of_a_small_budget_do_not_spend_more_together(bench: Bench) -> None:
    with ServerThread(odd=always(NULL)) as server:
        recipe = recipe_at(server.url, budget={"calls": 2})
        for index in range(4):
            run_recipe(recipe, bench.folder / str(index), shard=(index, 4))
    assert server.number == 2


def test_a_used_up_quota_stops_with_the_work_pending(bench: Bench) -> None:
    body = orjson.dumps({"error": {"code": "insufficient_quota", "message": "check your plan"}})
    with ServerThread(odd=lambda n, request: (429, body, None) if n > 10 else None) as server:
        recipe = recipe_at(server.url)
        with pytest.raises(EndpointDownError, match="insufficient_quota"):
            run_recipe(recipe, bench.folder)
    accounting = bench.accounting(recipe)
    assert (accounting.num_failed, accounting.stage("open").done) == (0, 10)


def test_a_key_that_is_revoked_under_way_stops_with_the_work_pending(bench: Bench) -> None:
    with ServerThread(odd=lambda n, request: (401, b"{}", None) if n > 10 else None) as server:
        recipe = recipe_at(server.url)
        with pytest.raises(EndpointDownError, match="401"):
            run_recipe(recipe, bench.folder)
    assert bench.accounting(recipe).num_failed == 0


def test_an_outage_that_passes_costs_nothing(bench: Bench) -> None:
    with ServerThread(odd=lambda n, request: (503, b"{}", None) if 10 < n < 60 else None) as server:
        recipe = recipe_at(server.url, retry=PATIENCE | {"max_outage_s": 30.0})
        assert run_recipe(recipe, bench.folder).ending == "finished"
    assert bench.accounting(recipe).num_failed == 0


def test_an_outage_that_lasts_stops_with_the_work_pending(bench: Bench) -> None:
    with ServerThread(odd=lambda n, request: (503, b"{}", None) if n > 10 else None) as server:
        recipe = recipe_at(server.url)
        with pytest.raises(EndpointDownError, match="no success for"):
            run_recipe(recipe, bench.folder)
    accounting = bench.accounting(recipe)
    assert (accounting.num_failed, accounting.num_pending) == (0, 30)


def test_too_large_a_share_of_failures_stops_the_run(bench: Bench) -> None:
    with ServerThread(odd=lambda n, request: (400, b"no", None) if n % 3 else None) as server:
        recipe = recipe_at(server.url, retry=PATIENCE | {"max_failure_share": 0.4})
        with pytest.raises(IncompleteError, match="pieces of work failed; the last: hopeless"):
            run_recipe(recipe, bench.folder)
        assert server.number < 40
    assert bench.accounting(recipe).num_pending > 0


def test_a_run_in_which_everything_failed_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    with ServerThread(odd=always(b"no", 400)) as server:
        recipe.write_text(
            f'name = "a"\n[endpoint.gen]\nurl = "{server.url}"\n[[stage]]\nname = "t"\n'
            'kind = "macro_topics"\n', encoding="utf-8",
        )  # fmt: skip
        assert main(["synth", "run", str(recipe), "--out", str(tmp_path / "run")]) == 1
    assert "error: stage 't': all of its 1 pieces of work failed" in capsys.readouterr().err


def test_a_long_wait_is_told_and_ends_with_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    with ServerThread(odd=always(b"{}", 429, 86400.0)) as server:
        recipe.write_text(
            f'name = "a"\n[endpoint.gen]\nurl = "{server.url}"\n[[stage]]\nname = "t"\n'
            'kind = "macro_topics"\n', encoding="utf-8",
        )  # fmt: skip
        command = ["-m", "nemotron4", "synth", "run", str(recipe), "--out", str(tmp_path / "run")]
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            while "asks to wait 86,400 s" not in (line := process.stderr.readline()):
                assert line.startswith("note:"), line
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=100)  # a day without the signal; a loaded machine takes seconds
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 143


def test_thoughts_become_neither_prompts_nor_rows(bench: Bench) -> None:
    def odd(number: int, request: JsonObject) -> tuple[int, bytes, float | None]:
        if number % 2:
            return 200, said("<think>First I consider cats."), None
        return 200, said("<think>cats</think>\n\n1. What do dogs eat?", reasoning_content="hm"), None

    stages = [STAGES[0] | {"knobs": {"topics": ["dogs"]}}, STAGES[1],
              {"name": "answer", "kind": "respond", "takes": ["open"]}]  # fmt: skip
    with ServerThread(odd=odd) as server:
        recipe = recipe_at(server.url, stages=stages)
        run_recipe(recipe, bench.folder)
    rows = [*bench.rows("open").values(), *bench.rows("answer").values()]
    assert [row["messages"] for row in bench.rows("open").values()] == [[["user", "What do dogs eat?"]]]
    assert "cats" not in str(rows)
    assert "think" not in str(rows)


def test_content_in_parts_becomes_its_text(bench: Bench) -> None:
    with ServerThread(odd=always(said([{"type": "text", "text": "1. What is tea?"}]))) as server:
        recipe = recipe_at(server.url, stages=[STAGES[0] | {"knobs": {"topics": ["tea"]}}, STAGES[1]])
        run_recipe(recipe, bench.folder)
    assert [row["messages"][0][1] for row in bench.rows("open").values()] == ["What is tea?"]


def test_requests_and_tokens_per_minute_are_kept() -> None:
    limit = RateLimit(requests=2, tokens=1000)
    assert limit.wait_s(0.0, 0) == 0
    limit.started(0.0)
    limit.spent(1.0, 100)
    limit.started(2.0)
    assert limit.wait_s(10.0, 0) == 50.0  # the first request is a minute old then
    assert limit.wait_s(60.0, 0) == 0
    limit.spent(60.5, 850)
    assert limit.wait_s(60.5, 0) == 0.5  # 950 of 1000 are spent, a call takes 475 in the mean
    assert limit.wait_s(61.5, 0) == 59.0
    assert limit.wait_s(121.0, 0) == 0


def test_a_limit_per_minute_lets_every_call_through(bench: Bench) -> None:
    with ServerThread() as server:
        limited = {"gen": {"url": server.url, "requests_per_minute": 1000, "tokens_per_minute": 100_000}}
        assert run_recipe(recipe_at(server.url, endpoint=limited), bench.folder).ending == "finished"
    with pytest.raises((ValueError, Nemotron4Error), match="expected 0"):
        recipe_at("http://127.0.0.1:1", endpoint={"gen": {"form": "fake", "requests_per_minute": -1}})


def test_half_an_answer_of_a_content_filter_is_paid_and_asked_for_again(bench: Bench) -> None:
    cut = {"message": {"content": "1. Why is"}, "finish_reason": "content_filter"}

    def odd(number: int, request: JsonObject) -> tuple[int, bytes, float | None] | None:
        return (200, orjson.dumps({"choices": [cut]}), None) if number == 1 else None

    stages = [{"name": "topics", "kind": "given_topics", "knobs": {"topics": ["tea"]}}, STAGES[1]]
    with ServerThread(odd=odd) as server:
        recipe = recipe_at(server.url, stages=stages)
        assert run_recipe(recipe, bench.folder).calls == 2
    assert bench.accounting(recipe).total("calls_unusable") == 1
    assert "Why is" not in [row["messages"][0][1] for row in bench.rows("open").values()]


def test_shards_share_the_limits_per_minute_of_an_endpoint() -> None:
    config = EndpointConfig(form="fake", requests_per_minute=10)
    for num_shards, started in ((1, 10), (4, 2), (20, 1)):
        endpoint = ModelEndpoint("gen", config, FakeChatModel(), RetryConfig(), num_shards=num_shards)
        for number in range(20):
            if endpoint._rate.wait_s(0.0, 0):
                assert number == started
                break
            endpoint._rate.started(0.0)


def test_a_budget_of_tokens_that_nobody_tells_is_said(bench: Bench) -> None:
    told: list[str] = []
    with ServerThread(odd=always(said("1. Why is tea green?\n"))) as server:
        run_recipe(recipe_at(server.url, budget={"tokens": 10**6}), bench.folder, notice=told.append)
    assert sum("does not tell tokens" in line for line in told) == 1
