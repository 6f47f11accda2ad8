"""The pipeline axis: each stage has some of the layers, and 1F1B keeps them busy with different rows.

A stage is the whole model with the modules of other stages taken out, so every weight keeps its name. All
rows of a step are padded to its longest one, because what stages send each other has one shape. A tied
embedding is on the first and on the last stage; the two gradients are added, so both copies stay equal.

Legend: M rows (micro-batches) of a data rank, N tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemotron4.errors import ConfigError
from nemotron4.model.adapters import PromptEmbedding
from nemotron4.model.config import ModelConfig
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Transformer
from nemotron4.training import sharded
from nemotron4.training.engine import Sums
from nemotron4.training.packing import PackedRow, plan_rows
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import Scorer, hidden
from nemotron4.training.sharded import Grid, ShardedEngine, shard, whole
from nemotron4.training.stage import Objective

if TYPE_CHECKING:
    from torch.distributed.pipelining import Schedule1F1B

Finish = Callable[[Tensor, PackedRow], Tensor]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class Absent(nn.Module):
    """Stands where another stage has the module; hands its first input on."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def check_divisible(config: ModelConfig, num_stages: int) -> None:
    """ConfigError if the layers do not divide evenly among the stages."""
    if config.num_layers % num_stages:
        divisors = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        raise ConfigError(
            f"num_layers ({config.num_layers}) is not divisible by parallel.pipeline: {num_stages}",
            hint=f"use one of {', '.join(map(str, divisors))}",
        )


def cut(net: Transformer | RewardModel, stage: int, num_stages: int) -> None:
    """Take out of a whole model, in place, what belongs to other stages."""
    per_stage = net.config.num_layers // num_stages
    for layer in range(net.config.num_layers):
        if layer // per_stage != stage:
            net.model.layers[layer] = Absent()
    if isinstance(net.model.embed_tokens, PromptEmbedding):
        raise ConfigError("P-tuning runs without pipeline stages", hint="set parallel.pipeline = 1")
    if stage > 0:
        net.model.register_module("embed_tokens", Absent())
    if stage < num_stages - 1:
        net.model.register_module("norm", Absent())
        net.register_module("reward_head" if isinstance(net, RewardModel) else "lm_head", Absent())


class StageModule(nn.Module):
    """What ``torch.distributed.pipelining`` runs: one of ``rows``, from a stage's edge to the next one's.

    The last stage answers with ``finish(scores, row)``.
    """

    def __init__(self, scorer: Scorer, *, is_last: bool) -> None:
        super().__init__()
        self.scorer = scorer
        self.is_last = is_last
        self.rows: Sequence[PackedRow] = ()
        self.finish: Finish = lambda scores, row: scores

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """(1, N) token ids or (1, N, D) hidden states -> (1, N, D), or what ``finish`` gives."""
        row = self.rows[int(index)]
        hidden_ND = hidden(self.scorer.net, x[0], row)
        if not self.is_last:
            return hidden_ND[None]
        return self.finish(self.scorer.read(hidden_ND, row), row)


