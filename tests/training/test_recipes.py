"""The shipped recipes are what the strict loader accepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nemotron4.errors import ConfigError
from nemotron4.training import chain
from nemotron4.training import recipe as recipes
from nemotron4.training.trainer import plan_steps

FOLDER = Path(__file__).parents[2] / "recipes"
OTHERS = {"synth.toml", "rounds.toml", "rounds_data.toml"}  # recipes of `nemotron4 synth`
SHIPPED = sorted(path for path in FOLDER.rglob("*.toml") if path.name not in OTHERS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_recipe_loads(path: Path) -> None:
    for recipe in chain.load(path):
        assert recipe.run.directory.parts[0] == "runs"


def test_the_published_values_are_the_reports() -> None:
    code, general, dpo, rpo, reward = (
        recipes.load(FOLDER / "nemotron4-340b" / f"{name}.toml")
        for name in ("code-sft", "general-sft", "dpo", "rpo", "reward")
    )
    assert (code.optimizer.learning_rate, code.batch.global_size, code.run.epochs) == (3e-7, 128, 1)
    assert (general.batch.global_size, general.run.epochs) == (128, 3)
    assert 1e-7 <= general.optimizer.learning_rate <= 5e-7
    assert 3e-4 <= dpo.settings.beta <= 3e-3
    assert 3e-8 <= dpo.optimizer.learning_rate <= 3e-7
    assert dpo.batch.global_size == 256
    assert (rpo.settings.eta, rpo.settings.sft_weight, rpo.optimizer.learning_rate) == (1.0, 1e-5, 3e-7)
    assert (reward.optimizer.learning_rate, reward.batch.global_size, reward.run.epochs) == (7e-7, 128, 2)


def test_the_base_is_trained_on_8_trillion_tokens_in_the_reports_steps() -> None:
    recipe = recipes.load(FOLDER / "nemotron4-340b" / "pretrain.toml")
    sizes = plan_steps(recipe, num_samples=1).sizes
    assert recipe.data.max_length * sum(sizes) == pytest.approx(8e12, rel=1e-6)
    # Table 2 of the report: 200 B tokens at 768 and at 1,536 sequences, 7,600 B at 2,304.
    tokens = {size: recipe.data.max_length * size * num for size, num in Counter(sizes).items()}
    assert tokens == pytest.approx({768: 2e11, 1536: 2e11, 2304: 7.6e12}, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preference.beta=0", "beta is 0"),
        ("run.max_steps=3", "exactly one of max_steps and epochs"),
        ("reward.objective=regression", "no meaning in stage preference"),
        ("batch.ramp=[[9, 1], [3, 2]]", "ascending"),
        ("model.preset=nano", "exactly one of start and preset"),
        ("adapter.kind=lorra", "adapter.kind is 'lorra'"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("batch.row_tokens=1000", r"data.max_length \(1024\) is above batch.row_tokens \(1000\)"),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_runs(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.load(FOLDER / "smollm2" / "dpo.toml", [change])
