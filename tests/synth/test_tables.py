"""How rows are packed: every form gives back the same bytes, and needs its sources only where it says so."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.errors import DataError
from nemotron4.synth.tables import pack, pack_derived, unpack, unpack_alone

KEY, OTHER_KEY = b"k" * 16, b"o" * 16
REPLY = orjson.dumps({"text": " ".join(f"sentence {i} of a reply" for i in range(60))})
PARENT = orjson.dumps({"messages": [["user", " ".join(f"word{i}" for i in range(100))]]})


def derived_row() -> bytes:
    answered = {"prompt": orjson.loads(PARENT), "responses": [orjson.loads(REPLY)]}
    return orjson.dumps(answered)


@given(text=st.binary(max_size=2000), parent=st.binary(max_size=50_000), reply=st.binary(max_size=50_000))
def test_every_content_comes_back(text: bytes, parent: bytes, reply: bytes) -> None:
    for content in (text, parent + reply):
        assert unpack_alone(pack(content)) == content
        blob = pack_derived(content, parent, [(KEY, reply)])
        assert unpack(blob, lambda: parent, {KEY: reply}.__getitem__) == content


def test_a_row_made_of_its_sources_takes_little_room() -> None:
    row = derived_row()
    blob = pack_derived(row, PARENT, [(KEY, REPLY)])
    assert len(blob) < len(pack(row)) / 2
    assert unpack(blob, lambda: PARENT, {KEY: REPLY}.__getitem__) == row


def test_a_row_that_shares_nothing_is_read_without_its_sources() -> None:
    row = orjson.dumps([f"{i * 7919 % 10007}" for i in range(300)])
    assert unpack_alone(pack_derived(row, PARENT, [(KEY, REPLY)])) == row


def test_wrong_sources_are_noticed() -> None:
    blob = pack_derived(derived_row(), PARENT, [(KEY, REPLY), (OTHER_KEY, b"more")])
    with pytest.raises(DataError, match="does not fit its sources"):
        unpack(blob, lambda: PARENT, {KEY: REPLY, OTHER_KEY: b"less"}.__getitem__)
