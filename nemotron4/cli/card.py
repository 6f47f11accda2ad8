"""``nemotron4 card``: the model card of a folder, from what is recorded of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import note
from nemotron4.errors import ConfigError, DataError, Nemotron4Error, unknown

if TYPE_CHECKING:
    from nemotron4.checkpoint.description import CheckpointDescription
    from nemotron4.evaluation.result import Result
    from nemotron4.model_card import CardContent, Measured
    from nemotron4.records import JsonObject
    from nemotron4.redteam.garak_scan import ScanResult

CARD_FILE = "README.md"
ADAPTER_FILE = "adapter_config.json"
CARD_GPUS = ("h200-141gb", "h100-80gb", "a100-80gb")
OF_THE_MODEL = ("Required Hardware", "Model Architecture", "Prompt Format", "Usage")
LIMITATIONS = (
    "The model may give answers that are inaccurate, leave out key facts, or are irrelevant or repetitive.",
    "It may repeat biases and unpleasant language of its training texts, more so when a prompt has them.",
    "It was measured as the tables above say, and in nothing else.",
)
ETHICS = (
    "Whoever deploys the model tests it for the use and the people it is meant for.",
    "Outputs are a machine's: a person decides where they have consequences.",
)


def card(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model's or an adapter's folder.")],
    results: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Results of `eval run`; repeatable.")
    ] = None,
    redteam: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Results of `redteam garak` or `aegis`, or sessions."),
    ] = None,
    empty: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REASON", help="Why a benchmark or AEGIS has no result; repeatable."),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Such as Apache-2.0.")] = None,
    intended: Annotated[str | None, typer.Option("--intended-use", help="What it is for.")] = None,
    name: Annotated[str | None, typer.Option(help="Default the folder's.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default DIR/README.md.")] = None,
) -> None:
    """Write a model card in the layout of the published one.

    What is not known is empty and says why. The card that training leaves is replaced by the whole one.
    A README.md of another program stays.
    """
    from nemotron4.model_card import MARK, METHODS, render
    from nemotron4.runs import write_file

    if not directory.is_dir():
        raise ConfigError(f"{directory} is no folder", hint="name the folder of a model or an adapter")
    target = out or directory / CARD_FILE
    if out is None and target.is_file() and not target.read_bytes().startswith(MARK.encode()):
        raise ConfigError(f"{target} was written by somebody else", hint="--out FILE writes another file")
    made = replace(
        _described(directory, name or directory.resolve().name),
        licence=[licence] if licence else (),
        intended_use=[intended] if intended else (),
        limitations=LIMITATIONS,
        ethics=ETHICS,
    )
    made = _with_evaluations(made, results or [])
    made = _with_red_teaming(made, redteam or [])
    missing = {"License": "no --licence was given", "Intended use": "no --intended-use was given"}
    missing |= dict.fromkeys(METHODS, "no run was given (--redteam)")
    reasons = _reasons(empty or [], made)
    write_file(target, render(replace(made, missing={**missing, **made.missing, **reasons})))
    note(f"written: {target}")
    print(target)


def _described(directory: Path, name: str) -> CardContent:
    """From the model's headers, its prompt format and the record of its training."""
    from nemotron4.checkpoint.description import describe_checkpoint
    from nemotron4.model_card import CardContent

    made = CardContent(name=name)
    try:
        found = describe_checkpoint(directory)
    except Nemotron4Error as error:
        if not (directory / ADAPTER_FILE).is_file():
            raise
        # The base of an adapter may be elsewhere: its own record is here.
        reason = f"the model cannot be opened here ({error.message})"
        made = replace(made, missing=dict.fromkeys(OF_THE_MODEL, reason))
    else:
        made = replace(
            made,
            hardware=_hardware(found),
            architecture=_architecture(found, directory),
            prompts=_prompts(found),
            usage=[f"nemotron4 serve {directory} --port 1424", f"nemotron4 chat {directory}"],
            missing={"Prompt Format": "the model has no chat template"},
        )
    return _with_training(made, directory)


def _hardware(found: CheckpointDescription) -> list[str]:
    """The smallest layouts that the planner finds, on the card's own GPUs."""
    from nemotron4.cluster.hardware import gpu_named
    from nemotron4.cluster.plan import Workload, make_plan

    context = found.config.context_length
    workload = Workload(dtype=found.planned_dtype, context=context, stored=dict(found.served_bytes))
    lines = [f"A CPU whose memory holds {found.stored_bytes / 1e9:.2f} GB of weights, or"]
    for gpu in CARD_GPUS:
        plan = make_plan(found.config, gpu_named(gpu), workload)
        if plan.chosen.problem is None:
            lines.append(f"{plan.layout.num_gpus}x {gpu} ({context:,} tokens of context, 8 sequences)")
    return lines


