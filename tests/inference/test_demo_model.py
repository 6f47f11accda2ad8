"""The engine on the pulled SmolLM2-135M-Instruct, against transformers on the same dequantised weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.shipped import FOLDER
from nemotron4.text.answers import encode_text
from nemotron4.text.prompt import card_prompt
from tests.peers import llama_config

pytestmark = pytest.mark.demo_model


def transformers_model(path: Path) -> LlamaForCausalLM:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        peer = LlamaForCausalLM(llama_config(checkpoint.config))
    state = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
    peer.load_state_dict(state, assign=True, strict=False)
    peer.tie_weights()
    # Not part of a state dict, hence still on the meta device.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    return peer.eval()


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_for_mixed_lengths(demo_model: Path) -> None:
    texts = ["The capital of France is", card_prompt(), "def fibonacci(n):", "Once upon a time " * 12]
    peer = transformers_model(demo_model)
    with nemotron4.load(demo_model, dtype="float32") as engine:
        generations = engine.generate(texts, max_new_tokens=24, temperature=0, ignore_eos=True)
        prompts = [encode_text(engine, text) for text in texts]
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert list(generation.token_ids) == expected[0, len(prompt) :].tolist()


def test_it_answers_in_its_own_format(demo_model: Path) -> None:
    with nemotron4.load(demo_model) as engine:
        [answer] = engine.generate(
            [[{"role": "user", "content": "What is the capital of France?"}]],
            max_new_tokens=32,
            temperature=0,
        )
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


def test_an_adapter_given_by_its_folder_scores_as_the_one_that_ships(
    demo_model: Path, tmp_path: Path
) -> None:
    """Both round the merged weights to eight bits, one while it reads, the other into a file."""
    scores = []
    for adapter in ("auto", shutil.copytree(FOLDER, tmp_path / "adapter"), None):
        with nemotron4.load("smollm2", adapter=adapter) as engine:
            scores.append(torch.tensor(engine.score([card_prompt() + "In a vibrant tapestry"])[0]))
            if adapter not in ("auto", None):
                assert engine.info.dtype == "int8"
    ships, given, bare = scores
    assert (given - ships).abs().mean() < 0.2 * (bare - ships).abs().mean()
