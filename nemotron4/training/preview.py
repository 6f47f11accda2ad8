"""A run before it runs: what its data renders to, how long it takes, whether the loss law holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nemotron4.errors import TrainingError
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.training import checks, inputs, parallel, run
from nemotron4.training.checks import Checked
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import Origin
from nemotron4.training.metrics import StepCost, matmul_flops_per_s
from nemotron4.training.output import result_dtype
from nemotron4.training.prompts import longest_answers
from nemotron4.training.recipe import Recipe
from nemotron4.training.reference import model_hash
from nemotron4.training.rewards import connect as connect_rewards
from nemotron4.training.rollouts import Connect
from nemotron4.training.samples import Sample, Segment
from nemotron4.training.schedule import plan_steps
from nemotron4.training.stage import Objective

LOOKED_AT = 512  # windows of an indexed corpus, evenly spaced, from which tokens and time are estimated
TOLERANCE = 1e-4  # relative, of loss and gradient in float32


@dataclass(frozen=True)
class Preview:
    """What ``--dry-run`` reports of a stage. Seconds are a lower bound, at full matrix-product speed.

    None is what only the rows tell, where the start is not here and they cannot be read.
    """

    stage: str
    notes: tuple[str, ...]
    num_parameters: int
    num_processes: int
    weights_bytes: int  # of one process
    optimizer_bytes: int
    num_steps: int | None
    result_bytes: int | None = None  # of the model or adapter that is written
    result_dtype: str | None = None
    num_samples: int | None = None
    num_validation: int | None = None
    num_left_out: int | None = None
    problems: tuple[str, ...] = ()
    tokens_per_epoch: int | None = None
    trained_share: float | None = None
    longest: int | None = None
    seconds: float | None = None
    first_sample: str = ""


def preview(recipe: Recipe) -> Preview:
    """Of one recipe; see ``preview_all``."""
    return preview_all([recipe])[0]


def preview_all(stages: Sequence[Recipe]) -> list[Preview]:
    """Read and render everything of every stage; build no model and take no step."""
    return [_preview(checked) for checked in checks.check(stages, by_shape=True)]


def _preview(checked: Checked) -> Preview:
    recipe, read = checked.recipe, checked.read
    found = Preview(
        stage=recipe.stage,
        notes=checked.notes,
        num_parameters=checked.config.num_parameters,
        num_processes=recipe.parallel.num_processes,
        weights_bytes=checked.weights_bytes,
        optimizer_bytes=checked.optimizer_bytes,
        num_steps=recipe.run.max_steps if checked.plan is None else checked.plan.num_steps,
    )
    if read is None or checked.plan is None or checked.base is None:
        return found
    # An adapter stays in the type in which it trains.
    dtype = torch.float32 if recipe.adapter is not None else result_dtype(recipe, checked.base)
    num = len(read.train)
    samples = [read.train[i] for i in range(0, num, -(-num // LOOKED_AT) if read.orders else 1)]
    rollouts = recipe.kind.rollouts(recipe.settings)
    planned = samples if rollouts is None else longest_answers(rollouts, samples)
    segments = [segment for sample in planned for segment in sample.segments]
    tokens = sum(len(segment.tokens) for segment in segments)
    cost = StepCost.of(checked.config, has_adapter=recipe.adapter is not None)
    flops = cost.flops(planned) * sum(checked.plan.sizes) / len(samples)
    if rollouts is not None:
        flops *= 2  # answering, and scoring by policy and reference, are a forward pass each
    tokenizer = checked.base.tokenizer()
    return replace(
        found,
        result_bytes=checks.trainable_parameters(recipe, checked.config) * dtype.itemsize,
        result_dtype=str(dtype).removeprefix("torch."),
        num_samples=num,
        num_validation=len(read.validation),
        num_left_out=len(read.problems),
        problems=tuple(str(problem) for problem in read.problems[:20]),
        tokens_per_epoch=tokens * num // len(samples),
        trained_share=sum(segment.num_trained for segment in segments) / max(1, tokens),
        longest=max(len(segment.tokens) for segment in segments),
        seconds=flops / matmul_flops_per_s(),
        first_sample="\n".join(marked(segment, tokenizer) for segment in samples[0].segments),
    )


def marked(segment: Segment, tokenizer: Tokenizer) -> str:
    """The text with trained stretches between [[ and ]]: readable without colour."""
    return "".join(
        f"[[{shown(ids, tokenizer)}]]" if is_trained else shown(ids, tokenizer)
        for is_trained, ids in stretches(segment)
    )


def shown(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the ids with markers spelled out: a trained stop marker must be seen.

    What only looks like a marker and is ordinary text has a backslash before it.
    """
    markers = tokenizer.markers
    lookalike = re.compile("|".join(map(re.escape, markers)) or r"(?!)")

    def text(plain: Sequence[int]) -> str:
        return lookalike.sub(r"\\\g<0>", tokenizer.decode(plain))

    parts: list[str] = []
    plain: list[int] = []
    for token in ids:
        piece = tokenizer.piece(token) if token < tokenizer.vocab_size else "<virtual>"
        if token >= tokenizer.vocab_size or tokenizer.is_control(token) or piece in markers:
            parts += (text(plain), piece)
            plain = []
        else:
            plain.append(token)
    return "".join((*parts, text(plain)))


