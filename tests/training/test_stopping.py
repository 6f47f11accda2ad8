"""SIGTERM while a judge hangs, in real runs on tiny models, and the switch alone."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.training import run
from nemotron4.training.rewards import FunctionJudge
from nemotron4.training.rollout_settings import RewardSource
from nemotron4.training.rollouts import RolloutBackend
from nemotron4.training.stopping import StepStoppedError, StopSwitch
from tests import tiny_models
from tests.training.test_policy_gradient import make, metrics, prompts

HANGS = """import os, pathlib, signal, time
def score(answers):
    if pathlib.Path({flag!r}).exists():
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    return [len(answer) for answer in answers]
"""


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_sigterm_while_a_judge_hangs_saves_and_ends_and_the_run_goes_on_as_if_never_stopped(
    tmp_path: Path, moment: str
) -> None:
    flag = tmp_path / "hang"
    (tmp_path / "rewards.py").write_text(HANGS.format(flag=str(flag)))
    source = RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score")

    def connect(recipe: object, base: object) -> RolloutBackend:
        stop = StopSwitch(grace_s=0.1)
        return RolloutBackend(RolloutEngine(base), FunctionJudge(source, stop), stop)  # type: ignore[arg-type]

    start = tiny_models.nemotron_directory(tmp_path / "start")
    more: dict = {"data": {"validation": [str(prompts(tmp_path))]}, "run": {"validate_every": 1}}

    def trained(name: str, hangs_after: int = 0) -> run.Summary:
        recipe = make(
            tmp_path,
            start,
            "grpo",
            name=name,
            **(more if moment == "validation" else {"run": {"save_every": 9}}),
        )
        return run.train(
            recipe,
            connect=connect,
            on_progress=lambda p: flag.touch() if p.step == hangs_after and p.kind == "train" else None,
        )

    trained("whole")
    started = time.monotonic()
    stopped = trained("cut", hangs_after=1)
    assert time.monotonic() - started < 30
    assert (stopped.steps, stopped.output) == (1, None)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000001"]
    flag.unlink()
    assert trained("cut").steps == 2
    for kind in ("train", "validation"):
        whole, cut = (metrics(tmp_path / name, kind) for name in ("whole", "cut"))
        assert [(line["step"], line["reward"]) for line in cut] == [
            (line["step"], line["reward"]) for line in whole
        ]


def test_what_ends_within_the_grace_gives_its_result_and_a_later_wait_has_none() -> None:
    switch = StopSwitch(grace_s=0.3)

    async def work(seconds: float) -> str:
        threading.Timer(0.05, switch.set).start()
        await asyncio.sleep(seconds)
        return "done"

    assert asyncio.run(switch.wait(work(0.15))) == "done"
    assert switch.is_set()
    with pytest.raises(StepStoppedError):
        asyncio.run(switch.wait(work(60)))
