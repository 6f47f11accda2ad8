"""An AEGIS result as report.md, report.html and a plot: the rate, the shares, and what is in neither."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemotron4.plots import draw_bars
from nemotron4.redteam.aegis import AegisResult, Tally
from nemotron4.report import Bar, Bars, Block, Heading, Table, Text, percent
from nemotron4.report import write_report as write_files
from nemotron4.text.content_safety import CATEGORIES, OTHER

PICTURE = "shares.png"


def category_name(code: str) -> str:
    return "no category of the policy" if code == OTHER else f"{code} {CATEGORIES[code]}"


def left_out_text(result: AegisResult) -> str:
    """What is in no rate before the classifier's words are read."""
    parts = [
        _counts("without an answer", result.no_answer),
        _counts("without a judgment", result.no_judgment),
    ]
    return f"{result.num_prompts} prompts; {parts[0]}; {parts[1]}"


def _counts(what: str, reasons: Mapping[str, int]) -> str:
    named = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{sum(reasons.values())} {what}" + (f" ({named})" if named else "")


def missing_text(result: AegisResult) -> str:
    """Which categories the prompts do not cover, in words."""
    missing = result.missing_categories
    if not result.prompts_by_category:
        return "The file of prompts names no categories, so it is not known which of the 13 it covers."
    if not missing:
        return "The prompts cover all 13 categories."
    return f"No prompt is of the categories {', '.join(category_name(code) for code in missing)}."


def verdict(result: AegisResult) -> str:
    main = result.tally("defensive", "tolerant")
    if main.rate is None:
        return f"{result.model}: no answer was judged, so nothing can be said."
    count = f"{main.unsafe} of {main.judged}"
    said = f"{result.model}: {percent(main.rate, main.interval)} of the judged answers are unsafe ({count})"
    said += f"; {result.num_blocked} were blocked." if result.num_blocked else "."
    return said + (f" {main.unknown} of the classifier's replies could not be read." if main.unknown else "")


def summary_blocks(result: AegisResult) -> list[Block]:
    """What a reader at a terminal sees; the report begins with it."""
    rates = [
        [t.treatment, t.parsing, percent(t.rate, t.interval), f"{t.unsafe}/{t.judged}", t.blocked, t.unknown]
        for t in result.tallies
    ]
    return [
        Text(verdict(result), is_verdict=True),
        Text(f"Judged by {result.classifier}. {left_out_text(result)}."),
        Table(["Needs Caution", "parsing", "unsafe rate", "unsafe", "blocked", "unparsed"], rates),
        share_bars(result),
        Text(missing_text(result)),
    ]


def share_bars(result: AegisResult) -> Bars:
    main = result.tally("defensive", "tolerant")
    bars = [
        Bar(category_name(code), 100 * count / main.unsafe, label=f"{count}/{main.unsafe}")
        for code, count in main.by_category.items()
    ]
    none = [Bar("no unsafe answer", None)]
    return Bars(
        "What the unsafe answers are about",
        "% of the unsafe answers",
        bars or none,
        limit=100,
        picture=PICTURE,
    )


def report_blocks(result: AegisResult) -> list[Block]:
    readings = [result.tally("defensive", "tolerant"), result.tally("permissive", "tolerant")]
    codes = [
        code
        for code in (*CATEGORIES, OTHER)
        if code != OTHER or any(OTHER in t.by_category for t in readings)
    ]
    shares = [
        [category_name(code), *(_share(t, code) for t in readings), _prompts(result, code)] for code in codes
    ]
    total = ["all unsafe answers", *(f"{t.unsafe}" for t in readings), str(result.num_prompts)]
    return [
        Heading(f"AEGIS evaluation of {result.model}", 1),
        *summary_blocks(result),
        Text(
            "Unsafe over safe, unsafe and blocked, with Wilson's 95 % interval. Blocked answers are empty, "
            "or a guard stopped them: nobody saw them. Defensive takes Needs Caution as "
            "unsafe, permissive as safe. Tolerant reads the reply's first word, strict the exact protocol. "
            "Unparsed replies are neither safe nor unsafe. "
            f"Policy: {result.policy} (sha256 {result.policy_sha256[:12]}). {result.num_cut} answers were "
            "longer than the classifier is shown."
        ),
        Heading("Categories"),
        Text(
            "Shares of the unsafe answers, each counted once under its first category. They sum to 100 % and "
            "say nothing about how often an answer is unsafe."
        ),
        Table(["category", "defensive", "permissive", "prompts in the file"], [*shares, total]),
        Heading("Next to the technical report"),
        Text(
            "It calls the overall unsafe rate very low and comparable to Llama-3-70B-Instruct's. Its figures "
            "are known from one secondary source only and are shares by category with one overall rate (2.0 "
            "for 340B-Instruct). Its classifier and prompts are on a hub; another classifier, or another "
            "wording of the policy, is another measurement."
        ),
    ]


def _share(tally: Tally, code: str) -> str:
    count = tally.by_category.get(code, 0)
    return f"{100 * count / tally.unsafe:.1f} % ({count})" if tally.unsafe else "-"


def _prompts(result: AegisResult, code: str) -> str:
    if not result.prompts_by_category or code == OTHER:
        return "-"
    return str(result.prompts_by_category.get(code, 0)) if code in result.prompts_by_category else "none"


def write_report(result: AegisResult, folder: Path) -> list[Path]:
    picture = draw_bars(share_bars(result), folder / PICTURE)
    return [*write_files(folder, f"AEGIS evaluation of {result.model}", report_blocks(result)), picture]
