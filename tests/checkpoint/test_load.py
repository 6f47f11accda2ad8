from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import load_transformer, load_weights
from nemotron4.errors import CheckpointError
from nemotron4.model.transformer import Block, Transformer
from tests.tiny_models import nemotron_directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(nemotron_directory(tmp_path / "m"))


def on_meta(checkpoint: Checkpoint) -> Transformer:
    with torch.device("meta"):
        return Transformer(checkpoint.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_has_the_type_asked_for(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    model, report = load_transformer(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], checkpoint.read(name, dtype))


def test_each_block_is_handed_over_whole_and_in_order(checkpoint: Checkpoint) -> None:
    seen: list[Block] = []

    def block_loaded(block: Block) -> None:
        assert not any(parameter.is_meta for parameter in block.parameters())
        seen.append(block)

    model, _ = load_transformer(checkpoint, dtype=torch.float32, block_loaded=block_loaded)
    assert seen == list(model.model.blocks())


def test_weights_of_a_module_off_the_meta_device_are_replaced(checkpoint: Checkpoint) -> None:
    model = Transformer(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, checkpoint.read("lm_head.weight"))


def test_nothing_is_loaded_unless_everything_fits(checkpoint: Checkpoint) -> None:
    model = on_meta(checkpoint)
    model.register_parameter("extra", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(CheckpointError, match="tensor 'extra' is missing"):
        load_weights(model, checkpoint, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tensors_of_either_side_can_be_left_out_on_purpose(checkpoint: Checkpoint) -> None:
    body = on_meta(checkpoint)
    del body.lm_head
    body.reward_head = torch.nn.Linear(48, 5, device="meta")
    reasons = {
        "lm_head.weight": "a reward model has no vocabulary head",
        "reward_head.weight": "fresh",
        "reward_head.bias": "fresh",
    }
    report = load_weights(body, checkpoint, dtype=torch.float32, skip=reasons)
    assert report.skipped == reasons
    assert set(report.loaded) == set(checkpoint.tensors) - {"lm_head.weight"}
    assert body.reward_head.weight.is_meta
    assert not body.model.norm.weight.is_meta


def test_a_name_to_skip_that_nobody_has_is_a_mistake_of_the_program(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="lm_haed"):
        load_weights(on_meta(checkpoint), checkpoint, dtype=torch.float32, skip={"lm_haed.weight": "typo"})


def test_a_module_whose_shape_differs_names_the_tensor_and_the_file(checkpoint: Checkpoint) -> None:
    model = on_meta(checkpoint)
    model.lm_head = torch.nn.Linear(48, 9, bias=False, device="meta")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'lm_head\.weight' has shape"):
        load_weights(model, checkpoint, dtype=torch.float32)


def test_loading_does_not_import_torchs_compiler(checkpoint: Checkpoint) -> None:
    code = f"""
        import sys
        import torch
        from nemotron4.checkpoint import open_checkpoint
        from nemotron4.checkpoint.load import load_transformer

        load_transformer(open_checkpoint({str(checkpoint.path)!r}), dtype=torch.float32)
        assert "torch._dynamo" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
