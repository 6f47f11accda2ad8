"""The pulled SmolLM2-135M-Instruct, against values that others read from the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.gguf_file import read_gguf
from nemotron4.checkpoint.load import load_transformer
from tests.checkpoint.gguf_files import gguf_name

pytestmark = pytest.mark.demo_model


def test_it_opens_under_its_name(demo_model: Path) -> None:
    checkpoint = open_checkpoint("smollm2")
    assert (checkpoint.name, checkpoint.path, checkpoint.format) == ("smollm2", demo_model, "gguf")
    assert checkpoint.config.num_parameters == 134_515_008
    assert checkpoint.eos_token_ids == (2,)
    assert not checkpoint.adds_bos
    assert checkpoint.tokenizer().encode("<|im_start|><|im_end|>") == [1, 2]


@pytest.mark.slow
def test_metadata_and_values_equal_what_gguf_itself_reads(demo_model: Path) -> None:
    peer, checkpoint = gguf.GGUFReader(demo_model), open_checkpoint(demo_model)
    stored = {tensor.name: tensor for tensor in peer.tensors}
    expected = {key: field.contents() for key, field in peer.fields.items() if not key.startswith("GGUF.")}
    assert read_gguf(demo_model).metadata == expected
    for name in checkpoint.tensors:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = stored[gguf_name(name)]
            values = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(checkpoint.read(name).numpy(), values, err_msg=name)


@pytest.mark.slow
def test_logits_equal_those_of_transformers_own_gguf_reader(demo_model: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(demo_model.parent, gguf_file=demo_model.name)
    checkpoint = open_checkpoint(demo_model)
    model, _ = load_transformer(checkpoint, dtype=torch.float32)
    tokens_BT = torch.tensor([checkpoint.tokenizer().encode("Shall I compare thee to a summer's day?")])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-3, rtol=1e-3)
