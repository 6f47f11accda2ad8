"""One supervised step against transformers and torch's plain AdamW, from the same weights and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.cache import resolve
from nemotron4.errors import Nemotron4Error
from nemotron4.training import inputs, run
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.samples import Sample
from tests import tiny_models

transformers = pytest.importorskip("transformers")
QUESTIONS = ["Shall I compare thee?", "What is 2 plus 3?", "Name the months with fewer than 31 days."]
ANSWERS = [
    "Thou art more lovely.",
    "It is 5.",
    "February, April, June, September and November, in that order.",
]


def recipe(folder: Path, start: str, rate: float) -> Recipe:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "stage": "sft",
        "model": {"start": start, "device": "cpu"},
        "data": {"train": [str(folder / "rows.jsonl")], "max_length": 200},
        "optimizer": {"learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.1, "clip_norm": 1.0},
        "batch": {"global_size": 3, "row_tokens": 400},
        "run": {"directory": str(folder / "run"), "max_steps": 1},
    }
    return build(values)


def their_step(model, samples: list[Sample], rate: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Padded rows with -100 labels, token-mean loss, clipping, AdamW without decay on vectors."""
    longest = max(sample.num_tokens for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        (segment,) = sample.segments
        n = len(segment.tokens)
        ids[i, :n] = torch.tensor(segment.tokens)
        mask[i, :n] = 1
        for t, is_trained in enumerate(segment.is_trained):
            if is_trained:
                labels[i, t] = segment.tokens[t]
    model.train()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8, foreach=False, fused=False).step()
    return float(loss.detach()), {name: p.detach() for name, p in model.named_parameters()}


def compare(folder: Path, start: str, theirs, rate: float) -> None:
    settings = recipe(folder, start, rate)
    base = open_checkpoint(start)
    config = inputs.model_config(settings, base)
    samples = list(inputs.read_data(settings, inputs.build_encoder(settings, base, config)).train)
    summary = run.train(settings)
    assert summary.output is not None
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    loss, weights = their_step(theirs, samples, rate)
    assert line["loss"] == pytest.approx(loss, abs=1e-5)
    trained = open_checkpoint(summary.output)
    for name in trained.tensors:
        torch.testing.assert_close(trained.read(name), weights[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_one_step_equals_transformers_and_adamw(tmp_path: Path, family: str) -> None:
    maker = tiny_models.nemotron_directory if family == "nemotron" else tiny_models.llama_directory
    start = maker(tmp_path / "start")
    compare(tmp_path, str(start), transformers.AutoModelForCausalLM.from_pretrained(start), 1e-3)


@pytest.mark.slow
@pytest.mark.demo_model
def test_one_step_of_the_demo_model_equals_transformers_and_adamw(tmp_path: Path) -> None:
    try:
        resolve("smollm2")
    except Nemotron4Error:
        pytest.skip("nemotron4 pull smollm2")
    base = open_checkpoint("smollm2")
    c = base.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta, max_position_embeddings=c.context_length, tie_word_embeddings=True,
        )
    )  # fmt: skip
    weights = {name: base.read(name) for name in base.tensors}
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    # A rate people use: Adam makes a whole step even of a gradient that is rounding noise.
    compare(tmp_path, "smollm2", theirs, 2e-5)
