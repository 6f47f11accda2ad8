"""A plan as a picture: the bytes of one GPU of each pipeline stage against its memory. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from nemotron4.cluster.plan import Plan
from nemotron4.errors import ConfigError


def draw(plan: Plan, path: Path, *, title: str) -> None:
    """Write the picture; the ending of the name decides the format."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib", hint="pip install 'nemotron4[plot]'") from error
    stages = plan.chosen.stages
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(stages)), layout="constrained")
    axes = figure.subplots()
    names = [f"stage {i}" for i in range(len(stages))]
    left = [0.0] * len(stages)
    for part in stages[0].to_json():
        sizes = [stage.to_json()[part] / 1e9 for stage in stages]
        if part == "total" or not any(sizes):
            continue
        axes.barh(names, sizes, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(plan.usable_bytes / 1e9, color="black", linestyle="--", label="usable")
    axes.axvline(plan.gpu.memory_bytes / 1e9, color="black", label=plan.gpu.name)
    axes.invert_yaxis()
    axes.set_xlabel("GB on each GPU")
    layout = plan.layout
    axes.set_title(
        f"{title}: {layout.num_gpus} GPUs, TP {layout.tensor_parallel} x PP {layout.pipeline_parallel}"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=6, frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path}: cannot be written: {error}", hint="use .svg, .png or .pdf"
        ) from error
