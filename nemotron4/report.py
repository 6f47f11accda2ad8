"""A report is a list of blocks. It is written for the terminal, as JSON, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemotron4.json_form import to_json
from nemotron4.runs import write_file


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. ``is_verdict`` marks the sentence that says what came out: it is first and larger."""

    text: str
    is_verdict: bool = False


@dataclass(frozen=True)
class Table:
    """Cells become text, None an empty one. A column of numbers is set to the right by itself."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    def __post_init__(self) -> None:
        rows = [["" if cell is None else str(cell) for cell in row] for row in self.rows]
        object.__setattr__(self, "rows", rows)


@dataclass(frozen=True)
class Bar:
    """``value`` None is drawn as its label alone. Bars of one name are next to each other, one per series."""

    name: str
    value: float | None
    lower: float | None = None
    upper: float | None = None
    label: str = ""
    series: str = ""


@dataclass(frozen=True)
class Bars:
    """``unit`` says what the numbers are; ``picture`` is a drawing of the same for Markdown."""

    title: str
    unit: str
    bars: Sequence[Bar]
    limit: float | None = None
    picture: str | None = None

    @property
    def end(self) -> float:
        """The end of the axis."""
        shown = [bar.upper if bar.upper is not None else bar.value or 0.0 for bar in self.bars]
        return self.limit or max(shown, default=0.0) or 1.0

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(bar.series for bar in self.bars))


@dataclass(frozen=True)
class Picture:
    path: str
    caption: str


@dataclass(frozen=True)
class Links:
    items: Sequence[tuple[str, str]]  # text, address


@dataclass(frozen=True)
class Folded:
    """Texts of a model or a person, hidden until the reader opens them."""

    summary: str
    texts: Sequence[tuple[str, str]]  # heading, text


Block = Heading | Text | Table | Bars | Picture | Links | Folded


class Bounds(Protocol):
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...


def percent(share: float | None, interval: Bounds | None = None) -> str:
    """``41.2 % [30.1, 53.2]``, or ``unscored``."""
    if share is None:
        return "unscored"
    span = "" if interval is None else f" [{100 * interval.lower:.1f}, {100 * interval.upper:.1f}]"
    return f"{100 * share:.1f} %{span}"


def printable(text: str) -> str:
    """What does not print would be invisible, or worse: a terminal would act on it."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text.replace("\r", ""))


_NUMBER = re.compile(r"[-+<±]?\d")
_WORD = re.compile(r"[^\W\d_]{4}")  # longer than a unit


def numeric_columns(table: Table) -> list[bool]:
    """Columns in which every cell that says something is a number, perhaps with a unit or an interval."""
    columns = zip(*table.rows, strict=True) if table.rows else ([] for _ in table.columns)
    said = [[cell for cell in cells if cell not in ("", "-", "unscored", "none")] for cells in columns]
    return [bool(cells) and all(map(_is_number, cells)) for cells in said]


def _is_number(cell: str) -> bool:
    return bool(_NUMBER.match(cell)) and not _WORD.search(cell)


# --- JSON


def as_json(blocks: Iterable[Block]) -> list[dict[str, Any]]:
    """Each block as an object whose ``kind`` is its name in lower case."""
    return [{"kind": type(block).__name__.lower(), **to_json(block)} for block in blocks]


# --- Markdown


def as_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(filter(None, map(_markdown, blocks))) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, is_verdict):
            return f"**{_plain(text)}**" if is_verdict else _plain(text)
        case Table(columns, rows, title):
            rules = ["---:" if is_number else "---" for is_number in numeric_columns(block)]
            lines = ["| " + " | ".join(map(_cell, line)) + " |" for line in (columns, rules, *rows)]
            return (f"{_plain(title)}\n\n" if title else "") + "\n".join(lines)
        case Bars(title, unit, _, _, picture):
            if picture is not None:
                return f"![{title}, {unit}]({picture})"
            return "```text\n" + "\n".join(bar_lines(block)) + "\n```"
        case Picture(path, caption):
            return f"![{caption}]({path})"
        case Links(items):
            return "\n".join(f"- [{_plain(text)}]({address})" for text, address in items)
        case Folded():
            return _folded(block)  # Markdown has no form of it, and passes HTML through


