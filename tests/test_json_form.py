"""The one writer and the one reader of dataclasses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from nemotron4.json_form import HIDDEN, FieldError, JsonForm, from_json, named, to_json


@dataclass(frozen=True)
class Inner(JsonForm):
    name: str
    size: int = field(default=0, metadata=named("bytes"))
    also_written: ClassVar = {"twice": "doubled"}

    @property
    def doubled(self) -> int:
        return 2 * self.size


@dataclass(frozen=True, kw_only=True)
class Outer(JsonForm):
    kind: Literal["a", "b"]
    parts: tuple[Inner, ...]
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    share: float | None = None
    file: Path | None = None
    secret: Any = field(default=None, metadata=HIDDEN)


@dataclass(frozen=True)
class Loose(JsonForm):
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    omits_defaults = True
    extra = "ignore"


WHOLE = Outer(
    kind="a",
    parts=(Inner("x", 3), Inner("y")),
    by_name={"z": Inner("z")},
    share=0.5,
    file=Path("a/b"),
    secret=1,
)


def test_what_is_written_is_json_and_is_read_back() -> None:
    row = json.loads(json.dumps(WHOLE.to_json()))
    assert row["parts"][0] == {"name": "x", "bytes": 3, "twice": 6}
    assert row["file"] == "a/b"
    assert "secret" not in row
    again = Outer.from_json(row)
    assert again.to_json() == WHOLE.to_json()
    assert (again.parts, again.by_name, again.file) == (WHOLE.parts, WHOLE.by_name, WHOLE.file)


@pytest.mark.parametrize(
    ("change", "words", "path"),
    [
        ({"kind": "c"}, "kind is 'c'; expected 'a' or 'b'", "kind"),
        ({"parts": [{"name": "x"}, {"name": 5}]}, "parts[1].name is 5; expected a string", "parts[1].name"),
        ({"parts": [{}]}, "field 'parts[0].name' is missing; expected a string", ""),
        ({"parts": {}}, "parts is {}; expected a list", "parts"),
        ({"by_name": {"q": 1}}, "by_name.q is 1; expected a table", "by_name.q"),
        ({"share": True}, "share is True; expected a number", "share"),
        ({"shere": 1}, "unknown key 'shere'", "shere"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], words: str, path: str) -> None:
    with pytest.raises(FieldError) as caught:
        Outer.from_json({"kind": "a", "parts": [], **change})
    assert str(caught.value) == words
    assert caught.value.path == path


def test_a_missing_field_says_what_was_expected() -> None:
    with pytest.raises(FieldError, match="field 'kind' is missing; expected 'a' or 'b'"):
        Outer.from_json({})


def test_rows_of_other_programs_may_have_more_columns_and_nulls() -> None:
    assert Loose.from_json({"text": "a", "meta": None, "score": 1}) == Loose("a")
    assert Loose("a").to_json() == {"text": "a"}


def test_plain_values_of_any_kind() -> None:
    assert to_json({"a": (1, {3, 2}), "b": Counter("aab"), "c": Inner("x")}) == {
        "a": [1, [2, 3]],
        "b": {"a": 2, "b": 1},
        "c": {"name": "x", "bytes": 0, "twice": 0},
    }
    assert from_json(tuple[int, ...], [1, 2]) == (1, 2)
