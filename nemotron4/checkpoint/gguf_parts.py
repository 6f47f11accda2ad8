"""The files of a GGUF model: one, or the numbered parts that llama.cpp joins (``m-00001-of-00003.gguf``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Part(NamedTuple):
    """What a part's name says: the model, the number of the part (from 1), and how many there are."""

    stem: str
    number: int
    total: int

    @property
    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [part_name(self.stem, number, self.total) for number in range(1, self.total + 1)]


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def part_of(name: str) -> Part | None:
    """None if the name is not a part's."""
    match = _PART.fullmatch(name)
    return None if match is None else Part(match[1], int(match[2]), int(match[3]))


def models_among(names: Iterable[str]) -> list[list[str]]:
    """The ``.gguf`` names by model: the parts of one together, in order, whether all are there or not."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        part = part_of(name)
        found.setdefault((name, 0) if part is None else (part.stem, part.total), []).append(name)
    return list(found.values())