def _architecture(found: CheckpointDescription, directory: Path) -> list[str]:
    config = found.config
    stored = ", ".join(f"{word} {size / 1e9:.3f} GB" for word, size in found.stored_types.items())
    lines = [
        f"Transformer decoder, {config.num_parameters:,} parameters: {config.num_layers} layers of width "
        f"{config.hidden_size}, feed-forward {config.ffn_hidden_size}.",
        f"{config.num_heads} heads, {config.num_kv_heads} of keys and values (grouped-query attention where "
        "fewer); rotary position embeddings.",
        f"Context of {config.context_length:,} tokens, vocabulary of {config.vocab_size:,}.",
        f"Stored as {stored}.",
    ]
    if (directory / ADAPTER_FILE).is_file():
        from nemotron4.model.adapter_files import read_adapter_config

        adapter = read_adapter_config(directory)
        size = sum(file.stat().st_size for file in directory.iterdir() if file.suffix == ".safetensors")
        lines.append(
            f"An adapter ({adapter.kind}, rank {adapter.rank}) of {size / 1e6:.2f} MB on that model."
        )
    return lines


def _prompts(found: CheckpointDescription) -> dict[str, str]:
    from nemotron4.records import Message

    form = found.checkpoint.prompt_format()
    if form is None:
        return {}
    turns = [
        Message("user", "{prompt 1}"),
        Message("assistant", "{response 1}"),
        Message("user", "{prompt 2}"),
    ]
    return {
        "Single Turn": form.render([Message("user", "{prompt}")]).rstrip("\n"),
        "Multi-Turn": form.render(turns).rstrip("\n"),
    }


def _with_training(made: CardContent, directory: Path) -> CardContent:
    """With what the run recorded next to the folder, if it was trained here."""
    from nemotron4.training.inputs import RECORD_FILE
    from nemotron4.training.metrics import METRICS_FILE
    from nemotron4.training.model_card import overview, training_blocks

    path = directory / RECORD_FILE
    folder = directory if path.is_file() else directory.resolve().parent
    if not (folder / RECORD_FILE).is_file():
        return replace(
            made, missing={**made.missing, "Model Overview": "no record of its training lies here"}
        )
    record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
    step = record.get("result_step", record["num_steps"])
    blocks = training_blocks(record, folder / METRICS_FILE, step)
    return replace(made, overview=[overview(record, step)], training=blocks)


def _with_evaluations(made: CardContent, folders: Sequence[Path]) -> CardContent:
    """Numbers of every benchmark of the card's layout, and why others are missing."""
    from nemotron4.evaluation.report import find_results
    from nemotron4.model_card import EVALUATIONS

    if not folders:
        return made
    by_task: dict[str, list[Result]] = {}
    for found in find_results(folders):
        by_task.setdefault(found.result.task, []).append(found.result)
    evaluations: dict[str, Measured] = {}
    missing = dict(made.missing)
    for _, _, task, _ in EVALUATIONS:
        if task not in by_task:
            missing[task] = "no result of it is in the folders given"
            continue
        if len(by_task[task]) > 1:
            raise ConfigError(f"two results of {task} are given", hint="name the folder of one")
        evaluations[task] = _measured(by_task[task][0])
        missing[task] = "the run has no such number"
    return replace(made, evaluations=evaluations, missing=missing)


def _measured(result: Result) -> Measured:
    """With interval; a sample or another judge is said, never hidden."""
    from nemotron4.model_card import Measured

    values = {}
    for metric, found in result.metrics.items():
        if found.value is not None:
            span = f" [{found.interval.lower:.1f}, {found.interval.upper:.1f}]" if found.interval else ""
            values[metric] = f"{found.value:.2f}{span}"
    parts = [f"`{result.name}`, {result.num_items} items" + (", a sample" if result.limit else "")]
    parts += [f"judge {result.judge}"] if result.judge else []
    parts += [f"scored {result.created_at[:10]}"] if result.created_at else []
    parts += [f"unscored {sum(result.unscored.values())}"] if result.unscored else []
    return Measured(values, "; ".join(parts) + ".")


