"""A judge that is held to a form gives a verdict in every case."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron4.client import EngineChatModel
from nemotron4.errors import ConfigError
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.options import Changes, settable, with_changes
from nemotron4.evaluation.own import open_folder
from nemotron4.evaluation.result import result_name
from nemotron4.evaluation.tasks.arena_hard import ARENA_HARD
from nemotron4.evaluation.tasks.mt_bench import MT_BENCH
from nemotron4.grading import judgments
from nemotron4.grading.score import Score
from nemotron4.inference.fake import FakeEngine
from nemotron4.text.prompt import nemotron4
from tests.evaluation.test_own import write

JUDGED = 'name = "mine"\nprompt = "{q}"\ngrader = "judge"\nrubric = "Is it short?"\n'


@pytest.mark.parametrize("verdict", ["text", "choice"])
def test_a_weak_judge_gives_a_verdict_in_every_case(tmp_path: Path, verdict: str) -> None:
    write(tmp_path / "mine", JUDGED, [{"q": str(n)} for n in range(8)])
    task = with_changes(open_folder(tmp_path / "mine"), Changes(settings=(f"verdict={verdict}",)))
    assert task.judge is not None
    source = DataSource(tmp_path)
    items = task.load(source)
    asked = task.judge(items, {item.id: ("yes",) for item in items}, source)
    judge = EngineChatModel(FakeEngine(prompt_format=nemotron4(), context_length=4096))  # it writes noise

    async def replies() -> list[str]:
        short = [(one.messages, replace(one.sampling, max_tokens=32)) for one in asked]
        return [(await judge.chat(*each)).text for each in short]

    scores = [judgments.rating(text) for text in asyncio.run(replies())]
    assert [score.is_scored for score in scores] == [verdict == "choice"] * 8
    assert ("verdict choice" in result_name(task, None)) == (verdict == "choice")


def test_every_form_is_a_verdict_that_can_be_read() -> None:
    assert [judgments.rating(text).value for text in MT_BENCH.verdicts] == list(range(1, 11))
    assert not any(isinstance(judgments.verdict(text, 1), Score) for text in ARENA_HARD.verdicts)
    assert settable(ARENA_HARD) == {"verdict": "text"}
    with pytest.raises(ConfigError, match="verdict is 'regex'; expected text or choice"):
        with_changes(ARENA_HARD, Changes(settings=("verdict=regex",)))
