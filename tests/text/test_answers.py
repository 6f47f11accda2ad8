"""Text of an answer: nothing of a stop string is ever sent, and nothing of the answer is lost."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.fake_tokenizer import EOS, FakeTokenizer
from nemotron4.text.answers import AnswerText


def _answer(reply: str, stops: tuple[str, ...] = (), *, strip: bool = False, limit: int = 500) -> list[str]:
    """What each token let the server send."""

    async def run() -> list[str]:
        engine = FakeEngine(reply)
        params = SamplingParams(
            max_new_tokens=limit, temperature=0, stop_strings=stops, stop_token_ids=frozenset({EOS, 5})
        )
        answer = AnswerText(engine.tokenizer, SamplingRequest((EOS,), params, drops_newline=strip))
        sent = [answer.push(step) async for step in engine.stream([EOS], params)]
        assert "".join(sent) == answer.text
        return sent

    return asyncio.run(run())


def test_a_character_is_sent_when_all_its_bytes_are_there() -> None:
    assert _answer("aé€b") == ["a", "", "é", "", "", "€", "b", ""]


def test_the_start_of_a_stop_string_waits_until_it_is_refuted() -> None:
    assert _answer("xENDy", ("END!",)) == ["x", "", "", "", "ENDy", ""]


def test_text_behind_the_stop_string_in_one_piece_is_cut_off() -> None:
    assert "".join(_answer("so Done!", ("Done",))) == "so "


def test_the_earliest_stop_string_wins() -> None:
    assert "".join(_answer("abc", ("bc", "abc"))) == ""


def test_a_stop_token_is_no_part_of_the_answer() -> None:
    assert "".join(_answer("fine<extra_id_1>User")) == "fine"


def test_one_newline_of_the_format_is_stripped() -> None:
    assert "".join(_answer("a\n\n", strip=True)) == "a\n"
    assert "".join(_answer("a\n<extra_id_1>", strip=True)) == "a"
    assert "".join(_answer("a\nSTOP", ("STOP",), strip=True)) == "a"
    assert "".join(_answer("a\n\nb", strip=True)) == "a\n\nb"


def test_an_answer_cut_by_its_length_keeps_everything() -> None:
    assert "".join(_answer("a\nb", strip=True, limit=2)) == "a\n"
    assert "".join(_answer("xEN", ("END",), limit=3)) == "xEN"
    assert "".join(_answer("é", limit=1)) == "\N{REPLACEMENT CHARACTER}"


@settings(deadline=None)
@given(
    st.text(alphabet="ab\n é", max_size=12),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=2),
    st.booleans(),
)
def test_what_is_sent_is_the_reply_up_to_the_first_stop(reply: str, stops: list[str], strip: bool) -> None:
    # The reference: the shortest run of tokens whose text holds a stop string, cut before the string.
    tokenizer, ids = FakeTokenizer(), FakeTokenizer().encode(reply)
    texts = [tokenizer.decode(ids[:end]) for end in range(1, len(ids) + 1)]
    text = next((text for text in texts if any(stop in text for stop in stops)), reply)
    expected = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
    if strip:
        expected = expected.removesuffix("\n")
    assert "".join(_answer(reply, tuple(stops), strip=strip)) == expected
