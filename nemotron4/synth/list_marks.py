"""Lists whose items are marked: lines with numbers, letters, bullets or labels; numbers inside one line."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reject:
    """A part of the reply that is no item, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class Span:
    start: int
    end: int


Found = tuple[list[Span], list[Reject]]


CLOSING = re.compile(
    r"\s*(?:\*\*)?(?:let me know|i hope|hope (?:this|these)|feel free|these (?:topics|questions|tasks|items|"
    r"problems|are)|this list|each of these|would you like|if you (?:need|want|have|would)|please note|"
    r"note that|good luck|enjoy)\b",
    re.IGNORECASE,
)


_DIGITS = r"[\d]{1,3}"
MARKER = re.compile(
    rf"""
    (?P<indent>[^\S\n]*)
    (?:(?P<quote>>)[ ])?
    (?:(?P<heading>\#{{1,6}})[ ]+(?=\S))?
    (?P<bold>\*\*|__)?
    (?:
      (?P<label>[^\W\d_]{{1,14}}[ ]?\#?{_DIGITS})[ ]?(?:\*\*|__)?[ ]?[:.)：、\-–—][ ]*(?:\*\*|__)?
    | (?P<number>\(?{_DIGITS})(?:[.)\]:、．）：]|[ ][-–—:])(?:\*\*|__)?(?:[^\S\n]+|(?=[^\s\d.)]))
    | (?P<circled>[①-⑳])[ ]?
    | (?P<letter>\(?[A-Za-z])[.)](?:[^\S\n]+)
    | (?P<roman>\(?(?:x{{0,1}}(?:ix|iv|v?i{{1,3}}|v)|x)|\(?(?:X{{0,1}}(?:IX|IV|V?I{{1,3}}|V)|X))[.)][^\S\n]+
    | (?P<bullet>[-*+•–—▪◦‣·●○■□▸►➤✓✔])(?:[^\S\n]+(?:\[[ xX]\][ ])?|(?=[^\s\-*+]))
    )
    """,
    re.VERBOSE,
)
_STYLES = ("label", "number", "circled", "roman", "letter", "bullet")


@dataclass(frozen=True)
class Line:
    start: int
    end: int
    text: str
    style: str | None = None  # None: no marker
    indent: int = 0
    content: int = 0  # where the text after the marker starts
    is_bold: bool = False  # the marker opened a bold that the content closes


def lines_of(reply: str, region: Span) -> list[Line]:
    found = []
    position = region.start
    for raw in reply[region.start : region.end].splitlines(keepends=True):
        text = raw.rstrip("\n\r")
        start, position = position, position + len(raw)
        if re.fullmatch(r"\s*(?:[-*_=]\s*){3,}", text):  # a ruler is no line of its own
            text = ""
        indent = len(text.expandtabs(4)) - len(text.expandtabs(4).lstrip())
        match = MARKER.match(text)
        if match is None:
            found.append(Line(start, start + len(text), text, indent=indent))
            continue
        style = next(name for name in _STYLES if match[name])
        if style == "bullet" and match["bold"]:  # "**-" is not a marker
            style = None  # type: ignore[assignment]
        style = f"{style}{match['bullet']}" if style == "bullet" else style
        style = f"heading {style}" if style and match["heading"] else style
        if style == "letter" and match["letter"].lower() in ("i", "v", "x"):
            style = "roman?"
        is_bold = bool(match["bold"]) and not re.search(r"(\*\*|__)\s*$", text[: match.end()])
        found.append(Line(start, start + len(text), text, style, indent, start + match.end(), is_bold))
    # "i." is a Roman one only in the company of "ii."
    meaning = "roman" if any(line.style == "roman" for line in found) else "letter"
    return [dataclasses.replace(line, style=meaning) if line.style == "roman?" else line for line in found]


def read_marked(reply: str, region: Span, expected: int | None) -> Found:
    """Lines that begin with a number, letter, bullet or label, with what follows until the next one."""
    lines = lines_of(reply, region)
    chosen = _main_style(lines, expected)
    if chosen is None:
        return [], []
    style, indent = chosen
    heads = [i for i, line in enumerate(lines) if line.style == style and abs(line.indent - indent) <= 1]
    if len(heads) == 1 and len(read_inline_numbers(reply, region, expected)[0]) > 1:
        return [], []
    rejects = [
        Reject(line.text.strip(), "before the list") for line in lines[: heads[0]] if line.text.strip()
    ]
    spans = []
    for head, following in zip(heads, [*heads[1:], len(lines)], strict=True):
        last = _last_line(lines, head, following, is_final=following == len(lines))
        spans.append(Span(lines[head].content, lines[last].end))
        rest = [line.text.strip() for line in lines[last + 1 : following] if line.text.strip()]
        rejects += [
            Reject(text, "after the list" if following == len(lines) else "between items") for text in rest
        ]
    return spans, rejects


def _main_style(lines: list[Line], expected: int | None) -> tuple[str, int] | None:
    """Style and indentation of the list's items: the outermost, unless another has the asked number."""
    counts: dict[tuple[str, int], int] = {}
    for line in lines:
        if line.style is not None:
            key = next((k for k in counts if k[0] == line.style and abs(k[1] - line.indent) <= 1), None)
            key = key or (line.style, line.indent)
            counts[key] = counts.get(key, 0) + 1
    if "letter" in {style for style, _ in counts} and counts.get(("letter", 0), 0) == 1:
        counts.pop(("letter", 0))  # a lone "A. Smith" or "i. e." is prose
    if not counts:
        return None
    if expected is not None and expected > 1:
        exact = [key for key, number in counts.items() if number == expected]
        if exact:
            return min(exact, key=lambda key: key[1])
    outermost = min(indent for _, indent in counts)
    outer = {key: number for key, number in counts.items() if key[1] <= outermost + 1}
    best = max(outer, key=lambda key: outer[key])
    if counts[best] == 1 and expected is not None and expected > 1:
        best = max(counts, key=lambda key: counts[key])
    return best


def _last_line(lines: list[Line], head: int, following: int, *, is_final: bool) -> int:
    """The last line of an item: wrapped and indented lines belong to it, prose after a blank one does not."""
    last = head
    was_blank = False
    for i in range(head + 1, following):
        line = lines[i]
        if not line.text.strip():
            was_blank = True
            continue
        is_deeper = line.indent > lines[head].indent + 1
        if line.style is not None and not is_deeper and was_blank and is_final:
            break  # another list after this one
        if was_blank and not is_deeper and line.style is None:
            break
        if not is_deeper and CLOSING.match(line.text):
            break
        last = i
    return last


def read_inline_numbers(reply: str, region: Span, expected: int | None) -> Found:
    """``1. tea 2. bread 3. rivers`` in one line: numbers that count up from 1."""
    marks: list[re.Match[str]] = []
    for match in re.compile(r"(?:(?<=\s)|^)\(?(\d{1,2})[.):]\s+").finditer(reply, region.start, region.end):
        if int(match[1]) == len(marks) + 1:
            marks.append(match)
    if len(marks) < 2:
        return [], []
    ends = [mark.start() for mark in marks[1:]] + [region.end]
    return [Span(mark.end(), end) for mark, end in zip(marks, ends, strict=True)], []