def _plain(text: str) -> str:
    """Words of a model or a file open no HTML and load no picture where the Markdown is shown."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable(text)).replace("![", "!\\[")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _folded(block: Folded) -> str:
    """A blank line would end the HTML inside Markdown, so line ends are written as characters."""
    entries = "".join(
        f"<div><p><b>{html.escape(heading)}</b></p><pre>{_one_line(text)}</pre></div>"
        for heading, text in block.texts
    )
    summary = html.escape(block.summary)
    return f'<details><summary>{summary}</summary><div class="sides">{entries}</div></details>'


def _one_line(text: str) -> str:
    return html.escape(printable(text)).replace("\n", "&#10;").replace("\\u", "&#92;u")


def bar_lines(bars: Bars, width: int = 32) -> list[str]:
    """Bars of block characters, one line each."""
    names = [" ".join(filter(None, (bar.name, bar.series))) for bar in bars.bars]
    longest = max(map(len, names), default=0)
    lines = [f"{bars.title}, {bars.unit}"]
    for name, bar in zip(names, bars.bars, strict=True):
        drawn = "" if bar.value is None else "█" * round(width * min(1.0, bar.value / bars.end))
        lines.append(f"{name:<{longest}}  {drawn:<{width}}  {bar.label}".rstrip())
    return lines


# --- HTML

COLOURS = (  # Okabe and Ito, with grey for black, on which intervals could not be seen
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442",
)  # fmt: skip
MUTED = "#b4b4b4"

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c;"
    "overflow-wrap:break-word}"
    "h1{font-size:1.6rem;line-height:1.2}.verdict{font-size:1.25rem;border-left:.3rem solid #0072b2;"
    "padding:.4rem .8rem;background:#f1f6fa}"
    ".wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "td,th{border:1px solid #d0d0d0;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    ".sides{display:grid;gap:0 1rem;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr))}"
    "th:first-child{min-width:6rem}th{background:#f3f5f1}.n{text-align:right}td.n{white-space:nowrap}img{max-width:100%}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.6rem}summary{cursor:pointer}"
    "figure{margin:1.2rem 0}figcaption{font-weight:600}.bar{display:grid;grid-template-columns:minmax(6rem,"
    "14rem) 1fr minmax(5rem,13rem);gap:.2rem .8rem;align-items:center;margin:.3rem 0}"
    ".track{position:relative;height:1.1rem;background:#eee}.track i{position:absolute;top:0;bottom:0;left:0}"
    ".track b{position:absolute;top:50%;height:0;border-top:2px solid #1c1c1c}.key{margin-right:1rem}"
    ".key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem}"
    "@media(max-width:600px){body{margin:1rem auto}.bar{grid-template-columns:1fr auto}.track{grid-row:2;"
    "grid-column:1/-1}td,th{padding:.2rem .4rem}td:not(.n){min-width:8rem}"
    "p:has(>img){overflow-x:auto}img{max-width:none;width:44rem}}"
)


def as_html(blocks: Iterable[Block], title: str) -> str:
    """One page without scripts; everything from results is escaped."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(map(_html, blocks)) + "\n</html>\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text, is_verdict):
            kind = ' class="verdict"' if is_verdict else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Table():
            return _html_table(block)
        case Bars():
            return _html_bars(block)
        case Picture(path, caption):
            return f'<p><img src="{html.escape(path)}" alt="{html.escape(caption)}"></p>'
        case Links(items):
            entries = "".join(
                f'<li><a href="{html.escape(address)}">{html.escape(text)}</a></li>'
                for text, address in items
            )
            return f"<ul>{entries}</ul>"
        case Folded():
            return _folded(block)


