"""An AEGIS result as report.md, report.html and a plot: the rate, the shares, and what is in neither."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemotron4.errors import ConfigError
from nemotron4.pages import Block, Heading, Paragraph, Picture, Table, as_html, as_markdown
from nemotron4.redteam.aegis import AegisResult, Tally
from nemotron4.text.content_safety import CATEGORIES, OTHER


def category_name(code: str) -> str:
    return "no category of the policy" if code == OTHER else f"{code} {CATEGORIES[code]}"


def rate_text(tally: Tally) -> str:
    """``2.0 % [1.3, 3.0]``, or ``unscored`` where nothing was judged."""
    if tally.rate is None or tally.interval is None:
        return "unscored"
    lower, upper = 100 * tally.interval.lower, 100 * tally.interval.upper
    return f"{100 * tally.rate:.1f} % [{lower:.1f}, {upper:.1f}]"


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


def result_lines(result: AegisResult) -> list[str]:
    lines = [f"{result.model}, judged by {result.classifier}: {left_out_text(result)}"]
    for tally in result.tallies:
        judged = tally.safe + tally.unsafe
        lines.append(
            f"  {tally.treatment:<11}{tally.parsing:<10}unsafe {rate_text(tally):<24}"
            f"{tally.unsafe}/{judged}, unparsed {tally.unknown}"
        )
    main = result.tally("defensive", "tolerant")
    lines.append("  shares of the unsafe answers (defensive, tolerant), no rates:")
    for code, count in main.by_category.items():
        lines.append(
            f"    {category_name(code):<34}{100 * count / main.unsafe:5.1f} %  {count}/{main.unsafe}"
        )
    if not main.by_category:
        lines.append("    none was unsafe")
    lines.append(f"  {missing_text(result)}")
    return lines


def report_blocks(result: AegisResult, pictures: list[Picture]) -> list[Block]:
    rates = [
        [t.treatment, t.parsing, rate_text(t), f"{t.unsafe}/{t.safe + t.unsafe}", str(t.unknown)]
        for t in result.tallies
    ]
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
        Paragraph(
            f"Judged by {result.classifier} with the policy of {result.policy} (sha256 "
            f"{result.policy_sha256[:12]}). {left_out_text(result)}. {result.num_cut} answers were longer "
            "than the classifier is shown."
        ),
        Heading("How many answers are unsafe"),
        Paragraph(
            "Unsafe over safe and unsafe, with Wilson's 95 % interval. Defensive takes Needs Caution as "
            "unsafe, permissive as safe. Tolerant reads the reply's first word, strict the exact protocol. "
            "Unparsed replies are neither safe nor unsafe."
        ),
        Table(["Needs Caution", "parsing", "unsafe rate", "unsafe", "unparsed"], rates),
        Heading("What the unsafe answers are about"),
        Paragraph(
            "Shares of the unsafe answers, each counted once under its first category. They sum to 100 % and "
            "say nothing about how often an answer is unsafe. " + missing_text(result)
        ),
        Table(["category", "defensive", "permissive", "prompts in the file"], [*shares, total]),
        *pictures,
        Heading("Beside the technical report"),
        Paragraph(
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
    try:
        from nemotron4.redteam.plots import draw_shares
    except ImportError as error:
        raise ConfigError(
            f"plots need matplotlib, which is not installed ({error})", hint="pip install 'nemotron4[plot]'"
        ) from error
    main = result.tally("defensive", "tolerant")
    title = f"{result.model}: unsafe {rate_text(main)} of all answers; below, shares of the unsafe ones"
    picture = draw_shares(
        {category_name(code): count for code, count in main.by_category.items()}, title, folder / "shares.png"
    )
    blocks = report_blocks(result, [Picture(picture.name, "Shares of the unsafe answers by category")])
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(as_markdown(blocks), encoding="utf-8")
    page.write_text(as_html(blocks, f"AEGIS evaluation of {result.model}"), encoding="utf-8")
    return [markdown, page, picture]
