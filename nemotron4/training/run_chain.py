"""The stages of a chain run in order; one stage is a chain of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from nemotron4.checkpoint.adapter_base import BASE_FILE
from nemotron4.training import checks, parallel
from nemotron4.training.cache import file_hash
from nemotron4.training.inputs import RECORD_FILE
from nemotron4.training.metrics import OnPart, StepRecord, hear_nothing
from nemotron4.training.reading import HUB
from nemotron4.training.recipe import Recipe, as_plain
from nemotron4.training.rewards import connect as connect_rewards
from nemotron4.training.rollouts import Connect
from nemotron4.training.run import Summary, pick_device, train


def run(
    stages: Sequence[Recipe],
    *,
    note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[StepRecord], None] = lambda progress: None,
    on_part: OnPart = hear_nothing,
    connect: Connect = connect_rewards,
) -> Summary:
    """Run the stages in order, passing over finished ones; the summary is the last one's that ran."""
    summary: Summary | None = None
    with parallel.launch(pick_device(stages[0].model.device)):
        tell = note if parallel.is_first() else lambda text: None
        first = checks.check(stages)[0]
        has_trained = False  # then what comes after is made of another model, or says that it is not
        for place, recipe in enumerate(stages):
            if len(stages) > 1:
                tell(f"stage {place + 1} of {len(stages)}: {recipe.stage}, in {recipe.run.directory}")
            is_last = place + 1 == len(stages)
            if not is_last and not has_trained and is_finished(recipe):
                tell("finished before")
                continue
            has_trained = True
            summary = train(
                recipe,
                note=note,
                on_progress=on_progress,
                on_part=on_part,
                connect=connect,
                opened=(first.base, first.read) if place == 0 and first.base and first.read else None,
            )
            if summary.output is None:
                break
    assert summary is not None, "the last stage always runs"
    return summary


def is_finished(recipe: Recipe) -> bool:
    """True if this very recipe, on these very files, has left its output."""
    output = recipe.output_folder
    record = recipe.run.directory / RECORD_FILE
    name = "manifest.json" if recipe.adapter is None else BASE_FILE
    if not (output / name).is_file() or not record.is_file():
        return False
    values = json.loads(record.read_text(encoding="utf-8"))
    if values["recipe"] != json.loads(json.dumps(as_plain(recipe))):
        return False
    return all(_has_hash(Path(path), known) for path, known in values["inputs"].items())


def _has_hash(path: Path, known: str) -> bool:
    if str(path).startswith(HUB):
        return known == str(path)
    if not path.is_file():
        return False
    return file_hash(path) == known
