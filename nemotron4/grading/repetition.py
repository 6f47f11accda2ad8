"""Answers that repeat themselves to their end: what a small greedy model does until its limit."""

from __future__ import annotations

TAIL_CHARACTERS = 600
MIN_REPEATED = 120  # characters that must be a repetition of what is before them
MIN_TIMES = 4


def period(text: str) -> int | None:
    """Length of the piece that the text's end repeats, four times or more; None if it does not repeat."""
    tail = text.rstrip()[-TAIL_CHARACTERS:][::-1]
    # The longest border of each beginning (Knuth, Morris and Pratt): length - border is the period.
    borders = [0] * len(tail)
    best = None
    for at in range(1, len(tail)):
        border = borders[at - 1]
        while border and tail[at] != tail[border]:
            border = borders[border - 1]
        borders[at] = border + (tail[at] == tail[border])
        length, found = at + 1, at + 1 - borders[at]
        if length >= MIN_TIMES * found and length - found >= MIN_REPEATED:
            best = found
    return best


def is_looping(text: str, finish_reason: str | None) -> bool:
    """It was cut at its limit (or nobody knows how it ended) while it repeated itself."""
    return finish_reason in (None, "length") and period(text) is not None
