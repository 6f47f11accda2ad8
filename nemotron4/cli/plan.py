"""``nemotron4 plan``: what hardware a model needs, without having it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from nemotron4.cli.console import note, present
from nemotron4.cli.options import GPU, ContextOption, JsonOption
from nemotron4.cluster.hardware import Dtype, Gpu, gpu_named, gpu_of_memory
from nemotron4.cluster.layout import (
    DECODE_FORMULA,
    MFU_FORMULA,
    PREFILL_FORMULA,
    Method,
    Moments,
    ParallelSizes,
    Train,
    largest,
    training_operations,
)
from nemotron4.cluster.plan import HardwarePlan, KvCacheDtype, Workload, make_plan
from nemotron4.cluster.sizes import Shape
from nemotron4.errors import CheckpointError, ConfigError, nearest
from nemotron4.report import Block, Heading, Table, Text


class Planned(NamedTuple):
    """A model to plan for; a checkpoint brings what its weights take and the type they are computed in."""

    shape: Shape
    stored: dict[str, int]
    dtype: Dtype
    quantization: str | None


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset (nemotron4-340b, llama-3.1-70b) or a checkpoint.")
    ],
    gpu: Annotated[str, typer.Option(help="h100-80gb, h200-141gb, mi300x-192gb, ...")] = GPU,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Another GPU, by its memory.")
    ] = None,
    gpu_bandwidth: Annotated[
        float | None, typer.Option(metavar="TB/S", help="Its bandwidth, for the rate of decoding.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Linear layers; default the checkpoint's, else bf16.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Keep this size.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Keep this size.")] = None,
    context: ContextOption = None,
    concurrency: Annotated[
        int, typer.Option(help="Sequences in the cache (serving).")
    ] = Workload.concurrency,
    kv_cache_dtype: Annotated[KvCacheDtype, typer.Option(help="auto is 16 bits.")] = Workload.kv_cache_dtype,
    train: Annotated[Train | None, typer.Option(help="Plan training instead of serving.")] = None,
    method: Annotated[Method, typer.Option(help="What is trained.")] = Workload.method,
    moments: Annotated[Moments, typer.Option(help="AdamW's moments (training).")] = Workload.moments,
    batch: Annotated[int, typer.Option(help="Sequences of a training step.")] = Workload.batch,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a rank's bytes (.svg, .png).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which layout fits MODEL, why a smaller one does not, and how fast it can be at best."""
    planned = planned_model(model)
    workload = Workload(
        dtype=dtype or ("bf16" if train else planned.dtype),
        context=context or planned.shape.context_length,
        concurrency=concurrency,
        train=train,
        method=method,
        batch=batch,
        moments=moments,
        kv_cache_dtype=kv_cache_dtype,
        stored=planned.stored if train is None and dtype in (None, planned.dtype) else {},
    )
    split = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    found = make_plan(planned.shape, _gpu(gpu, gpu_memory, gpu_bandwidth), workload, **split)
    if plot is not None:
        from nemotron4.cluster.plan import draw

        draw(found, plot, title=model)
        note(f"drawn: {plot}")
    present(
        {"model": model, "quantization": planned.quantization, **found.to_json()},
        _blocks(model, found),
        as_json=as_json,
    )


def _gpu(name: str, gigabytes: float | None, terabytes_per_s: float | None) -> Gpu:
    if gigabytes is None:
        if terabytes_per_s is not None:
            raise ConfigError(
                "gpu_bandwidth is of another GPU than those in the table", hint="add --gpu-memory GB"
            )
        return gpu_named(name)
    return gpu_of_memory(gigabytes, terabytes_per_s=terabytes_per_s)