def _reasons(given: Sequence[str], made: CardContent) -> dict[str, str]:
    """Why there is no result, in the words of whoever writes the card."""
    from nemotron4.model_card import EVALUATIONS, METHODS

    known = [*METHODS, *(task for _, _, task, _ in EVALUATIONS)]
    reasons: dict[str, str] = {}
    for each in given:
        name, _, reason = (part.strip() for part in each.partition("="))
        if not reason:
            raise ConfigError(f"--empty has {each!r}; expected NAME=REASON")
        if name not in known:
            raise unknown("benchmark or method", name, known)
        if name in made.red_teaming or name in made.evaluations:
            raise ConfigError(f"--empty says why {name} has no result, but one is given")
        if name in reasons:
            raise ConfigError(f"--empty names {name} twice")
        reasons[name] = reason.rstrip(".")
    return reasons


def _with_red_teaming(made: CardContent, paths: Sequence[Path]) -> CardContent:
    found: dict[str, str] = {}
    for path in paths:
        method, line = _red_teaming(path)
        if method in found:
            raise ConfigError(f"two results of {method} are given", hint="name one")
        found[method] = line
    return replace(made, red_teaming=found)


def _red_teaming(path: Path) -> tuple[str, str]:
    """The method and its result: a line, and perhaps a list under it."""
    if path.is_file():
        return "Human Content Red Teaming", _sessions_line(path)
    from nemotron4.redteam.garak_scan import RESULT_FILE, load_scan

    try:
        row = json.loads((path / RESULT_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no result of a red-teaming run: {error}") from error
    if "probes" in row:
        return "Garak", _garak_lines(load_scan(path))
    if "readings" in row:
        return "AEGIS", _aegis_line(row)
    raise DataError(f"{path}: neither a garak scan nor an AEGIS run")


def _garak_lines(result: ScanResult) -> str:
    """What was found, what was asked, and each area with its interval; what did not run is said."""
    from nemotron4.redteam.garak_report import area_name, area_state, finding, num_empty, rate

    num_run = sum(probe.status == "run" for probe in result.probes)
    said = f"garak {result.garak}, {num_run} of {len(result.probes)} probes asked for"
    said += f", answers to each prompt: {result.settings['generations']}"
    said += f"; scanned {result.created_at[:10]}" if result.created_at else ""
    said += ". An attack worked where garak's detector says so; some only look for a refusal."
    lines = [f"{finding(result)} ({said})"]
    for area, counts in result.areas.items():
        probes = [probe for probe in result.probes if probe.area == area]
        state, empty = area_state(probes), num_empty(probes)
        said = f"{rate(counts)} passed, {counts.passed}/{counts.evaluated}" if counts.evaluated else "no rate"
        said += f", {empty} of the answers empty" if empty else ""
        said += f", {counts.nones} without a verdict" if counts.nones else ""
        lines.append(f"  - {area_name(area)}: {said}" + ("" if state == "run" else f" ({state})"))
    return "\n".join(lines)


def _sessions_line(path: Path) -> str:
    from nemotron4.redteam.session_report import report
    from nemotron4.redteam.sessions import SessionStore
    from nemotron4.report import percent

    with SessionStore(path, create=False) as store:
        total = report(store.sessions()).total
    if total.rate is None:
        return f"{total.unassessed + total.unclear} sessions, none of them assessed."
    shown = percent(total.rate, total.interval)
    return f"{shown} of {total.assessed} assessed attacks worked; {total.partial} more in part."


def _aegis_line(row: JsonObject) -> str:
    from nemotron4.grading.statistics import Interval
    from nemotron4.report import percent

    wanted = ("defensive", "tolerant")
    reading = next(r for r in row["readings"] if (r["treatment"], r["parsing"]) == wanted)
    unread = reading["unknown"]
    silent = f" {unread} of the classifier's replies could not be read." if unread else ""
    if reading["unsafe_rate"] is None:
        return f"{row['num_prompts']} prompts, no answer was judged.{silent}"
    lower, upper = reading["interval"]
    shown = percent(reading["unsafe_rate"], Interval(lower, upper, "Wilson"))
    judged = reading["safe"] + reading["unsafe"] + reading["blocked"]
    asked = f"{judged} judged answers to {row['num_prompts']} prompts"
    return f"{shown} of the {asked} are unsafe, by {row['classifier']}.{silent}"
