from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer
from nemotron4.text.tokenizer import TextStream, Tokenizer

texts = st.text(st.characters(codec="utf-8") | st.sampled_from("🎉👩🏽‍🚀你好é \n\ufffd"), max_size=30)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text_stream = TextStream(tokenizer)
    return [*(text_stream.push(token_id) for token_id in ids), text_stream.finish()]


@given(text=texts)
def test_parts_join_to_the_text_and_no_character_is_cut(
    text: str, nemotron_tokenizer: SentencePieceTokenizer, chatml_tokenizer: JsonTokenizer
) -> None:
    text = text.replace("▁", "")
    for tokenizer in (nemotron_tokenizer, chatml_tokenizer):
        parts = stream(tokenizer, tokenizer.encode(text, parse_special=False))
        assert "".join(parts) == text
        # Every part is whole characters: a cut one would show as a replacement that the text does not have.
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@given(ids=st.lists(st.integers(min_value=0, max_value=365), max_size=20))
def test_any_row_of_ids_joins_to_its_decoding(
    ids: list[int], nemotron_tokenizer: SentencePieceTokenizer, chatml_tokenizer: JsonTokenizer
) -> None:
    for tokenizer in (nemotron_tokenizer, chatml_tokenizer):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(prompt=texts.filter(lambda text: "▁" not in text and text != ""), text=texts)
def test_after_a_prompt_the_parts_join_to_the_rest_of_the_row(
    prompt: str, text: str, nemotron_tokenizer: SentencePieceTokenizer
) -> None:
    prompt_ids = nemotron_tokenizer.encode(prompt)
    new_ids = nemotron_tokenizer.encode(text, continues=True)
    text_stream = TextStream(nemotron_tokenizer, prompt_ids)
    parts = [*map(text_stream.push, new_ids), text_stream.finish()]
    assert prompt + "".join(parts) == nemotron_tokenizer.decode(prompt_ids + new_ids)


def test_a_leading_space_is_dropped_only_at_the_start(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    ids = nemotron_tokenizer.encode("The")
    assert "".join(stream(nemotron_tokenizer, ids)) == "The"
    after_prompt = TextStream(nemotron_tokenizer, prompt_ids=[4])
    assert "".join(map(after_prompt.push, ids)) == " The"
    after_control = TextStream(nemotron_tokenizer, prompt_ids=[2])
    assert "".join(map(after_control.push, ids)) == "The"


def test_an_emoji_comes_with_its_last_byte(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    ids = [8 + byte for byte in "🎉".encode()]
    assert stream(nemotron_tokenizer, ids) == ["", "", "", "🎉", ""]
    assert stream(nemotron_tokenizer, [*ids[:2], ids[0]]) == ["", "", "\ufffd\ufffd", "\ufffd"]
