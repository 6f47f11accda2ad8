"""``nemotron4 launch``: the model card's job on this package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from nemotron4.cli.console import group, note
from nemotron4.cli.options import GPU, PORT, ContextOption
from nemotron4.cluster import slurm as scripts
from nemotron4.cluster.slurm import SlurmJob
from nemotron4.errors import ConfigError
from nemotron4.runs import write_file

app = group("Start jobs on a cluster, and the model card's own scripts.")

SHIM_PATH = "examples/nlp/language_modeling/megatron_gpt_eval.py"
SHIM = '''"""Stands in for NeMo's megatron_gpt_eval.py; written by `nemotron4 launch install-shim`.

It becomes the server: exec keeps the process that the calling script started and will kill.
"""

import importlib.util
import os
import sys

PYTHON = {python!r}

os.execv(PYTHON, [PYTHON, "-m", "nemotron4.cli.megatron_gpt_eval", *sys.argv[1:]])
'''


@app.command("install-shim")
def install_shim(
    prefix: Annotated[Path, typer.Option(help="Where the script looks for NeMo.")] = Path("/opt/NeMo"),
) -> None:
    """Write megatron_gpt_eval.py where the card's nemo_inference.sh calls it."""
    path = prefix / SHIM_PATH
    if path.exists() and "nemotron4" not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{path}: is there and was not written by nemotron4",
            hint="give another --prefix, or move that NeMo away",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, SHIM.format(python=sys.executable))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}", hint="run as a user who may, or give --prefix"
        ) from error
    print(path)
    note("the card's nemo_inference.sh ends in `pkill python`, which kills every python of the user there;")
    note("outside a container run it as: unshare -r --pid --fork --mount-proc bash nemo_inference.sh MODEL")


@app.command("slurm")
def slurm(
    target: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="The model to serve, or a recipe.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Settings of a training recipe.")
    ] = None,
    job: Annotated[Literal["serve", "train", "synth"], typer.Option(help="What to run.")] = "serve",
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")] = SlurmJob.nodes,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100-80gb, h200-141gb, mi300x-192gb, ...")] = GPU,
    time: Annotated[str, typer.Option(help="h:mm:ss or days-h:mm:ss.")] = SlurmJob.time,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Run in a container (pyxis).")
    ] = None,
    mount: Annotated[
        list[str] | None, typer.Option(metavar="SRC:DST", help="Mount a folder there; repeatable.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="Default this one, or python3 in a container.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Serving; default all GPUs of a node.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Serving; default the nodes.")] = None,
    context: ContextOption = None,
    port: Annotated[int, typer.Option(help="Port to serve on.")] = PORT,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "0.0.0.0",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of a synthesis run.")] = None,
    shards: Annotated[int, typer.Option(help="Shards of a synthesis run.")] = 8,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch.")] = False,
) -> None:
    """Check paths and plan, and print a batch script for Slurm."""
    of_serving = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "context": context,
    }
    _refuse_forgotten(
        job, {"train": {"settings": settings or None}, "serve": of_serving, "synth": {"out": out}}
    )
    batch = SlurmJob(
        name=f"nemotron4-{job}",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        account=account,
        partition=partition,
        container=container,
        mounts=tuple(mount or ()),
        python=python or (sys.executable if container is None else "python3"),
    )
    if job == "serve":
        text = _serve_script(batch, target, gpu, tensor_parallel, pipeline_parallel, context, (host, port))
    else:
        text = _run_script(batch, job, target, settings or [], out, shards)
    print(scripts.submit(text) if submit else text, end="" if not submit else "\n")


def _refuse_forgotten(job: str, belongs: Mapping[str, Mapping[str, object]]) -> None:
    """What is given for another job than the one that is asked for would be read and forgotten."""
    for owner, options in belongs.items():
        for name, value in options.items():
            if owner != job and value is not None:
                raise ConfigError(f"{name} is given for --job {job}", hint=f"it belongs to --job {owner}")


def _serve_script(
    batch: SlurmJob,
    model: str,
    gpu: str,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
    context: int | None,
    address: tuple[str, int],
) -> str:
    per_node = max(1, batch.gpus_per_node)
    tensor, pipeline = tensor_parallel or per_node, pipeline_parallel or batch.nodes
    _check_fits(model, gpu, batch.nodes * per_node, tensor, pipeline, context)
    arguments = [model, "--host", address[0], "--port", str(address[1])]
    arguments += [] if context is None else ["--context", str(context)]
    if tensor * pipeline > 1:
        arguments += ["--engine", "vllm", "--tensor-parallel", str(tensor)]
        arguments += ["--pipeline-parallel", str(pipeline), "--nodes", str(batch.nodes)]
        if batch.python == sys.executable and importlib.util.find_spec("vllm") is None:
            note(f"note: vLLM is not installed for {sys.executable}, which the job runs")
    return scripts.serve_script(batch, arguments)


def _run_script(
    batch: SlurmJob, job: str, recipe: str, settings: list[str], out: Path | None, shards: int
) -> str:
    if job == "train":
        _check_processes(Path(recipe), settings, batch.nodes * batch.gpus_per_node)
        return scripts.train_script(batch, [recipe, *settings])
    if out is None:
        raise ConfigError("--out is missing", hint="name the folder for the shards")
    _existing(Path(recipe))
    return scripts.synth_script(batch, recipe, str(out), shards=shards)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", hint="give the path of a recipe")
    return path


def _check_fits(
    model: str, gpu: str, num_gpus: int, tensor_parallel: int, pipeline_parallel: int, context: int | None
) -> None:
    """The layout uses all GPUs of the job and the model fits it with its whole context, or ``--context``."""
    from nemotron4.checkpoint.description import describe_checkpoint
    from nemotron4.cluster.hardware import gpu_named
    from nemotron4.cluster.plan import Workload, make_plan

    layout = f"tensor_parallel {tensor_parallel} x pipeline_parallel {pipeline_parallel}"
    if tensor_parallel * pipeline_parallel != num_gpus:
        raise ConfigError(f"{layout} use {tensor_parallel * pipeline_parallel} GPUs; the job has {num_gpus}")
    found = describe_checkpoint(model)
    tokens = context or found.config.context_length
    plan = make_plan(
        found.config,
        gpu_named(gpu),
        Workload(dtype=found.planned_dtype, context=tokens, concurrency=1, stored=found.served_bytes),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    if plan.chosen.problem is not None:
        raise ConfigError(
            f"{model} with {tokens} tokens does not fit {num_gpus} x {gpu} with {layout}: "
            f"{plan.chosen.problem}",
            hint=f"nemotron4 plan {model} --gpu {gpu} --concurrency 1 says what it needs; "
            "a smaller --context takes less",
        )


def _check_processes(recipe: Path, settings: list[str], num_gpus: int) -> None:
    """data x tensor x pipeline of the recipe must be the GPUs of the job."""
    import math
    import tomllib

    from nemotron4.config import apply_override

    try:
        values = tomllib.loads(_existing(recipe).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe}: not valid TOML: {error}") from error
    for setting in settings:
        apply_override(values, setting)
    parallel = values.get("parallel", {})
    sizes = [parallel.get(axis, 1) for axis in ("data", "tensor", "pipeline")]
    if math.prod(sizes) != num_gpus:
        raise ConfigError(
            f"{recipe}: parallel data {sizes[0]} x tensor {sizes[1]} x pipeline {sizes[2]} = "
            f"{math.prod(sizes)} processes, but the job has {num_gpus} GPUs",
            hint=f"add parallel.data={max(1, num_gpus // max(1, sizes[1] * sizes[2]))}",
        )
