"""``nemotron4 doctor``: look for what would go wrong later."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.models import description
from nemotron4.cli.options import GPU, JsonOption, Latin1Option, ModelArgument, RowFilesArgument
from nemotron4.errors import ConfigError, DataError, Problems, unknown
from nemotron4.report import Table, print_report

if TYPE_CHECKING:
    from nemotron4.training.doctor import Examination
    from nemotron4.training.samples import Segment

app = group("Look for what would go wrong later.")


@app.command("data")
def data(
    files: RowFilesArgument,
    kind: Annotated[
        str,
        typer.Option(
            help="What the rows are: sft, preference, kto, reward, reward_pairs, prompts, pretrain, steerlm, "
            "steerlm_weighted."
        ),
    ],
    model: Annotated[str, typer.Option(help="Its tokenizer and prompt format apply.")],
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence; default the context.")
    ] = None,
    show: Annotated[int, typer.Option(help="Rendered samples to print, trained text marked.")] = 1,
    benchmark: Annotated[
        list[Path] | None, typer.Option(help="A file whose texts no row may repeat.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.html, with distributions.")] = None,
    latin_1: Latin1Option = False,
    write_clean: Annotated[Path | None, typer.Option(help="Write the usable rows here, each once.")] = None,
    max_bad_rows: Annotated[
        int | None, typer.Option(help="More bad rows end with status 1; default as in a recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read rows as training would, and name each problem by file, line and field.

    Bad rows cannot train: wrong fields, no trained token, too long, chosen equal to rejected. Warnings can:
    a stop marker that never trains, inverted or missing rewards, duplicates, prompts and answers that merge,
    texts of a benchmark.
    """
    from nemotron4.training.reading import TrainingSource

    _check(files, kind, model, benchmark or (), write_clean)
    sources = [TrainingSource(path=path) for path in files]
    if latin_1:
        sources = [replace(source, encoding="latin-1") for source in sources]
    from nemotron4.training import doctor, stage

    kinds = stage.kinds()
    found = doctor.examine(sources, kinds[kind], model, max_length=max_length, benchmarks=benchmark or ())
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, show)
    _write(found, write_clean, report)
    _refuse_bad(found, max_bad_rows)


@app.command("checkpoint")
def checkpoint(
    model: ModelArgument,
    gpu: Annotated[str, typer.Option(help="h100-80gb, h200-141gb, mi300x-192gb, ...")] = GPU,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint from its headers, and name what would go wrong with it.

    No weight is read. The exit status is 1 when the built-in engine cannot serve it.
    """
    from nemotron4.checkpoint.description import describe_checkpoint
    from nemotron4.cluster.hardware import gpu_named
    from nemotron4.cluster.plan import Workload, make_plan

    known_gpu = gpu_named(gpu)
    found = describe_checkpoint(model)
    values = found.to_json()
    try:
        work = Workload(
            dtype=found.planned_dtype,
            context=found.config.context_length,
            concurrency=1,
            stored=found.served_bytes,
        )
        layout = make_plan(found.config, known_gpu, work).layout
        hardware = f"{layout.num_gpus} x {gpu}"
    except ConfigError as error:
        hardware = error.message
    free, needed = found.free_bytes(), found.conversion_bytes()
    values |= {"smallest_hardware": hardware, "free_bytes": free, "conversion_bytes": dict(needed)}
    if as_json:
        print_json(values)
    else:
        sizes = ", ".join(f"{form} {size / 1e9:.1f} GB" for form, size in needed.items())
        sequence = f"one sequence of {found.config.context_length} tokens"
        more = (
            ("smallest hardware", f"{hardware} ({sequence})"),
            ("a conversion", f"writes {sizes}; {free / 1e9:.1f} GB are free there"),
        )
        print_report([description(found, *more)])
    if found.problems:
        raise typer.Exit(1)


def _check(
    files: Sequence[str], kind: str, model: str, benchmarks: Sequence[Path], clean: Path | None
) -> None:
    """What can be told before PyTorch is loaded and before a row is read."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.training import stage
    from nemotron4.training.reading import HUB, files_of

    problems = Problems()
    with problems.kept():
        if kind not in stage.kinds():
            raise unknown("kind", kind, stage.kinds())
    named = [path for path in (*files, *map(str, benchmarks)) if not path.startswith(HUB)]
    looks: list[Callable[[], object]] = [
        partial(resolve, model),
        *(partial(files_of, path) for path in named),
    ]
    for look in looks:
        with problems.kept():
            look()
    with problems.kept():
        if clean is not None and not clean.parent.is_dir():
            raise DataError(f"{clean}: the folder {clean.parent} does not exist")
    problems.tell()


def _refuse_bad(found: Examination, limit: int | None) -> None:
    from nemotron4.training.recipe import DataSection

    limit = DataSection.max_bad_rows if limit is None else limit
    if len(found.problems) > limit:
        raise DataError(
            f"{len(found.problems)} of {found.num_rows} rows cannot be used (--max-bad-rows {limit})",
            hint="repair them, or write the others with --write-clean",
        )


def _write(found: Examination, clean: Path | None, folder: Path | None) -> None:
    if clean is not None:
        from nemotron4.records import write

        # Tables hold more than JSON can: dates are written as texts, as are bytes.
        plain = (json.loads(json.dumps(row, default=str)) for row in found.clean if isinstance(row, dict))
        written = write(clean, plain)
        note(f"{written:,} clean rows written to {clean}")
    if folder is not None:
        from nemotron4.report import write_report
        from nemotron4.training.doctor import report

        folder.mkdir(parents=True, exist_ok=True)
        pages = write_report(folder, "Training data", report(found))
        note(f"report written to {pages[-1]}")


def _print(found: Examination, show: int) -> None:
    for problem in found.problems:
        print(f"bad      {problem}")
    for warning in found.warnings():
        print(f"warning  {warning}")
    for line in found.ignored.lines():
        print(f"note     {line}")
    for sample in found.samples[: max(0, show)]:
        print(f"---- {sample.where}")
        for segment in sample.segments:
            print(_rendered(segment, found))
    counts = [(name.replace("_", " "), f"{value:,}") for name, value in found.summary.items()]
    print_report([Table(("what", "count"), counts)])


def _rendered(segment: Segment, found: Examination) -> str:
    """Trained text in green on a terminal, between [[ and ]] elsewhere."""
    from nemotron4.training.preview import marked, shown, stretches

    tokenizer = found.encoder.tokenizer
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return marked(segment, tokenizer)
    return "".join(
        f"\033[32m{shown(ids, tokenizer)}\033[0m" if is_trained else shown(ids, tokenizer)
        for is_trained, ids in stretches(segment)
    )
