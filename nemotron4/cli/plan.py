"""``nemotron4 plan``: what hardware a model needs, without having it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption
from nemotron4.cluster.layout import (
    DECODE_FORMULA,
    MFU_FORMULA,
    PREFILL_FORMULA,
    largest,
    training_operations,
)
from nemotron4.cluster.plan import Plan, Workload, make_plan

if TYPE_CHECKING:
    from nemotron4.model.config import ModelConfig


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset (nemotron4-340b), or a checkpoint to open.")
    ],
    gpu: Annotated[str, typer.Option(help="The GPU: h100-80gb, h200-141gb, a100-80gb ...")] = "h100-80gb",
    dtype: Annotated[
        Literal["bf16", "fp8", "int8"], typer.Option(help="Type of the linear layers.")
    ] = "bf16",
    tensor_parallel: Annotated[int | None, typer.Option(help="Keep this tensor parallel size.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Keep this pipeline parallel size.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and answer.")] = 4096,
    concurrency: Annotated[int, typer.Option(help="Sequences in the cache at once (serving).")] = 8,
    train: Annotated[
        Literal["full", "lora"] | None, typer.Option(help="Plan training instead of serving.")
    ] = None,
    method: Annotated[
        Literal["sft", "reward", "dpo", "rpo", "ppo"], typer.Option(help="What is trained.")
    ] = "sft",
    batch: Annotated[int, typer.Option(help="Sequences of a training step.")] = 128,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the bytes of a rank (.svg, .png).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which layout fits MODEL, why a smaller one does not, and how fast it can be at best."""
    from nemotron4.cluster.hardware import gpu_named

    workload = Workload(
        dtype=dtype, context=context, concurrency=concurrency, train=train, method=method, batch=batch
    )
    found = make_plan(
        _shape(model),
        gpu_named(gpu),
        workload,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    if plot is not None:
        from nemotron4.cluster.plan import draw

        draw(found, plot, title=model)
        note(f"drawn: {plot}")
    if as_json:
        print_json({"model": model, **found.to_json()})
    else:
        print(_text(model, found))


def _shape(model: str) -> ModelConfig:
    from nemotron4.model.presets import PRESETS

    if model in PRESETS:
        return PRESETS[model]()
    from nemotron4.checkpoint.opening import open_checkpoint

    return open_checkpoint(model).config


def _text(model: str, plan: Plan) -> str:
    values = plan.to_json()
    layout, work = plan.layout, plan.workload
    use = f"training ({work.train} {work.method})" if work.train else f"serving in {work.dtype}"
    lines = [
        f"{model}: {values['num_parameters']:,} parameters, {use}",
        "",
        "weights of the whole model",
        *(f"  {part:<14}{_gigabytes(size)}" for part, size in values["weight_bytes"].items()),
        "",
        f"smallest layout: {_layout_text(plan)}" if values["fits"] else f"layout: {_layout_text(plan)}",
        f"  tensor parallel {layout.tensor_parallel}, pipeline parallel {layout.pipeline_parallel}",
    ]
    if not values["fits"]:
        lines.append(f"  does not fit: {values['problem']}")
    usable = f"{plan.usable_bytes / 1e9:.1f} of {plan.gpu.memory_bytes / 1e9:.1f} GB usable"
    lines += [
        "",
        f"bytes of the fullest GPU ({usable})",
        *(
            f"  {name.replace('_', ' '):<14}{_gigabytes(size)}"
            for name, size in largest(list(plan.chosen.stages)).to_json().items()
            if size
        ),
    ]
    if plan.rejected:
        lines += ["", "smaller layouts"]
        lines += [f"  {a.layout.num_gpus} GPUs: {a.problem}" for a in plan.rejected]
    return "\n".join([*lines, "", *_rate_lines(plan)])


def _layout_text(plan: Plan) -> str:
    num_gpus = plan.layout.num_gpus
    nodes = -(-num_gpus // plan.gpu.gpus_per_node)
    return f"{num_gpus} x {plan.gpu.name} ({nodes} node{'s' if nodes > 1 else ''})"


def _rate_lines(plan: Plan) -> list[str]:
    work = plan.workload
    rates = plan.rates
    if rates is not None:
        step = f"{1000 * rates.decode_step_s:.1f} ms a step, bound by {rates.decode_bound}"
        return [
            f"upper bounds with {work.concurrency} sequences of {work.context} tokens",
            f"  decode   {rates.decode_tokens_per_s:,.0f} tokens/s, {step}",
            f"  prefill  {rates.prefill_tokens_per_s:,.0f} tokens/s",
            f"  {DECODE_FORMULA}",
            f"  {PREFILL_FORMULA}",
        ]
    operations = training_operations(plan.shape, batch=work.batch, context=work.context)
    peak = plan.layout.num_gpus * plan.gpu.rate("bf16")
    return [
        f"a step of {work.batch} sequences: {operations:.3g} operations, "
        f"{operations / peak:.1f} s at the peak rate",
        f"  {MFU_FORMULA}",
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:>10.3f} GB"