def planned_model(model: str) -> Planned:
    """A preset by name, else a checkpoint, of which only headers are read."""
    from nemotron4.cluster.known_models import KNOWN_MODELS
    from nemotron4.model.presets import PRESETS

    if model in PRESETS or model in KNOWN_MODELS:
        shape: Shape = PRESETS[model]() if model in PRESETS else KNOWN_MODELS[model]
        return Planned(shape, {}, "bf16", None)
    from nemotron4.checkpoint.description import describe_checkpoint

    try:
        found = describe_checkpoint(model)
    except CheckpointError as error:
        guess = None if Path(model).exists() or "/" in model else nearest(model, (*PRESETS, *KNOWN_MODELS))
        if guess is None:
            raise
        raise CheckpointError(error.message, hint=f"did you mean {guess!r}?") from error
    method = None if found.quantization is None else found.quantization.method
    return Planned(found.config, dict(found.served_bytes), found.planned_dtype, method)


def _blocks(model: str, plan: HardwarePlan) -> list[Block]:
    values = plan.to_json()
    layout, work = plan.layout, plan.workload
    use = f"training ({work.train} {work.method})" if work.train else f"serving in {work.dtype}"
    smallest = (
        f"none of {plan.gpu.name} fits" if plan.smallest is None else _layout(plan, plan.smallest.layout)
    )
    lines = [f"smallest layout: {smallest}"]
    if plan.smallest is not plan.chosen:
        lines.append(f"layout asked for: {_layout(plan, layout)}")
    if not values["fits"]:
        lines.append(f"does not fit: {values['problem']}")
    fullest = largest(list(plan.chosen.stages)).to_json()
    usable = f"{plan.usable_bytes / 1e9:.1f} of {plan.gpu.memory_bytes / 1e9:.1f} GB usable"
    blocks: list[Block] = [
        Heading(f"{model}: {values['num_parameters']:,} parameters, {use}"),
        *map(Text, lines),
        _sizes("weights of the whole model", values["weight_bytes"]),
        _sizes(f"the fullest GPU ({usable})", {name: size for name, size in fullest.items() if size}),
    ]
    if plan.rejected:
        rows = [(f"{each.layout.num_gpus} GPUs", each.problem) for each in plan.rejected]
        blocks.append(Table(("smaller layout", "why not"), rows))
    return [*blocks, *map(Text, _rate_lines(plan))]


def _sizes(title: str, sizes: Mapping[str, int]) -> Table:
    return Table(
        (title, "GB"), [(name.replace("_", " "), f"{size / 1e9:.3f}") for name, size in sizes.items()]
    )


def _layout(plan: HardwarePlan, layout: ParallelSizes) -> str:
    split = f"tensor parallel {layout.tensor_parallel}, pipeline parallel {layout.pipeline_parallel}"
    return f"{_layout_text(plan, layout.num_gpus)}, {split}"


def _layout_text(plan: HardwarePlan, num_gpus: int) -> str:
    nodes = -(-num_gpus // plan.gpu.gpus_per_node)
    return f"{num_gpus} x {plan.gpu.name} ({nodes} node{'s' if nodes > 1 else ''})"


def _rate_lines(plan: HardwarePlan) -> list[str]:
    work = plan.workload
    if work.train is None:
        return _serving_lines(plan)
    operations = training_operations(plan.shape, batch=work.batch, context=work.context)
    rate = plan.gpu.rate("bf16")
    seconds = "" if rate is None else f", {operations / plan.layout.num_gpus / rate:.1f} s at the peak rate"
    return [f"a step of {work.batch} sequences: {operations:.3g} operations{seconds}", MFU_FORMULA]


def _serving_lines(plan: HardwarePlan) -> list[str]:
    work, rates = plan.workload, plan.rates
    if rates is None:
        return ["no rates: the GPU's bandwidth is not known (--gpu-bandwidth TB/s)"]
    step = f"{1000 * rates.decode_step_s:.1f} ms a step, bound by {rates.decode_bound}"
    lines = [
        f"upper bounds with {work.concurrency} sequences of {work.context} tokens",
        f"decode {rates.decode_tokens_per_s:,.0f} tokens/s, {step}",
    ]
    if rates.prefill_tokens_per_s is not None:
        lines.append(f"prefill {rates.prefill_tokens_per_s:,.0f} tokens/s")
    return [*lines, DECODE_FORMULA, PREFILL_FORMULA]
