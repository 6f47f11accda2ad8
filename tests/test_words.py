"""Help, messages, docstrings and comments use plain words."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nemotron4"
# "Is" and "next to" say the same; "stands for" is something else.
STILTED = re.compile(
    r"\bbeside\b|\bstands\b(?! (in )?for\b)|\bstand (in|on|at|before|with|there|under|next)\b(?! for)"
)


def test_nothing_stands_beside_something_else() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{token.start[0]}: {hit[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type in (tokenize.STRING, tokenize.COMMENT)
        for hit in STILTED.finditer(token.string)
    ]
    assert not found


def test_the_pages_use_plain_words_too() -> None:
    pages = [*PACKAGE.parent.glob("docs/**/*.md"), PACKAGE.parent / "README.md"]
    found = [
        f"{page.name}: {hit[0]}"
        for page in sorted(pages)
        for hit in STILTED.finditer(page.read_text(encoding="utf-8"))
    ]
    assert not found
