from __future__ import annotations

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemotron4.errors import TokenizerError
from nemotron4.text.gguf_vocabulary import from_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def sentencepiece_metadata(model: bytes) -> dict[str, object]:
    """What a converter writes for a SentencePiece model."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(library.vocab_size())

    def kind(i: int) -> int:
        if library.is_control(i):
            return CONTROL
        if library.is_unknown(i):
            return UNKNOWN
        if library.is_byte(i):
            return BYTE
        return USER_DEFINED if library.id_to_piece(i).startswith("<extra_id_") else NORMAL

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [library.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
    }


def test_a_sentencepiece_vocabulary_encodes_as_the_model_it_came_from(
    sentencepiece_model: bytes, corpus: tuple[str, ...], card_prompt: str
) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = from_gguf(sentencepiece_metadata(sentencepiece_model))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (420, 2, 3)
    for text in (*corpus, card_prompt, "  two", "🎉", "", "\n\n12 345"):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == text
    assert tokenizer.markers == tuple(f"<extra_id_{n}>" for n in range(4))


def test_turn_markers_stay_text_when_a_converter_made_them_control(sentencepiece_model: bytes) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model)
    types = [CONTROL if kind == USER_DEFINED else kind for kind in metadata["tokenizer.ggml.token_type"]]  # type: ignore[attr-defined]
    tokenizer = from_gguf(metadata | {"tokenizer.ggml.token_type": types})
    assert tokenizer.decode(tokenizer.encode("<extra_id_1>User")) == "<extra_id_1>User"
    assert 5 in tokenizer.encode("<extra_id_1>User")


def test_the_unknown_token_may_be_named_by_its_id(sentencepiece_model: bytes) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model)
    types = [NORMAL if kind == UNKNOWN else kind for kind in metadata["tokenizer.ggml.token_type"]]  # type: ignore[attr-defined]
    metadata["tokenizer.ggml.token_type"] = types
    with pytest.raises(TokenizerError, match="unknown_token_id is missing"):
        from_gguf(metadata)
    assert from_gguf(metadata | {"tokenizer.ggml.unknown_token_id": 1}).vocab_size == 420


def test_without_a_space_prefix_texts_start_bare(sentencepiece_model: bytes) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = from_gguf(metadata)
    assert tokenizer.encode("<extra_id_1>") == [5]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def byte_level(pre: str, corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    """The tokenizer.json form that the published models with this pre-tokenizer have."""
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
    }[pre]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level_metadata(library: tokenizers.Tokenizer, pre: str) -> dict[str, object]:
    size = library.get_vocab_size()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [library.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * (size - 1),
        "tokenizer.ggml.merges": [" ".join(m) for m in json.loads(library.to_str())["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_a_byte_level_vocabulary_encodes_as_the_tokenizer_it_came_from(
    pre: str, corpus: tuple[str, ...]
) -> None:
    library = byte_level(pre, corpus)
    tokenizer = from_gguf(byte_level_metadata(library, pre))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    for text in (*corpus, "a<|end|>b", "  1234 don't\n\n \n x", "🎉 ½ ² ٣٤", "", "tail  \t "):
        assert tokenizer.encode(text) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", "123 4 ! Ċ I ' M"),
        ("gpt-2", "1234 ! Ċ I ' M"),
        ("smollm", "1 2 3 4 ! Ċ I ' M"),
        ("llama-bpe", "123 4 !Ċ I 'M"),
        ("qwen2", "1 2 3 4 !Ċ I 'M"),
    ],
)
def test_merges_stop_where_the_named_pre_tokenizer_cuts(pre: str, pieces: str) -> None:
    merged = ["12", "123", "1234", "!Ċ", "I'", "'M"]
    tokenizer = from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*pre_tokenizers.ByteLevel.alphabet(), *merged],
            "tokenizer.ggml.merges": [f"{piece[:-1]} {piece[-1]}" for piece in merged],
        }
    )
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234!\nI'M")] == pieces.split()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "unknown tokenizer.ggml.model 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing; expected a list"),
        ({"tokenizer.ggml.scores": [1e99] * 420}, "a token or score is out of range"),
        ({"tokenizer.ggml.scores": [0.5]}, "1 scores for 420 tokens"),
        ({"tokenizer.ggml.token_type": ["x"]}, "token_type holds something that is no number"),
        ({"tokenizer.ggml.eos_token_id": "3"}, "eos_token_id is '3'; expected an integer"),
        ({"tokenizer.ggml.token_type": [9]}, "1 token types for 420 tokens"),
        ({"tokenizer.ggml.eos_token_id": 420}, "eos_token_id is 420; expected an id below 420"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(
    change: dict[str, object], message: str, sentencepiece_model: bytes
) -> None:
    with pytest.raises(TokenizerError, match=message.replace(".", r"\.")):
        from_gguf(sentencepiece_metadata(sentencepiece_model) | change)


SPLITS = {
    "llama3": "HelloWORLD|'s| ÉcoleÄ| 漢字|123|4|!\n|x",
    "falcon3": "HelloWORLD|'s| ÉcoleÄ| 漢字|123|4|!\n|x",
    "smaug-bpe": "HelloWORLD|'s| ÉcoleÄ| 漢字|123|4|!\n|x",
    "dbrx": "HelloWORLD|'s| ÉcoleÄ| 漢字|123|4|!\n|x",
    "tekken": "Hello|WORLD|'s| ÉcoleÄ| 漢字|1|2|3|4|!\n|x",
    "gpt-4o": "Hello|WORLD's| ÉcoleÄ| 漢字|123|4|!\n|x",
    "deepseek-llm": "HelloWORLD|'|s| É|cole|Ä| |漢字|1234|!|\n|x",
    "deepseek-coder": "HelloWORLD|'|s| ÉcoleÄ| |漢字|1|2|3|4|!|\n|x",
    "deepseek-v3": "HelloWORLD|'s| ÉcoleÄ| |漢字|123|4|!\n|x",
    "seed-coder": "HelloWORLD|'s| ÉcoleÄ| 漢字|1|2|3|4|!|\n|x",
    "falcon": "HelloWORLD|'|s| ÉcoleÄ| 漢字|123|4|!|\n|x",
    "bloom": "HelloWORLD's| ÉcoleÄ| 漢字1234|!\n|x",
    "viking": "HelloWORLD's| ÉcoleÄ| 漢字|1|2|3|4|!\n|x",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_texts_are_cut_where_llama_cpp_cuts_them(pre: str, corpus: tuple[str, ...]) -> None:
    spec = from_gguf(byte_level_metadata(byte_level("gpt-2", corpus), pre)).specification  # type: ignore[attr-defined]
    spec["pre_tokenizer"]["pretokenizers"].pop()  # the spelling of bytes
    cut = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
    words = SPLITS[pre].split("|")
    assert [word for word, _ in cut.pre_tokenize_str("".join(words))] == words


def test_an_unknown_pre_tokenizer_is_named_with_the_nearest(corpus: tuple[str, ...]) -> None:
    metadata = byte_level_metadata(byte_level("gpt-2", corpus), "smolm")
    with pytest.raises(TokenizerError, match=r"unknown tokenizer\.ggml\.pre 'smolm'") as caught:
        from_gguf(metadata)
    assert caught.value.hint == "did you mean 'smollm'?"
