"""Lists out of free text, without a model: every item is an exact span of the reply, nothing is invented.

Readers are tried from the most to the least explicit form: JSON array, table, marked lines (numbers, letters,
bullets, labels), numbers inside one line, plain lines, commas. What is left out is kept with its reason.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemotron4.grading.refusals import is_refusal
from nemotron4.synth.list_marks import (
    CLOSING,
    MARKER,
    Found,
    Reject,
    Span,
    lines_of,
    read_inline_numbers,
    read_marked,
)


@dataclass(frozen=True)
class ListItem:
    """``text`` is ``reply[start:end]``; only JSON escapes are decoded."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ParsedList:
    items: tuple[ListItem, ...]
    parser: str
    rejects: tuple[Reject, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.items]


def normalise(text: str) -> str:
    """For comparing: NFKC, lower case, straight quotes, single spaces, no markdown, no end punctuation."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).lower()
    text = re.sub(r"[*_`~]+", "", text)
    return re.sub(r"\s+", " ", text).strip(" .,;:!?\"'")


def parse_list(reply: str, *, expected: int | None = None, is_truncated: bool = False) -> ParsedList:
    """The items of a reply that was asked for a list of ``expected`` items.

    More items than expected are all returned. ``is_truncated``: the reply was cut by its token limit, so the
    last item is not whole. Items that repeat an earlier one, refuse, or say nothing are rejects.
    """
    region = _body(reply)
    for name, reader in _READERS:
        spans, rejects = reader(reply, region, expected)
        if spans:
            return _accept(reply, spans, rejects, name, is_truncated=is_truncated)
    whole = reply[region.start : region.end].strip()
    return ParsedList((), "none", (Reject(whole, "no list found"),) if whole else ())


# --- the part of the reply that holds the list -----------------------------------------------------------

_THINKING = re.compile(r"<think>.*?</think>[ \t]*\n*", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def _body(reply: str) -> Span:
    """Inside the code fence if the reply has a single one that is no part of an item; else everything."""
    start, end = 0, len(reply)
    thinking = _THINKING.match(reply)
    if thinking:
        start = thinking.end()
    fences = list(_FENCE.finditer(reply, start))
    if len(fences) == 1:
        fence = fences[0]
        outside = reply[start : fence.start()] + "\n" + reply[fence.end() :]
        if not any(MARKER.match(line) for line in outside.splitlines()) and fence[2].strip():
            return Span(fence.start(2), fence.end(2))
    return Span(start, end)


# --- JSON ------------------------------------------------------------------------------------------------

_JSON_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"(\s*:)?')
_PYTHON_STRING = re.compile(r"'((?:[^'\\\n]|\\.|(?<=\w)'(?=\w))*)'(\s*:)?")


def _read_json(reply: str, region: Span, expected: int | None) -> Found:
    """An array of strings, perhaps inside an object, perhaps cut off."""
    opening = re.compile(r"^[^\S\n]*(?:\{\s*[\"']\w+[\"']\s*:\s*)?\[(?=\s*[\"'{\]])", re.MULTILINE).search(
        reply, region.start, region.end
    )
    if opening is None:
        return [], []
    strings = _JSON_STRING if '"' in reply[opening.end() : opening.end() + 40] else _PYTHON_STRING
    spans: list[Span] = []
    position = opening.end()
    while match := strings.search(reply, position, region.end):
        between = reply[position : match.start()]
        if spans and "]" in between:
            break
        if match[2] is None:
            spans.append(Span(match.start(1), match.end(1)))
        position = match.end()
    rest = reply[position : region.end].lstrip(" \t\n,")
    cut = [Reject(rest[1:], "truncated")] if rest[:1] in ('"', "'") else []
    return spans, cut


# --- tables, one line, plain lines, commas ---------------------------------------------------------------


def _read_table(reply: str, region: Span, expected: int | None) -> Found:
    """A Markdown table: the cell with the longest texts of every row below the ruler."""
    rows = [line for line in lines_of(reply, region) if line.text.strip().startswith("|")]
    ruler = next((i for i, row in enumerate(rows) if re.fullmatch(r"[\s|:\-]+", row.text)), None)
    if ruler is None or len(rows) - ruler < 3:
        return [], []
    cells = [
        [
            Span(row.start + m.start(1), row.start + m.end(1))
            for m in re.finditer(r"\|\s*([^|]*?)\s*(?=\|)", row.text)
        ]
        for row in rows[ruler + 1 :]
    ]
    widths = [sum(c[k].end - c[k].start for c in cells if k < len(c)) for k in range(max(map(len, cells)))]
    column = widths.index(max(widths))
    return [c[column] for c in cells if column < len(c)], [Reject(rows[0].text, "table head")]


_OPENING = re.compile(
    r"\s*(?:sure|certainly|of course|absolutely|okay|ok|great|here (?:is|are)|here's|below (?:is|are)|"
    r"the following|these are|as requested|i (?:have|can|will|'ve)|let'?s)\b.*[:.!]\s*$",
    re.IGNORECASE,
)


def _read_plain_lines(reply: str, region: Span, expected: int | None) -> Found:
    """One item a line. A first line that announces and a last line that says goodbye are left out."""
    lines = [line for line in lines_of(reply, region) if line.text.strip()]
    rejects = []
    if len(lines) > 1 and (lines[0].text.rstrip().endswith((":", "：")) or _OPENING.match(lines[0].text)):
        rejects.append(Reject(lines.pop(0).text.strip(), "before the list"))
    if len(lines) > 1 and CLOSING.match(lines[-1].text):
        rejects.append(Reject(lines.pop().text.strip(), "after the list"))
    if len(lines) < 2:
        return [], []
    return [Span(line.start, line.end) for line in lines], rejects


def _read_separated(reply: str, region: Span, expected: int | None) -> Found:
    """``tea, bread and rivers`` or semicolons, when at least three parts (or the asked number) result."""
    text = reply[region.start : region.end]
    head = re.match(r"[^,;\n]{0,80}?[:：]\s+", text)
    start = region.start + (head.end() if head else 0)
    for separator in (r";\s*(?:and\s+)?", r"\s*[、，]\s*", r",\s*(?:and\s+|or\s+)?|\s+and\s+(?=[^,]*$)"):
        spans = list(_split(reply, start, region.end, separator))
        if len(spans) == expected or (len(spans) >= 3 and max(s.end - s.start for s in spans) <= 80):
            return spans, [Reject(head[0].strip(), "before the list")] if head else []
    return [], []


def _split(reply: str, start: int, end: int, separator: str) -> Iterator[Span]:
    for match in re.compile(separator).finditer(reply, start, end):
        yield Span(start, match.start())
        start = match.end()
    yield Span(start, end)


def _read_single(reply: str, region: Span, expected: int | None) -> Found:
    """One item was asked for and nothing marks it: the whole reply."""
    return ([region], []) if expected == 1 else ([], [])


_READERS: tuple[tuple[str, Callable[[str, Span, int | None], Found]], ...] = (
    ("json", _read_json),
    ("table", _read_table),
    ("marked", read_marked),
    ("inline numbers", read_inline_numbers),
    ("lines", _read_plain_lines),
    ("separated", _read_separated),
    ("single", _read_single),
)


# --- what is accepted as an item -------------------------------------------------------------------------

_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'"})
_PAIRS = (("**", "**"), ("__", "__"), ('"', '"'), ("“", "”"), ("„", "“"), ("«", "»"), ("「", "」"),
          ("'", "'"),          ("‘", "’"), ("`", "`"), ("*", "*"), ("_", "_"))  # fmt: skip
_EMPTY = re.compile(r"(?:\.{2,}|…|\[[^\]]*\]|<[^>]*>|n/?a|none|tbd|etc\.?)", re.IGNORECASE)


def _accept(
    reply: str, spans: list[Span], rejects: list[Reject], parser: str, *, is_truncated: bool
) -> ParsedList:
    items: list[ListItem] = []
    seen: set[str] = set()
    was_cut = any(reject.reason == "truncated" for reject in rejects)
    for i, span in enumerate(spans):
        start, end = _trim(reply, span.start, span.end)
        text = reply[start:end]
        if parser == "json":
            text = _unescape(text)
        reason = _objection(text, seen)
        if is_truncated and not was_cut and i == len(spans) - 1:
            reason = "truncated"
        if reason is not None:
            rejects.append(Reject(text, reason))
            continue
        seen.add(normalise(text))
        items.append(ListItem(text, start, end))
    return ParsedList(tuple(items), parser, tuple(rejects))


def _objection(text: str, seen: set[str]) -> str | None:
    """Why a text is no item, or None."""
    plain = normalise(text)
    if not any(character.isalnum() for character in plain) and not re.search(r"[^\W_]|[@%*#$]\w*", text):
        return "empty"
    if _EMPTY.fullmatch(text.strip()):
        return "placeholder"
    if " " in plain and is_refusal(plain):  # "No" is an item of a list
        return "refusal"
    if plain in seen:
        return "repeated"
    return None


def _trim(reply: str, start: int, end: int) -> tuple[int, int]:
    """Shrink the span over spaces, a trailing comma, and quotes or emphasis that wrap the whole item."""
    while True:
        before = (start, end)
        while start < end and reply[start].isspace():
            start += 1
        while end > start and reply[end - 1].isspace():
            end -= 1
        text = reply[start:end]
        if text.endswith(('",', "',", "**,")):
            end -= 1
            continue
        for left, right in _PAIRS:
            inner = text[len(left) : len(text) - len(right)]
            is_wrapped = text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)
            if is_wrapped and left not in inner and right not in inner and inner.strip():
                start, end = start + len(left), end - len(right)
                break
        if (opened := _dangling_bold(reply, start, end)) is not None:
            start, end = opened
        if (start, end) == before:
            return start, end


def _dangling_bold(reply: str, start: int, end: int) -> tuple[int, int] | None:
    """``**1. Tea**``: the marker took the opening stars, the item keeps the closing ones."""
    text = reply[start:end]
    if text.endswith("**") and text.count("**") == 1:
        return start, end - 2
    return None


def _unescape(text: str) -> str:
    try:
        found = str(json.loads(f'"{text}"'))
        found.encode()  # half of a character pair is no text
        return found
    except ValueError:
        return text.replace("\\'", "'")
