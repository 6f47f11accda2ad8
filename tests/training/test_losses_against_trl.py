"""Our preference losses against TRL's own trainers, on the same log-probabilities.

TRL is not a dependency: without it these tests skip. Its loss code runs unchanged; what stands around it
(model, accelerator, metrics) is replaced by objects that hand over the given numbers.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nemotron4.training import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]
trl = pytest.importorskip("trl", reason="pip install trl")

NUM_PAIRS, NUM_TOKENS = 3, 7
BETA = 0.3


def _numbers() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2 * NUM_PAIRS, NUM_TOKENS)
    policy = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    # The first token of a row is a prompt token and is never trained; answers differ in length.
    lengths = torch.tensor([7, 5, 3, 6, 4, 2])
    mask = torch.arange(NUM_TOKENS)[None] < lengths[:, None]
    return policy * mask, reference * mask, mask


class _Accelerator:
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def _model_giving(logprobs: Tensor):
    def forward(**_: object) -> SimpleNamespace:
        zeros = torch.zeros_like(logprobs)
        return SimpleNamespace(
            log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
        )

    forward.training = True  # type: ignore[attr-defined]
    return forward


def _trainer(**settings: object) -> SimpleNamespace:
    policy, _, _ = _numbers()
    return SimpleNamespace(
        model=_model_giving(policy), accelerator=_Accelerator(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], beta=BETA,
        label_smoothing=0.0, use_weighting=False, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    # TRL counts the unshifted completion mask, one token longer than the shifted one.
    with_prompt = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)
    ids = torch.ones(len(mask), NUM_TOKENS + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": with_prompt.long()}


def _trl_dpo(loss_type: str) -> float:
    policy, reference, mask = _numbers()
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = _inputs(mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trl.DPOTrainer._compute_loss(
        _trainer(loss_types=[loss_type]), _model_giving(policy), inputs, return_outputs=False
    )
    return float(loss)


def _margins(*, average: bool) -> tuple[Tensor, Tensor]:
    policy, reference, mask = _numbers()
    divisor = mask.sum(1) if average else 1
    (pc, pr), (rc, rr) = ((x.sum(1) / divisor).chunk(2) for x in (policy, reference))
    return pc - pr, rc - rr


@pytest.mark.parametrize(
    ("loss_type", "ours", "average"),
    [("sigmoid", losses.dpo, False), ("sigmoid_norm", losses.dpo, True), ("ipo", losses.ipo, True)],
)
def test_pair_losses_equal_trl(loss_type: str, ours, average: bool) -> None:
    loss = ours(*_margins(average=average), beta=BETA)
    assert float(loss.sum / loss.count) == pytest.approx(_trl_dpo(loss_type), rel=1e-12)


def test_kto_equals_trl() -> None:
    policy, reference, mask = _numbers()
    baseline = 0.4
    labels = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    trainer = _trainer(
        loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: reference.sum(1) + baseline,
    )  # fmt: skip
    inputs = _inputs(mask) | {
        "label": labels, "ref_logps": reference.sum(1), "ref_KL_logps": reference.sum(1)
    }  # fmt: skip
    theirs = trl.KTOTrainer._compute_loss(trainer, _model_giving(policy), inputs, return_outputs=False)
    ours = losses.kto(
        policy.sum(1), reference.sum(1), labels, kl_baseline=baseline, beta=BETA,
        desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    assert float(ours.sum / ours.count) == pytest.approx(float(theirs), rel=1e-12)
