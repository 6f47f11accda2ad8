"""Shards in local processes and on Ray give the files of one process, also after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour, FakeChatModel
from nemotron4.errors import ConfigError
from nemotron4.synth.accounting import read_accounting
from nemotron4.synth.check import check
from nemotron4.synth.execute import of_shards, run_recipe
from nemotron4.synth.export import export
from nemotron4.synth.ledger import Reader
from nemotron4.synth.merge import merge
from nemotron4.synth.recipe import LEDGER, Budget, SynthRecipe
from nemotron4.synth.shards import run_shards
from tests.synth.conftest import make_recipe


def recipe(num_topics: int = 6, **endpoint: object) -> SynthRecipe:
    stages = [
        {
            "name": "topics",
            "kind": "given_topics",
            "knobs": {"topics": [f"topic {i}" for i in range(num_topics)]},
        },
        {"name": "open", "kind": "open_questions", "takes": ["topics"], "knobs": {"n": 4}},
        {"name": "unique", "kind": "near_dedup", "takes": ["open"]},
    ]
    return make_recipe(stages, endpoint={"gen": {"form": "fake", **endpoint}}, export={"prompts": ["unique"]})


def files_of(folder: Path, made: SynthRecipe) -> bytes:
    return (export(folder, made).folder / "prompts.jsonl").read_bytes()


def test_local_workers_give_the_rows_of_one_process(tmp_path: Path) -> None:
    made = recipe()
    run_recipe(made, tmp_path / "one")
    run_shards(made, tmp_path / "two", 2)
    assert files_of(tmp_path / "one", made) == files_of(tmp_path / "two", made)
    told = of_shards(sorted((tmp_path / "two" / "shards").iterdir()), made)
    assert (told.calls, told.done["open"], told.failed) == (6, 6, 0)


def test_what_shards_pay_for_after_a_merge_is_not_paid_again(tmp_path: Path) -> None:
    run_shards(recipe(), tmp_path / "two", 2)
    stages = recipe().stage
    warmer = dataclasses.replace(stages[1], temperature=0.3)
    changed = dataclasses.replace(recipe(), stage=(stages[0], warmer, stages[2]))
    assert run_shards(changed, tmp_path / "two", 2).calls == 0  # by the merged run itself
    with Reader(tmp_path / "two" / LEDGER) as ledger:
        assert read_accounting(ledger, changed).total("calls") == 12
    run_recipe(changed, tmp_path / "one")
    assert files_of(tmp_path / "one", changed) == files_of(tmp_path / "two", changed)


def test_shards_share_the_budget(tmp_path: Path) -> None:
    made = dataclasses.replace(recipe(40), budget=Budget(calls=8))
    assert [run_recipe(made, tmp_path / str(i), shard=(i, 2)).calls for i in range(2)] == [4, 4]


def test_a_shard_stays_the_shard_that_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe()
    calls = run_recipe(made, tmp_path, shard=(0, 2)).calls
    assert 0 < calls < 6
    with pytest.raises(ConfigError, match="is shard 0/2 of its run; given 0/1"):
        run_recipe(made, tmp_path)
    assert main(["synth", "retry", str(tmp_path)]) == 0
    assert f"spent: {calls} calls" in capsys.readouterr().out  # not those of the others
    assert main(["synth", "retry", str(tmp_path), "--stage", "opn"]) == 1
    assert "did you mean 'open'?" in capsys.readouterr().err


def test_a_model_in_this_process_is_not_sharded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each worker would load the model"):
        run_shards(recipe(form="local"), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_tasks_give_the_rows_of_one_process_also_when_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    made = recipe(60, fake_latency_ms=300, max_in_flight=4)
    run_recipe(recipe(60), tmp_path / "one")
    killed: list[int] = []

    def kill_one_worker() -> None:
        """The process that holds a shard's ledger, once that has replies."""
        lock = tmp_path / "ray" / "shards" / "0000-of-0002" / "ledger.lock"
        ledger = lock.with_name("ledger.sqlite-wal")
        while not ledger.exists() or ledger.stat().st_size < 100_000:
            time.sleep(0.05)
        for process in Path("/proc").iterdir():
            try:
                held = [os.readlink(link) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if str(lock) in held and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))

    threading.Thread(target=kill_one_worker, daemon=True).start()
    run_shards(made, tmp_path / "ray", 2, executor="ray")
    assert killed
    assert files_of(tmp_path / "one", made) == files_of(tmp_path / "ray", made)


def test_shards_that_failed_on_the_way_give_the_rows_of_one_process(tmp_path: Path) -> None:
    """Stopped by a budget, in trouble a tenth of the time, started again: the simulation of
    ``benchmarks/synth/shards.py`` with 1,000 shards, small."""
    prompts = tmp_path / "p.jsonl"
    texts = [f"What is the {name} of {thing}?" for name in ("use", "cost", "age") for thing in range(20)]
    lines = [json.dumps({"prompt": text}) for text in [*texts, *(f"{text} Please." for text in texts[:10])]]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(prompts), "task": "t"}},
        {"name": "near", "kind": "near_dedup", "takes": ["in"]},
        {"name": "answer", "kind": "respond", "takes": ["near"]},
        {"name": "judge", "kind": "judge_llm", "takes": ["answer"]},
    ]
    recipe = make_recipe(stages)
    run_recipe(recipe, tmp_path / "one", models={"gen": FakeChatModel()})
    rates = {"rate_limit": 0.05, "server_error": 0.05}
    shards = [tmp_path / f"shard-{i}" for i in range(6)]
    for i, shard in enumerate(shards):
        for calls in (6, 60, 0):
            model = FakeChatModel(FakeBehaviour(failure_rates=rates, seed=i))
            limited = dataclasses.replace(recipe, budget=Budget(calls=calls))
            run_recipe(limited, shard, models={"gen": model}, shard=(i, 6))
    merge(shards[::-1], tmp_path / "merged", check(recipe))
    run_recipe(recipe, tmp_path / "merged", models={"gen": FakeChatModel()})
    one, merged = (export(tmp_path / name, recipe).folder for name in ("one", "merged"))
    for name in ("preference.jsonl", "accounting.json"):
        assert (one / name).read_bytes() == (merged / name).read_bytes()
