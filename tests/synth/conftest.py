"""Recipes on the shipped fake, small enough to run in a moment."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4 import config
from nemotron4.client import FakeBehaviour, FakeChatModel
from nemotron4.client.fake_server import FakeServer
from nemotron4.synth.accounting import Accounting, read_accounting
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.runner import RunOutcome

PIPELINE: list[dict[str, Any]] = [
    {"name": "macro", "kind": "macro_topics", "knobs": {"n": 4}},
    {"name": "sub", "kind": "subtopics", "takes": ["macro"], "knobs": {"n": 2}},
    {"name": "open", "kind": "open_questions", "takes": ["sub"], "knobs": {"n": 5}},
    {"name": "dedup", "kind": "exact_dedup", "takes": ["open"]},
    {"name": "respond", "kind": "respond", "takes": ["dedup"], "knobs": {"k": 2}},
    {"name": "judge", "kind": "judge_llm", "takes": ["respond"]},
]


def make_recipe(stages: Sequence[dict[str, Any]] = PIPELINE, **fields: Any) -> SynthRecipe:
    """A recipe on one fake endpoint; fields replace the recipe's."""
    values: dict[str, Any] = {
        "name": "test",
        "stage": list(stages),
        "endpoint": {"gen": {"form": "fake"}},
        "durable": "kill",
        "retry": {"first_wait_s": 0.001, "max_wait_s": 0.01},
        "export": {"preference": [s["name"] for s in stages if s["kind"].startswith("judge")]},
    }
    return config.build(SynthRecipe, values | fields)


def assert_counters_are_true(path: Path) -> None:
    """The ledger counts as it goes; here everything is counted again."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        for table, columns in (("record", "stage"), ("work", "stage, state, coalesce(class, '')")):
            counted = set(db.execute(f"SELECT * FROM {table}_count WHERE number"))
            assert counted == set(db.execute(f"SELECT {columns}, count(*) FROM {table} GROUP BY {columns}"))


class Bench:
    """Runs recipes in one folder and reads what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = FakeChatModel()

    def run(self, recipe: SynthRecipe, behaviour: FakeBehaviour | None = None, **options: Any) -> RunOutcome:
        self.model = FakeChatModel(behaviour, keep_requests=True)
        return run_recipe(recipe, self.folder, models={"gen": self.model}, **options)

    def accounting(self, recipe: SynthRecipe) -> Accounting:
        with Reader(self.folder / "ledger.sqlite") as ledger:
            accounting = read_accounting(ledger, recipe)
        assert accounting.is_balanced
        assert_counters_are_true(self.folder / "ledger.sqlite")
        return accounting

    def rows(self, stage: str) -> dict[bytes, Any]:
        with Reader(self.folder / "ledger.sqlite") as ledger:
            return {record: ledger.payload(record) for record in ledger.records_of(stage)}


class ServerThread:
    """A fake server with its own event loop, watched from the test's thread."""

    def __init__(self, behaviour: FakeBehaviour | None = None, **options: Any) -> None:
        self.server = FakeServer(behaviour, **options)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self._ready.wait()
        return self.server

    async def _serve(self) -> None:
        async with self.server:
            self._ready.set()
            await self._end.wait()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run")


@pytest.fixture
def recipe() -> Callable[..., SynthRecipe]:
    return make_recipe