def stretches(segment: Segment) -> list[tuple[bool, list[int]]]:
    """The tokens cut where training starts or ends."""
    runs: list[tuple[bool, list[int]]] = []
    for token, is_trained in zip(segment.tokens, segment.is_trained, strict=True):
        if not runs or runs[-1][0] != is_trained:
            runs.append((is_trained, []))
        runs[-1][1].append(token)
    return runs


# ---- the loss law on the user's own data


@dataclass(frozen=True)
class Cut:
    """One way to cut the first step, and how far its result is from the first way's (relative)."""

    name: str
    num_rows: int
    loss: float
    grad_norm: float
    difference: float


def check_invariance(recipe: Recipe, *, connect: Connect = connect_rewards) -> list[Cut]:
    """The first step's loss and gradient under several cuts; TrainingError if they differ.

    For policy gradients the first step's answers are generated and judged.
    """
    base, read = run.open_all(recipe)
    origin = Origin(recipe, base, inputs.model_config(recipe, base))
    engine = parallel.build(origin, None, torch.device("cpu"))
    engine.scorer.eval()  # dropout draws by row, so it is left out of the comparison
    size = plan_steps(recipe, len(read.train)).sizes[0]
    samples = [read.train[i] for i in range(min(size, len(read.train)))]
    if recipe.kind.has_reference(recipe.settings):
        read = run.with_reference_of(recipe, samples, engine, model_hash(engine.scorer.net))
        samples = list(read.train)
    objective = recipe.kind.objective(recipe.settings)
    special = recipe.kind.trainer(recipe.settings)
    if special is not None:
        make = special(origin, None, engine.device, connect)
        samples = list(make(recipe, engine, objective, Dataset(read.train, recipe.run.seed)).first_samples())
        if not samples:
            raise TrainingError(
                "every group of the first step has equal rewards or no finished answers: nothing would train",
                hint="look at the rewards, or raise policy_gradient.group_size or max_new_tokens",
            )
    cuts = compare_cuts(engine, objective, samples, recipe.batch.row_tokens)
    worst = max(cuts, key=lambda cut: cut.difference)
    if worst.difference > TOLERANCE:
        raise TrainingError(
            f"the gradient changes by {worst.difference:.1e} (relative) when the step is cut {worst.name}; "
            f"expected below {TOLERANCE:.0e}"
        )
    return cuts


def compare_cuts(
    engine: TrainingEngine, objective: Objective, samples: Sequence[Sample], row_tokens: int
) -> list[Cut]:
    longest = max(sample.num_tokens for sample in samples)
    total = sum(sample.num_tokens for sample in samples)
    ways = {
        "as the recipe says": row_tokens,
        "into the shortest rows": longest,
        "into two rows": max(longest, total // 2 + longest),
    }
    cuts: list[Cut] = []
    first: list[torch.Tensor] = []
    for name, tokens in ways.items():
        rows = engine.rows(samples, tokens)
        result = engine.forward_backward(rows, objective)
        norm = engine.grad_norm()
        gradients = [p.grad for p in engine.trainable.values() if p.grad is not None]
        first = first or [gradient.clone() for gradient in gradients]
        apart = [a - b for a, b in zip(gradients, first, strict=True)]
        difference = float(torch.nn.utils.get_total_norm(apart)) / max(norm, 1e-12)
        if cuts:
            difference = max(difference, abs(result.loss - cuts[0].loss) / max(abs(result.loss), 1e-12))
        cuts.append(Cut(name, len(rows), result.loss, norm, difference))
        for parameter in engine.trainable.values():
            parameter.grad = None
    return cuts
