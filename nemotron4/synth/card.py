"""The data card of an export: what it is, from where, how it was filtered and judged, and its plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemotron4.errors import ConfigError
from nemotron4.plots import draw_bars, draw_histograms
from nemotron4.records import read_json_lines
from nemotron4.report import Bar, Bars, Heading, Table, as_markdown
from nemotron4.synth.accounting import Accounting, dropped_blocks, read_dropped
from nemotron4.synth.judges import judge_report
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.stages import KINDS
from nemotron4.synth.tables import FILTERED


@dataclass
class _Numbers:
    """What the card says about one file."""

    lengths: dict[str, list[int]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    chosen_rewards: list[float] = field(default_factory=list)
    rejected_rewards: list[float] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    topics: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)


def write_card(
    folder: Path,
    recipe: SynthRecipe,
    accounting: Accounting,
    counts: dict[str, int],
    ledger: Reader,
    reviews: Mapping[str, int],
) -> None:
    """Write ``README.md`` and the plots of an export's folder."""
    numbers: dict[str, _Numbers] = {
        name: _read_numbers(folder / name) for name in ("sft.jsonl", "preference.jsonl") if name in counts
    }
    plots = write_plots(folder, numbers)
    sections = [
        _front_matter(recipe, counts),
        f"# {recipe.name}\n\nSynthetic data made with the recipe `{recipe.name}` (seed {recipe.seed}).",
        _files(counts),
        _sources(recipe, numbers),
        _stages(accounting),
        _filters(accounting),
        _dropped(ledger, recipe),
        _contamination(recipe, ledger),
        _judges(recipe, ledger),
        _people(reviews),
        _statistics(numbers),
        plots,
        _limits(accounting),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _read_numbers(path: Path) -> _Numbers:
    numbers = _Numbers()
    for _, row in read_json_lines(path):
        meta = row.get("meta", {})
        numbers.tasks[meta.get("task", "unknown")] += 1
        if meta.get("topic"):
            numbers.topics[meta["topic"]] += 1
        if "chosen" in row:
            for part in ("chosen", "rejected"):
                numbers.lengths.setdefault(part, []).append(len(row[part]))
                numbers.models[meta.get(f"{part}_model") or "unknown"] += 1
            if row.get("chosen_reward") is not None and row.get("rejected_reward") is not None:
                numbers.gaps.append(row["chosen_reward"] - row["rejected_reward"])
                numbers.chosen_rewards.append(row["chosen_reward"])
                numbers.rejected_rewards.append(row["rejected_reward"])
        else:
            answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
            numbers.lengths.setdefault("answers", []).extend(map(len, answers))
    return numbers


def _front_matter(recipe: SynthRecipe, counts: dict[str, int]) -> str:
    """What ``datasets.load_dataset`` reads: one configuration per row form.

    It opens all configurations of a folder with the reader of one of them, so they have one format.
    """
    names = [name for name in ("sft", "preference", "prompts") if counts.get(f"{name}.jsonl")]
    suffix = "parquet" if all(f"{name}.parquet" in counts for name in names) else "jsonl"
    configs = [f"  - config_name: {name}\n    data_files: {name}.{suffix}" for name in names]
    head = ["---", f"license: {recipe.export.licence}", "tags: [synthetic]"]
    return "\n".join([*head, *(["configs:", *configs] if configs else []), "---"])


def _files(counts: dict[str, int]) -> str:
    return _table("## Files", ("file", "rows"), [(f"`{name}`", rows) for name, rows in counts.items()])


def _sources(recipe: SynthRecipe, numbers: dict[str, _Numbers]) -> str:
    lines = ["## Sources and licences", "", f"Licence of this data: {recipe.export.licence}.", ""]
    lines += [f"- {source}" for source in recipe.export.sources] or ["No sources are stated in the recipe."]
    lines += ["", "Models that were asked:", ""]
    for name, endpoint in recipe.endpoint.items():
        revision = f", revision `{endpoint.revision}`" if endpoint.revision else ""
        lines.append(f"- `{name}`: `{endpoint.model}` ({endpoint.form}{revision})")
    models: Counter[str] = sum((part.models for part in numbers.values()), Counter())
    if models:
        lines += ["", "Answers by model: " + ", ".join(f"`{m}` {n}" for m, n in sorted(models.items())) + "."]
    return "\n".join(lines)


def _stages(accounting: Accounting) -> str:
    rows = [
        (
            stage.name, KINDS[stage.kind].summary, stage.requested, stage.done,
            sum(stage.filtered.values()), sum(stage.failed.values()), stage.rows_made,
        )
        for stage in accounting.stages
    ]  # fmt: skip
    head = ("stage", "what it does", "requested", "done", "filtered", "failed", "rows made")
    return _table("## Counts per stage", head, rows)


def _filters(accounting: Accounting) -> str:
    rows = [
        (stage.name, rule, number, f"{number / max(1, stage.requested):.1%}")
        for stage in accounting.stages
        for rule, number in sorted(stage.filtered.items())
    ]
    failures = [
        (stage.name, f"failed: {reason}", number, f"{number / max(1, stage.requested):.1%}")
        for stage in accounting.stages
        for reason, number in sorted(stage.failed.items())
    ]
    return _table("## Left out, by rule", ("stage", "rule", "rows", "share"), rows + failures)


def _dropped(ledger: Reader, recipe: SynthRecipe) -> str:
    found = read_dropped(ledger, [stage.name for stage in recipe.stage], examples=1)
    return as_markdown(dropped_blocks(found)).rstrip("\n") if found else ""


def _contamination(recipe: SynthRecipe, ledger: Reader) -> str:
    stages = [stage for stage in recipe.stage if stage.kind == "decontaminate"]
    if not stages:
        return "## Decontamination\n\nThis data was not compared with any benchmark."
    lines = ["## Decontamination", ""]
    for stage in stages:
        files = ", ".join(f"`{Path(file).name}`" for file in stage.knobs.get("files", []))
        lines.append(
            f"`{stage.name}` compared every text with {files}: 13 words in a row, "
            "or 10 words in a row and over half of the item, or a whole short item."
        )
        hits: Counter[str] = Counter()
        for record, state, rule in ledger.inputs(stage.name):
            if state == FILTERED and rule == "contaminated":
                reason = next(r for s, _, _, r in ledger.work_of(record) if s == stage.name)
                hits[(reason or "").rpartition(": ")[0]] += 1
        lines += [f"- `{item}`: {number} rows" for item, number in sorted(hits.items())] or [
            "No row was hit."
        ]
    return "\n".join(lines)


def _judges(recipe: SynthRecipe, ledger: Reader) -> str:
    report = judge_report(ledger, recipe)
    return "## Judges\n\n" + "\n".join(f"- {line}" for line in report) if report else ""


def _people(reviews: Mapping[str, int]) -> str:
    """What reviewers did to the files."""
    return (
        "## People\n\n"
        f"{reviews['reviewed']} rows were reviewed: {reviews['left_out']} were rejected and left out, "
        f"{reviews['corrected']} have an answer that a person rewrote."
    )


def _statistics(numbers: dict[str, _Numbers]) -> str:
    rows = [
        (f"{name} {part}", len(values), *_quantiles(values))
        for name, found in numbers.items()
        for part, values in found.lengths.items()
    ]
    rows += [
        (f"{name} reward gap", len(found.gaps), *_quantiles(found.gaps))
        for name, found in numbers.items()
        if found.gaps
    ]
    text = _table(
        "## Lengths (characters) and reward gaps", ("what", "number", "10 %", "median", "90 %", "mean"), rows
    )
    for name, found in numbers.items():
        tasks = ", ".join(f"{task} {number}" for task, number in found.tasks.most_common())
        text += f"\n\nTasks in `{name}`: {tasks}."
    return text


def _quantiles(values: Sequence[float]) -> tuple[str, ...]:
    ordered = sorted(values)
    points = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.1, 0.5, 0.9)]
    return tuple(f"{value:.3g}" for value in [*points, sum(ordered) / len(ordered)])


