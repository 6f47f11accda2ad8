from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron4.model.transformer import Transformer
from nemotron4.training.metrics import StepCost
from nemotron4.training.samples import Sample, Segment
from tests.training import tiny


def test_operations_are_those_that_torch_counts_in_a_forward_pass() -> None:
    config = tiny.config(num_layers=3)
    length = 24
    net = Transformer(config)
    net.initialise(seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.ones(1, length, dtype=torch.long))
    segment = Segment((1,) * length, (True,) * length)
    cost = StepCost.of(config, has_adapter=False)
    forward = cost.flops([Sample((segment,))]) / cost.num_passes
    # The counter knows products alone: no attention on a CPU, no norm; and the output at every position.
    attention = 2.0 * cost.attention_width * length * length
    last_position = 2.0 * cost.output_weights
    norms = 2.0 * length * 2 * config.hidden_size * (2 * config.num_layers + 1)
    assert counter.get_total_flops() == forward - attention + last_position - norms


def test_an_adapter_saves_the_pass_over_frozen_weights() -> None:
    samples = tiny.texts(4)
    whole, adapter = (StepCost.of(tiny.config(), has_adapter=has).flops(samples) for has in (False, True))
    assert adapter * 3 == whole * 2


def test_a_reward_model_has_no_output_layer() -> None:
    assert StepCost.of(tiny.config(num_reward_attributes=9), has_adapter=False).output_weights == 0
