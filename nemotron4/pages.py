"""Report pages: blocks written as Markdown and as one HTML page without scripts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


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


Block = Heading | Paragraph | Table | Picture | Links | Folded


def as_markdown(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Table(columns, rows):
                lines = [columns, ["---"] * len(columns), *rows]
                parts.append("\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines))
            case Picture(path, caption):
                parts.append(f"![{caption}]({path})")
            case Links(items):
                parts.append("\n".join(f"- [{text}]({address})" for text, address in items))
            case Folded():
                parts.append(_folded(block))  # Markdown has no form of it, and passes HTML through
    return "\n\n".join(parts) + "\n"


def _folded(block: Folded) -> str:
    """A blank line would end the HTML inside Markdown, so line ends are written as characters."""
    entries = "".join(
        f"<p><b>{html.escape(heading)}</b></p><pre>{_one_line(text)}</pre>" for heading, text in block.texts
    )
    return f"<details><summary>{html.escape(block.summary)}</summary>{entries}</details>"


def _one_line(text: str) -> str:
    escaped = html.escape(text.replace("\r", "")).replace("\n", "&#10;")
    # What does not print would be invisible, or worse: it might act.
    return "".join(c if c.isprintable() else f"&#92;u{ord(c):04x}" for c in escaped)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;"
    "overflow-x:auto}"
    "td,th{border:1px solid #d0d0d0;padding:.3rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}th{background:#f3f5f1}img{max-width:100%}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.6rem}summary{cursor:pointer}"
)


def as_html(blocks: Iterable[Block], title: str) -> str:
    """One page without scripts; everything from results is escaped."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Table(columns, rows):
                head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
                )
                parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            case Picture(path, caption):
                parts.append(f'<p><img src="{html.escape(path)}" alt="{html.escape(caption)}"></p>')
            case Links(items):
                entries = "".join(
                    f'<li><a href="{html.escape(address)}">{html.escape(text)}</a></li>'
                    for text, address in items
                )
                parts.append(f"<ul>{entries}</ul>")
            case Folded():
                parts.append(_folded(block))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
