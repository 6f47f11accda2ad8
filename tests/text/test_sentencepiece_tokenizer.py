from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.errors import TokenizerError
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer
from nemotron4.text.tokenizer import check_round_trip

MARKERS = tuple(f"<extra_id_{n}>" for n in range(4))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, train_sentencepiece: Callable[..., bytes]) -> bytes:
    return train_sentencepiece(request.param)


def test_ids_and_texts_are_the_librarys(model: bytes, corpus: tuple[str, ...], card_prompt: str) -> None:
    tokenizer = SentencePieceTokenizer(model, source="test")
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (library.vocab_size(), 2, 3)
    for text in (*corpus, card_prompt, "", " ", "  two", " lead", "tail ", "🎉 <s> </s>", "\0\n\n\t"):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text)) == text


def test_any_row_of_ids_decodes_as_in_the_library(model: bytes) -> None:
    tokenizer = SentencePieceTokenizer(model, source="test")
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    draw = random.Random(1)
    for _ in range(3000):
        # Half of the ids are byte pieces, so that broken characters are frequent.
        ids = [draw.choice([draw.randrange(tokenizer.vocab_size), draw.randrange(8, 264)]) for _ in range(7)]
        assert tokenizer.decode(ids) == library.decode(ids)


def test_markers_survive_and_control_pieces_vanish(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    assert nemotron_tokenizer.markers == MARKERS
    assert nemotron_tokenizer.encode("<extra_id_1>")[-1] == 5
    assert nemotron_tokenizer.decode([2, 5, 3, 0]) == "<extra_id_1>"
    assert [nemotron_tokenizer.is_control(i) for i in (0, 2, 3, 4, 5, 300)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("marker", [*MARKERS, "<s>", "</s>", "<pad>"])
def test_markers_are_spelled_when_they_are_not_parsed(
    marker: str, nemotron_tokenizer: SentencePieceTokenizer
) -> None:
    ids = nemotron_tokenizer.encode(f"a {marker}\n{marker}", parse_special=False)
    assert not set(ids) & set(range(8))
    assert nemotron_tokenizer.decode(ids) == f"a {marker}\n{marker}"


@given(text=st.text(), cut=st.integers(min_value=0, max_value=40))
def test_every_text_survives_whole_and_in_two_parts(
    text: str, cut: int, nemotron_tokenizer: SentencePieceTokenizer
) -> None:
    # The library takes U+2581 for a space: that is SentencePiece, not a loss made here.
    text = text.replace("▁", "")
    assert nemotron_tokenizer.decode(nemotron_tokenizer.encode(text)) == text
    parts = nemotron_tokenizer.encode(text[:cut] or "a") + nemotron_tokenizer.encode(
        text[cut:], continues=True, parse_special=False
    )
    assert nemotron_tokenizer.decode(parts) == (text[:cut] or "a") + text[cut:]


def test_symbols_that_group_spaces_or_digits_are_no_markers(
    train_sentencepiece: Callable[..., bytes],
) -> None:
    tokenizer = SentencePieceTokenizer(
        train_sentencepiece(symbols=("<extra_id_0>", "▁▁", "00")), source="test"
    )
    assert tokenizer.markers == ("<extra_id_0>",)
    assert tokenizer.token_id("▁▁") in tokenizer.encode("a  b", parse_special=False)


def test_pieces_are_found_by_their_text(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    assert nemotron_tokenizer.token_id("<0x0A>") == 8 + 10
    assert nemotron_tokenizer.piece(8 + 10) == "<0x0A>"
    assert nemotron_tokenizer.token_id("<unk>") == 1
    assert nemotron_tokenizer.token_id("no such piece") is None


def test_half_a_surrogate_pair_is_refused_with_its_place(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 2 of the text is U\+D800"):
        nemotron_tokenizer.encode("ab\ud800")


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"broken\.model: not a SentencePiece model"):
        SentencePieceTokenizer.read(path)
    with pytest.raises(TokenizerError, match=r"absent\.model: cannot be read"):
        SentencePieceTokenizer.read(tmp_path / "absent.model")


def test_the_round_trip_check_names_the_first_difference(
    nemotron_tokenizer: SentencePieceTokenizer, card_prompt: str
) -> None:
    check_round_trip(nemotron_tokenizer, card_prompt)
    with pytest.raises(TokenizerError, match=r"at character 6: expected '▁two', got ' two'"):
        check_round_trip(nemotron_tokenizer, "one is▁two")


def test_an_id_without_a_piece_is_an_error(nemotron_tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(TokenizerError, match="no piece has id 420; ids are below 420"):
        nemotron_tokenizer.decode([420])


def test_a_copy_in_another_process_spells_and_parses_alike(
    nemotron_tokenizer: SentencePieceTokenizer, card_prompt: str
) -> None:
    copy = pickle.loads(pickle.dumps(nemotron_tokenizer))  # noqa: S301 - made here
    for parse_special in (True, False):
        expected = nemotron_tokenizer.encode(card_prompt, parse_special=parse_special)
        assert copy.encode(card_prompt, parse_special=parse_special) == expected
    assert (copy.bos_id, copy.eos_id) == (2, 3)
