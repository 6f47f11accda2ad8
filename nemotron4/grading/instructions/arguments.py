"""Reading an instruction's arguments: a missing or impossible one is the item's fault, not the reply's."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from nemotron4.errors import DataError

Arguments = Mapping[str, Any]


def integer(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"argument {name!r} is {value!r}; expected an integer of 0 or more")
    return value


def text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"argument {name!r} is {value!r}; expected a string")
    return value


def texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(word, str) for word in value):
        raise DataError(f"argument {name!r} is {value!r}; expected a list of strings")
    return list(value)


def compares(count: int, arguments: Arguments, *, relation: str, threshold: str) -> bool:
    """Whether the count is ``less than`` or ``at least`` the threshold that the arguments name."""
    wanted, limit = arguments.get(relation), integer(arguments, threshold)
    if wanted == "less than":
        return count < limit
    if wanted == "at least":
        return count >= limit
    raise DataError(f"argument {relation!r} is {wanted!r}; expected 'less than' or 'at least'")


def letter(arguments: Arguments, *, seed: int) -> str:
    """The letter to count, in lower case.

    Two prompts of the data ask for ``#`` and ``!``. The original then counts a letter drawn at random; the
    same draw is made here from the seed, so that a reply has one score.
    """
    value = arguments.get("letter")
    if isinstance(value, str) and len(value) == 1 and "a" <= value.lower() <= "z":
        return value.lower()
    return random.Random(f"{seed} {value}").choice(string.ascii_lowercase)
