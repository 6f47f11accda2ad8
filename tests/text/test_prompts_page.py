"""The programs on docs/prompts.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(1, len(PROGRAMS) + 1))
def test_program_runs(program: str) -> None:
    exec(compile(program, str(PAGE), "exec"), {})


def test_the_page_has_programs() -> None:
    assert len(PROGRAMS) == 2