def _html_table(table: Table) -> str:
    kinds = [' class="n"' if is_number else "" for is_number in numeric_columns(table)]

    def row(cells: Sequence[str], tag: str) -> str:
        inside = (
            f"<{tag}{kind}>{html.escape(c)}</{tag}>" for c, kind in zip(cells, kinds or cells, strict=True)
        )
        return "<tr>" + "".join(inside) + "</tr>"

    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    head = row(table.columns, "th")
    # Where a narrow window cuts the table, the keyboard must be able to scroll it.
    name = html.escape(table.title or f"table: {', '.join(table.columns[:3])}")
    wide = f'<div class="wide" role="region" tabindex="0" aria-label="{name}">'
    return f"{wide}<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _html_bars(bars: Bars) -> str:
    """Bars of plain elements: they fit any width, which a picture does not."""
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(bars.series)}
    parts = [f"<figcaption>{html.escape(bars.title)}, {html.escape(bars.unit)}</figcaption>"]
    if len(colours) > 1:
        keys = (
            f'<span class="key"><i style="background:{c}"></i>{html.escape(n)}</span>'
            for n, c in colours.items()
        )
        parts.append(f"<p>{''.join(keys)}</p>")
    for bar in bars.bars:
        track = "" if bar.value is None else _track(bar, colours[bar.series], bars.end)
        parts.append(
            f'<div class="bar"><span>{html.escape(bar.name)}</span><span class="track">{track}</span>'
            f"<span>{html.escape(bar.label)}</span></div>"
        )
    return f"<figure>{''.join(parts)}</figure>"


def _track(bar: Bar, colour: str, end: float) -> str:
    value = f'<i style="width:{100 * min(1.0, (bar.value or 0) / end):.2f}%;background:{colour}"></i>'
    if bar.lower is None or bar.upper is None:
        return value
    left, right = 100 * max(0.0, bar.lower / end), 100 * min(1.0, bar.upper / end)
    return f'{value}<b style="left:{left:.2f}%;width:{right - left:.2f}%"></b>'


# --- the terminal and files


def print_report(blocks: Iterable[Block], *, width: int | None = None) -> None:
    """On stdout. Where that is no terminal, lines are as long as they need to be."""
    import sys

    from rich.console import Console

    if sys.stdout.isatty():
        console = Console(highlight=False, width=width)
        for block in blocks:
            _print(console, block)
        return
    console = Console(highlight=False, width=width or 200, color_system=None)
    with console.capture() as capture:
        for block in blocks:
            _print(console, block)
    for line in capture.get().splitlines():
        print(line.rstrip(), flush=True)


def _print(console: Any, block: Block) -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text as Styled

    match block:
        case Heading(text, level):
            console.print(Styled(printable(text), style="bold" if level > 1 else "bold underline"))
        case Text(text, is_verdict):
            console.print(Styled(printable(text), style="bold" if is_verdict else ""))
        case Table(columns, rows, title):
            if title:
                console.print(Styled(printable(title), style="bold"))
            grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
            for name, is_number in zip(columns, numeric_columns(block), strict=False):
                grid.add_column(Styled(printable(name)), justify="right" if is_number else "left")
            for row in rows:
                grid.add_row(*(Styled(printable(cell)) for cell in row))
            console.print(grid)
        case Bars():
            for line in bar_lines(block):
                console.print(Styled(printable(line)), soft_wrap=True)
        case Picture(path, caption):
            console.print(Styled(printable(f"{caption}: {path}")), soft_wrap=True)
        case Links(items):
            for text, address in items:
                console.print(Styled(printable(f"- {text}: {address}")), soft_wrap=True)
        case Folded(summary, texts):
            console.print(Styled(printable(f"{summary} ({len(texts)} texts, in the report's file)")))


def _inlined(block: Block, folder: Path) -> Block:
    """A picture inside the page, which then is one file that opens anywhere."""
    if not isinstance(block, Picture) or not (folder / block.path).is_file():
        return block
    kind = mimetypes.guess_type(block.path)[0] or "image/png"
    data = base64.b64encode((folder / block.path).read_bytes()).decode()
    return Picture(f"data:{kind};base64,{data}", block.caption)


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> list[Path]:
    """``report.md`` and ``report.html`` in the folder."""
    written = []
    page = as_html([_inlined(block, folder) for block in blocks], title)
    for name, content in (("report.md", as_markdown(blocks)), ("report.html", page)):
        write_file(folder / name, content.encode("utf-8", "backslashreplace"))
        written.append(folder / name)
    return written