def _limits(accounting: Accounting) -> str:
    text = "## Limits\n\nThe texts were written by language models: they contain errors and inherit biases."
    failed = accounting.num_failed
    if failed:
        text += f" {failed} pieces of work failed and are missing; `synth retry` tries them again."
    if accounting.num_pending:
        text += f" The run was not finished: {accounting.num_pending} pieces of work are pending."
    return text


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return as_markdown([Heading(title.removeprefix("## ")), Table(head, rows)]).rstrip("\n") if rows else ""


def write_plots(folder: Path, numbers: dict[str, _Numbers]) -> str:
    """Histograms of lengths, rewards and gaps, and the commonest topics; the card's section about them."""
    paths = []
    try:
        for name, found in numbers.items():
            if found.lengths:
                paths += _plots_of(folder, name.removesuffix(".jsonl"), found)
    except ConfigError as error:
        return f"## Plots\n\nThere are none: {error.message}."
    return "## Plots\n\n" + "\n".join(f"![{p.name}]({p.name})" for p in paths) if paths else ""


def _plots_of(folder: Path, stem: str, found: _Numbers) -> list[Path]:
    panels: list[tuple[str, str, dict[str, list[float]]]] = [
        ("characters", "length, characters", {k: list(map(float, v)) for k, v in found.lengths.items()})
    ]
    if found.gaps:
        rewards = {"chosen": found.chosen_rewards, "rejected": found.rejected_rewards}
        panels += [
            ("reward", "reward", rewards),
            ("reward_gap", "reward of chosen less rejected", {"": found.gaps}),
        ]
    paths = [
        draw_histograms(
            series, folder / f"{stem}.{name}.png", title=f"{stem}: {label}", x_label=label, y_label="rows"
        )
        for name, label, series in panels
    ]
    if found.topics:
        common = sorted(found.topics.items(), key=lambda entry: (-entry[1], entry[0]))[:20]
        bars = [Bar(topic[:48], float(number), label=str(number)) for topic, number in common]
        paths.append(
            draw_bars(Bars(f"{stem}: commonest topics", "rows", bars), folder / f"{stem}.topics.png")
        )
    return paths
