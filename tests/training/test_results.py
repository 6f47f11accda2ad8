"""What a run leaves and how it goes on: results, early stops, checkpoints as models, settings named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.cli.main import main
from nemotron4.errors import ConfigError
from nemotron4.training import run
from nemotron4.training.recipe import OptimizerSection, Recipe, build
from nemotron4.training.sampler import SAMPLES_FILE, Samples
from nemotron4.training.schedule import learning_rate, plan_steps
from tests import tiny_models

TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("start"))


def chats(path: Path, num: int, answer: str = "It is {}.") -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": answer.format(2 * i)},
            ]
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(folder: Path, start: Path, /, *, num: int = 8, **more: object) -> Recipe:
    values: dict = {
        "stage": "sft",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [chats(folder / "chats.jsonl", num)], "max_length": 128},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 256},
        "run": {"directory": str(folder / "run"), "max_steps": 4, "save_every": 1},
    }
    for name, value in more.items():
        old = values.get(name)
        values[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    values["run"] = {name: value for name, value in values["run"].items() if value is not None}
    return build(values)


def logits(model: object) -> torch.Tensor:
    module, _ = load_transformer(open_checkpoint(model), dtype=torch.float32)  # type: ignore[arg-type]
    with torch.no_grad():
        found: torch.Tensor = module(TOKENS)
    return found


def overfitting(folder: Path, **settings: object) -> dict:
    """A run whose validation, on other answers, soon gets worse."""
    validation = chats(folder / "validation.jsonl", 4, "No {} at all, sir; ask somebody else.")
    return {
        "data": {"validation": [validation]},
        "optimizer": {"learning_rate": 2e-2},
        "run": {"validate_every": 1, "max_steps": 8, "keep_checkpoints": 1, **settings},
    }


def validation_losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}


def test_the_result_is_the_best_step_where_the_recipe_asks(tmp_path: Path, start: Path) -> None:
    more = overfitting(tmp_path, result="best")
    summary = run.train(recipe(tmp_path, start, **more))
    found = validation_losses(tmp_path)
    best = min(found, key=found.__getitem__)
    assert 1 <= best < 8, "the run must get worse for this test to say anything"
    outputs = [logits(str(summary.output))]
    again = recipe(tmp_path, start, **more | {"run": more["run"] | {"result": "last"}})
    outputs.append(logits(str(run.train(again).output)))
    assert not torch.allclose(*outputs, atol=1e-4)
    step = tmp_path / "run" / "checkpoints" / f"step-{best:08d}"
    assert torch.allclose(outputs[0], logits(str(step)), atol=1e-6)


def test_the_start_is_the_result_where_no_step_is_better(tmp_path: Path, start: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    more = overfitting(tmp_path, result="best", max_steps=2, early_stop_after=2)
    more |= {"samples": {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 2}}
    summary = run.train(recipe(tmp_path, start, **more | {"optimizer": {"learning_rate": 1.0}}))
    found = validation_losses(tmp_path)
    assert min(found, key=found.__getitem__) == 0
    assert main(["card", str(summary.output), "--out", str(tmp_path / "card.md")]) == 0
    assert "Stage sft, 0 of 2 steps" in (tmp_path / "card.md").read_text()
    assert torch.allclose(logits(str(summary.output)), logits(str(start)), atol=1e-6)


def test_values_of_another_metric_are_no_measure_for_this_one(tmp_path: Path, start: Path) -> None:
    pairs = [
        {"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no", "chosen_reward": 1, "rejected_reward": 0}
        for i in range(4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    more: dict = {
        "stage": "preference",
        "preference": {"loss": "dpo"},
        "data": {"train": [str(path)], "validation": [str(path)]},
    }
    asked = {"result": "best", "validate_every": 1, "max_steps": 1}
    run.train(recipe(tmp_path, start, **more, run=asked | {"metric": "accuracy"}))
    run.train(recipe(tmp_path, start, **more, run=asked | {"metric": "loss", "max_steps": 3}))
    found = validation_losses(tmp_path)
    best = min((2, 3), key=found.__getitem__)
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert (state["best_step"], state["best_validation"]) == (best, found[best])


def test_the_adapter_of_an_earlier_step_is_written(tmp_path: Path, start: Path) -> None:
    more = {"adapter": {"kind": "lora", "rank": 4, "targets": ["all"]}, "optimizer": {"learning_rate": 1e-2}}
    short = run.train(recipe(tmp_path, start, **more, run={"max_steps": 2}))
    expected = logits(str(short.output))
    run.train(recipe(tmp_path, start, **more, run={"keep_checkpoints": 9}))
    found = [
        logits(str(run.train(recipe(tmp_path, start, **more, run=settings)).output))
        for settings in ({"result": 2, "keep_checkpoints": 9}, {"keep_checkpoints": 9})
    ]
    assert torch.allclose(found[0], expected, atol=1e-6)
    assert not torch.allclose(found[1], expected, atol=1e-4)


def test_a_step_is_a_result_too_and_stays_kept(tmp_path: Path, start: Path) -> None:
    settings = {"result": 2, "keep_checkpoints": 1, "save_every": 100}
    summary = run.train(recipe(tmp_path, start, run=settings))
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert torch.allclose(logits(str(summary.output)), logits(str(step)), atol=1e-6)


def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(tmp_path: Path, start: Path) -> None:
    more = overfitting(tmp_path, early_stop_after=2, max_steps=30, result="best")
    summary = run.train(recipe(tmp_path, start, **more))
    assert summary.steps < 30
    assert summary.output is not None
    assert run.train(recipe(tmp_path, start, **more)).steps == summary.steps


def test_an_unknown_metric_names_those_that_are_measured(tmp_path: Path, start: Path) -> None:
    more = overfitting(tmp_path, metric="accuracy", validate_every=0)
    with pytest.raises(ConfigError, match="'accuracy', which validation does not measure") as caught:
        run.train(recipe(tmp_path, start, **more))
    assert "loss" in str(caught.value.hint)
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "it is known before the first update"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": {"max_steps": 0}}, "run.max_steps is 0"),
        ({"run": {"max_steps": None, "epochs": 0}}, "run.epochs is 0"),
        ({"run": {"validate_every": -1}}, "run.validate_every is -1"),
        ({"run": {"validate_every": 1, "early_stop_after": -1}}, "run.early_stop_after is -1"),
        ({"data": {"max_bad_rows": -1}}, "data.max_bad_rows is -1"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate is nan"),
        ({"optimizer": {"eps": -1.0}}, "eps is -1.0"),
        ({"optimizer": {"schedule": "wsd", "decay_steps": -5}}, "decay_steps is -5"),
    ],
)
def test_a_number_that_makes_no_run_is_refused(
    settings: dict, message: str, tmp_path: Path, start: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, start, **settings)


def test_a_result_behind_the_last_step_of_the_epochs_is_refused_before_the_first(
    tmp_path: Path, start: Path
) -> None:
    with pytest.raises(ConfigError, match=r"run.result is step 100 of a run of 2 steps"):
        run.train(recipe(tmp_path, start, run={"max_steps": None, "epochs": 1, "result": 100}))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_opens_wherever_a_model_does(tmp_path: Path, start: Path) -> None:
    run.train(recipe(tmp_path, start))
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert main(["convert", str(step), str(tmp_path / "hf"), "--to", "hf", "--dtype", "fp32"]) == 0
    assert torch.allclose(logits(str(tmp_path / "hf")), logits(str(step)), atol=1e-6)
    again = recipe(tmp_path, step, run={"directory": str(tmp_path / "second"), "max_steps": 1})
    assert run.train(again).output is not None


def test_what_does_not_change_the_numbers_may_change_within_a_run(tmp_path: Path, start: Path) -> None:
    run.train(recipe(tmp_path, start, run={"max_steps": 2}))
    changed = recipe(
        tmp_path,
        start,
        model={"activation_checkpointing": True},
        batch={"row_tokens": 200},
        run={"max_steps": 4, "save_every": 3},
    )
    assert run.train(changed).steps == 4


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"optimizer": {"learning_rate": 2e-3}}, r"optimizer\.learning_rate was 0\.001, is 0\.002"),
        ({"batch": {"global_size": 2}}, r"batch\.global_size was 4, is 2"),
        ({"num": 9}, r"data\.train was "),
        ({"run": {"seed": 1}}, r"run\.seed was 0, is 1"),
    ],
    ids=["rate", "batch", "rows", "seed"],
)
def test_what_changes_the_numbers_is_refused_by_name(
    tmp_path: Path, start: Path, more: dict, named: str
) -> None:
    run.train(recipe(tmp_path, start))
    with pytest.raises(ConfigError, match=named):
        run.train(recipe(tmp_path, start, **more))


def test_fewer_steps_than_done_are_an_error(tmp_path: Path, start: Path) -> None:
    made = run.train(recipe(tmp_path, start))
    record = (made.directory / "run.json").read_text()
    with pytest.raises(ConfigError, match="4 steps are done, and the recipe asks for 2"):
        run.train(recipe(tmp_path, start, run={"max_steps": 2}))
    assert (made.directory / "run.json").read_text() == record


def test_a_longer_schedule_says_what_happens_to_the_rate(tmp_path: Path, start: Path) -> None:
    notes: list[str] = []
    cosine = {"optimizer": {"schedule": "cosine"}}
    run.train(recipe(tmp_path, start, **cosine))
    run.train(recipe(tmp_path, start, **cosine, run={"max_steps": 9}), note=notes.append)
    assert any("planned for 4 steps and now has 9" in note for note in notes)


def test_extend_goes_on_at_the_rate_with_which_the_schedule_ended(tmp_path: Path, start: Path) -> None:
    rates = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 0}
    said: list[str] = []
    run.train(recipe(tmp_path, start, optimizer=rates, run={"max_steps": 3}))
    longer = recipe(tmp_path, start, optimizer=rates, run={"max_steps": 3, "extend": 2})
    assert run.train(longer, note=said.append).steps == 5
    lines = [json.loads(line) for line in (longer.run.directory / "metrics.jsonl").read_text().splitlines()]
    found = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert found == pytest.approx([1e-3, 5.5e-4, 1e-4, 1e-4, 1e-4])
    assert not any("the rate goes" in text for text in said)
    with pytest.raises(ConfigError, match="trains 2 steps at the rate 0, with which schedule cosine ends"):
        recipe(
            tmp_path, start, optimizer=rates | {"min_learning_rate": 0.0}, run={"max_steps": 3, "extend": 2}
        )


def test_the_rate_of_wsd_falls_in_the_last_steps_only() -> None:
    settings = OptimizerSection(learning_rate=1.0, warmup_steps=1, schedule="wsd", decay_steps=4)
    rates = [learning_rate(step, 10, settings) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_a_short_data_set_trains_and_says_what_was_fitted(tmp_path: Path, start: Path) -> None:
    short = recipe(
        tmp_path,
        start,
        num=16,
        optimizer={"warmup_steps": 10},
        batch={"global_size": 64},
        run={"epochs": 3, "max_steps": None},
    )
    plan = plan_steps(short, 16)
    assert plan.sizes == (16, 16, 16)
    assert plan.warmup_steps == 0
    notes: list[str] = []
    run.train(short, note=notes.append)
    assert any("a step has 16 samples, all there are" in note for note in notes)
    assert any("warm-up is 0 steps of 3" in note for note in notes)


def test_a_result_has_a_card_with_its_start_data_and_numbers(tmp_path: Path, start: Path) -> None:
    summary = run.train(recipe(tmp_path, start))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert summary.output is not None
    assert f"Stage sft, 4 of 4 steps, from {start}." in card
    assert "chats.jsonl" in card
    assert "| optimizer.learning\\_rate | 0.001 |" in card or "optimizer.learning_rate" in card
    assert "train loss" in card


def test_the_result_has_the_type_of_the_start(tmp_path: Path) -> None:
    start = tiny_models.llama_directory(tmp_path / "start", dtype=torch.bfloat16)
    notes: list[str] = []
    summary = run.train(recipe(tmp_path, start), note=notes.append)
    assert {info.dtype for info in open_checkpoint(str(summary.output)).tensors.values()} == {"bfloat16"}
    assert "the result is written in bfloat16" in notes
    wide = run.train(recipe(tmp_path, start, run={"result_dtype": "float32"}))
    assert {info.dtype for info in open_checkpoint(str(wide.output)).tensors.values()} == {"float32"}


def test_reference_numbers_are_kept_in_the_run_where_the_rows_cannot_be_written_to(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, start)
    assert run._reference_cache(made, "w").parent == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run._reference_cache(made, "w").parent == tmp_path / "run"


def test_answers_of_the_start_are_there_once_after_an_early_kill(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"step": 0, "prompt": "x", "answer": "y"}\n')
    Samples(tmp_path, (), None, 1).begin(0)  # type: ignore[arg-type]
    assert (tmp_path / SAMPLES_FILE).read_text() == ""
