"""Loops at the end of an answer, and ordinary answers that only look a little like them."""

from __future__ import annotations

import pytest

from nemotron4.grading.repetition import is_looping, period

TEXT = "The sun is a star. It shines because hydrogen becomes helium in its core, which sets energy free. "


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (TEXT + "again " * 60, 6),
        (TEXT + "=" * 200, 1),
        (TEXT + "I will count. One, two, three.\n" * 8, 31),
        (TEXT + "again " * 60 + "aga", 6),  # cut in the middle of the piece
    ],
)
def test_a_piece_that_is_repeated_to_the_end_is_found(text: str, length: int) -> None:
    assert period(text) == length


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        TEXT,
        TEXT * 3,  # three times is no loop yet
        "again " * 60 + TEXT,  # it got out of it
        "ha " * 10,
        "\n".join(f"{n}. Item number {n} of the list" for n in range(40)),
    ],
)
def test_other_answers_are_no_loops(text: str) -> None:
    assert period(text) is None


def test_an_answer_that_ended_by_itself_does_not_loop() -> None:
    assert is_looping("again " * 60, "length")
    assert is_looping("again " * 60, None)  # nobody knows how it ended
    assert not is_looping("again " * 60, "stop")
