"""SteerLM: attribute-conditioned fine-tuning, and the weighted answers of 2.0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemotron4.errors import DataError
from nemotron4.training import losses, run
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.objectives import WeightedObjective
from nemotron4.training.preview import compare_cuts, preview
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.samples import Sample
from tests import tiny_models
from tests.training import tiny

LABEL = (
    "quality:4,toxicity:0,humor:0,creativity:0,"
    "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:1"
)
TURN = {"from": "User", "value": "What is 1 plus 1?"}


def make(folder: Path, rows: list[dict], objective: str, **data: object) -> Recipe:
    start = folder / "start"
    if not start.exists():
        tiny_models.nemotron_directory(start)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build(
        {
            "stage": "steerlm",
            "model": {"start": str(start), "device": "cpu"},
            "data": {"train": [str(folder / "rows.jsonl")], "max_length": 250, **data},
            "steerlm": {"objective": objective},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "batch": {"global_size": 4, "row_tokens": 1000},
            "run": {"directory": str(folder / "run"), "max_steps": 8},
        },
    )


def conditioned_row(**more: object) -> dict:
    turns = [TURN, {"from": "Assistant", "value": "It is 2.", "label": LABEL}]
    return {"system": "", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": turns, **more}


def weighted_row(*texts: str, **more: object) -> dict:
    responses = [
        {
            "from": "Assistant", "value": text, "log(P(a|x,y))": -1.0 - i,
            "log(P(y|x))": -9.0, "log(Q(y|a,x))": -8.0,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return {"system": "", "prompt_turns": [TURN], "label": LABEL, "responses": responses, **more}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_label_line_is_read_and_never_trained(tmp_path: Path) -> None:
    recipe = make(tmp_path, [conditioned_row()], "conditioned")
    shown = preview(recipe).first_sample
    assert f"<extra_id_2>{LABEL}\n[[It is 2.\n<extra_id_1>]]" in shown
    run.train(recipe)
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]


def test_weighted_answers_are_seen_with_their_label_and_their_distance_falls(tmp_path: Path) -> None:
    recipe = make(tmp_path, [weighted_row("It is 2.", "It is 3.", "I do not know.")], "weighted")
    shown = preview(recipe).first_sample
    assert shown.count(f"{LABEL}\n[[") == 3
    assert "[[It is 3.\n<extra_id_1>]]" in shown
    run.train(recipe)
    first, last = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert last["distance"] < first["distance"]
    assert 1 < first["effective_answers"] < 3


@pytest.mark.parametrize(
    ("row", "objective", "message"),
    [
        (conditioned_row(type=None), "conditioned", "it trains with type"),
        ({"messages": []}, "conditioned", "field 'conversations' is missing"),
        (weighted_row("one"), "weighted", "weights compare two or more"),
        (weighted_row("a", "b", prompt_turns=[TURN, TURN]), "weighted", "2 turns; expected an odd number"),
        (weighted_row("a", "b", label="quality:x"), "weighted", "expected 'name:number"),
        (weighted_row("a", "b", label="quality:4"), "weighted", "no value for toxicity"),
        (
            weighted_row("a", "b", responses=[{"from": "Assistant", "value": "a"}] * 2),
            "weighted",
            r"responses\[0\]: field 'log\(P\(a\|x,y\)\)' is missing",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: dict, objective: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        run.train(make(tmp_path, [row], objective))


# ---- the formula


def test_the_weights_gradient_is_nemo_aligners() -> None:
    generator = torch.Generator().manual_seed(1)
    policy, attributes, prior, proposal = torch.randn(4, 2, 5, dtype=torch.float64, generator=generator) * 3
    policy.requires_grad_()
    length = torch.tensor([7.0, 3.0], dtype=torch.float64)
    found = losses.steerlm_weighted(
        policy, target_GK=attributes + prior, proposal_GK=proposal, mean_length_G=length
    )
    found.loss.sum.backward()
    w = torch.softmax(attributes + prior - proposal, dim=1)
    b = torch.softmax(policy.detach() - proposal, dim=1)
    torch.testing.assert_close(policy.grad, -(w - b) / length[:, None])
    distance = (w * (w / b).log()).sum(dim=1)
    torch.testing.assert_close(found.distance_G.detach(), distance)
    torch.testing.assert_close(found.loss.sum.detach(), (distance / length).sum())
    assert found.loss.count == 2


def test_the_weighted_loss_is_zero_where_the_policy_has_the_targets_odds() -> None:
    target = torch.tensor([[-3.0, -800.0, -2.0]], dtype=torch.float64)
    found = losses.steerlm_weighted(
        (target - 40.0).requires_grad_(),
        target_GK=target,
        proposal_GK=torch.zeros(1, 3, dtype=torch.float64),
        mean_length_G=torch.ones(1, dtype=torch.float64),
    )
    assert float(found.loss.sum.detach()) == pytest.approx(0, abs=1e-12)


def test_no_cut_into_rows_changes_the_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    samples = [
        Sample(
            tuple(tiny.segment(generator) for _ in range(num)),
            tuple((-4 + torch.randn(3 * num, generator=generator)).tolist()),
        )
        for num in (2, 3, 2, 4)
    ]
    cuts = compare_cuts(TrainingEngine(tiny.logprob_scorer()), WeightedObjective(), samples, 200)
    assert len({cut.num_rows for cut in cuts}) > 1
    assert max(cut.difference for cut in cuts) < 1e-5


def test_in_another_format_the_label_is_the_answers_first_line_and_never_trains(tmp_path: Path) -> None:
    tiny_models.llama_directory(tmp_path / "start")
    recipe = make(tmp_path, [conditioned_row(system=None)], "conditioned")
    assert f"<|im_start|>assistant\n{LABEL}\n[[It is 2.<|im_end|>]]" in preview(recipe).first_sample
    recipe = make(tmp_path, [weighted_row("It is 2.", "It is 3.", system=None)], "weighted")
    assert f"assistant\n{LABEL}\n[[It is 3.<|im_end|>]]" in preview(recipe).first_sample