class PipelineEngine(ShardedEngine):
    """Pipeline stages, each with its data and tensor axes."""

    def __init__(
        self,
        scorer: Scorer,
        grid: Grid,
        *,
        device: torch.device | str = "cpu",
        compute: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scorer, grid, device=device)
        self.stage, self.num_stages = grid.pipeline.get_local_rank(), grid.pipeline.size()
        self.group = grid.pipeline.get_group()
        self.is_first, self.is_last = self.stage == 0, self.stage == self.num_stages - 1
        self.is_tied = scorer.net.config.tie_embeddings and isinstance(scorer.net, Transformer)
        self.ends_group = _ends_group(grid) if self.is_tied else None
        cut(scorer.net, self.stage, self.num_stages)
        self.module = StageModule(scorer, is_last=self.is_last)
        self.compute = compute
        shard(self.module, scorer, grid, compute, keeps_gathered=True)
        self._schedule_shape = (0, 0)
        self._schedule: Schedule1F1B | None = None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """This stage's parameters; the last stage's copy of a tied weight has the weight's own name."""
        found = super().trainable
        if self.is_tied and OUTPUT in found:
            found[EMBEDDING] = found.pop(OUTPUT)
        return found

    # ---- rows

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """Equally many and equally long rows on every data rank, at least one for each stage."""
        plan = plan_rows([sample.packed_tokens for sample in samples], row_tokens)
        smallest = self.num_data * self.num_stages
        plan += [[] for _ in range(max(smallest - len(plan), -len(plan) % self.num_data))]
        longest = max(sum(samples[i].packed_tokens for i in row) for row in plan)
        return self._packed(samples, plan, pad_to=max(2, longest))

    # ---- training

    def _backward(self, rows: Sequence[PackedRow], objective: Objective, count: float) -> Sums:
        sums = Sums()

        def loss_of(scores: Tensor, row: PackedRow) -> Tensor:
            terms = objective.terms(scores, row)
            sums.add(terms.loss.sum, terms.totals, row)
            return self._scaled_for_backward(terms.loss.sum / count)[None]

        self.module.rows, self.module.finish = self._with_slopes(rows, objective, count), loss_of
        index_M = torch.arange(len(rows))
        first = (torch.stack([row.tokens_N for row in rows]),) if self.is_first else ()
        schedule = self._schedule_for(len(rows), len(rows[0].tokens_N))
        schedule.step(*first, index=index_M, target=index_M, return_outputs=False)
        sharded.settle_gradients(self.trainable)
        self._add_tied_gradients()
        return self._from_last(sums)

    def _schedule_for(self, num_rows: int, num_tokens: int) -> Schedule1F1B:
        """The schedule keeps the buffers of one shape; another shape makes another one."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # half a second of each start

        if self._schedule is None or self._schedule_shape != (num_rows, num_tokens):
            edge = self._edge(num_tokens, "meta").requires_grad_()
            tokens = torch.empty(1, num_tokens, dtype=torch.long, device="meta")
            stage = PipelineStage(
                self.module,
                self.stage,
                self.num_stages,
                self.device,
                input_args=tokens if self.is_first else edge,
                output_args=torch.empty(1, device="meta", requires_grad=True) if self.is_last else edge,
                group=self.group,
            )
            # The loss law has divided already.
            self._schedule = Schedule1F1B(stage, num_rows, loss_fn=_add, scale_grads=False)
            self._schedule_shape = (num_rows, num_tokens)
        return self._schedule

    def _edge(self, num_tokens: int, device: torch.device | str) -> Tensor:
        """What one stage hands to the next, without values."""
        size = self.scorer.net.config.hidden_size
        return torch.empty(1, num_tokens, size, dtype=self.compute, device=device)

    def _add_tied_gradients(self) -> None:
        parameter = self.trainable.get(EMBEDDING)
        if self.ends_group is None or parameter is None or parameter.grad is None:
            return
        gradient = parameter.grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(local, group=self.ends_group)

    def grad_norm(self) -> float:
        own = dict(self.trainable)
        if self.is_last and self.is_tied:
            own.pop(EMBEDDING, None)  # counted on the first stage
        norm = sharded.total_norm([p.grad for p in own.values() if p.grad is not None])
        square = torch.tensor(norm**2, dtype=torch.float64, device=self.device)
        dist.all_reduce(square, group=self.group)
        return float(square.sqrt())

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        mine = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        parts = [mine] * self.num_stages
        dist.all_gather_object(parts, mine, group=self.group)
        for stage, part in enumerate(parts):
            for name, shape, dtype in part:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
                if stage == self.stage:
                    tensor = whole(tensors[name].detach()).contiguous()
                dist.broadcast(tensor, group=self.group, group_src=stage)
                yield name, tensor

    # ---- scoring

    def score(self, row: PackedRow) -> Tensor:
        (scores,) = self.scores([row])
        return scores

    @torch.no_grad()
    def scores(self, rows: Sequence[PackedRow]) -> Iterable[Tensor]:
        """Scores on every stage; a stage takes the next row while later ones work on this one."""
        self.module.rows, self.module.finish = rows, lambda scores, row: scores
        was_training = self.scorer.training
        self.scorer.eval()
        found: list[Tensor] = []
        sending: list[tuple[dist.Work, Tensor]] = []
        for index, row in enumerate(rows):
            x = row.tokens_N[None]
            if not self.is_first:
                x = self._edge(len(row.tokens_N), self.device)
                dist.recv(x, group=self.group, group_src=self.stage - 1)
            x = self.module(x, torch.tensor(index))
            if self.is_last:
                found.append(x)
            else:
                work = dist.isend(x, group=self.group, group_dst=self.stage + 1)
                sending.append((cast("dist.Work", work), x))  # the tensor must live until it is sent
        for work, _ in sending:
            work.wait()
        self.scorer.train(was_training)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is made next must see the parameters, not gathered copies
        return self._broadcast_scores(rows, found)

    def _broadcast_scores(self, rows: Sequence[PackedRow], found: Sequence[Tensor]) -> list[Tensor]:
        shapes = [self.scorer.shape(row) for row in rows]
        sizes = [shape.numel() for shape in shapes]
        flat = torch.cat([s.flatten() for s in found]) if self.is_last else torch.empty(sum(sizes))
        flat = flat.to(self.device)
        dist.broadcast(flat, group=self.group, group_src=self.num_stages - 1)
        return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]

    def _from_last(self, sums: Sums) -> Sums:
        shared = [sums]
        dist.broadcast_object_list(
            shared, group=self.group, group_src=self.num_stages - 1, device=self.device
        )
        return shared[0]


def _add(loss_1: Tensor, _: Tensor) -> Tensor:
    return loss_1.sum()


def _ends_group(grid: Grid) -> dist.ProcessGroup:
    """First and last stage of this process's pipeline; every process makes the groups of all pipelines."""
    mine: dist.ProcessGroup | None = None
    for ranks in grid.mesh.mesh.flatten(1).T.tolist():
        group = dist.new_group([ranks[0], ranks[-1]])
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None, "every process is in one pipeline"
    return mine
