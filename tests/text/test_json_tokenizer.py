from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemotron4.errors import TemplateError, TokenizerError
from nemotron4.text.chat_template import ChatTemplate
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.tokenizer import check_round_trip
from nemotron4.text.tokenizer_files import open_tokenizer, read_chat_template

CHATML_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_bpe(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CHATML_MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(["<think>"])
    # A post-processor that adds a token must not matter: no token is added to a text.
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    return tokenizer


def llama_like(
    corpus: tuple[str, ...], markers: tuple[str, ...] = ("<|a|>", "<|b|>")
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *markers]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + byte_pieces, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(corpus[:3], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def nemotron_like(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    """SentencePiece's word mark at the very start only, and markers between which nothing is added."""
    tokenizer = llama_like(corpus, ("<extra_id_0>", "<extra_id_1>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level_bpe, llama_like, nemotron_like])
def directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: tuple[str, ...]
) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if request.param is not byte_level_bpe:
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=request.param(corpus), **names)
    fast.save_pretrained(folder)
    return folder


def test_ids_and_texts_are_those_of_transformers(directory: Path, corpus: tuple[str, ...]) -> None:
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    for text in (*corpus, "", " ", "  two", "<|im_start|>user\nhi<|im_end|>\n<think>", "🎉 12 </s>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_any_row_of_ids_decodes_as_in_the_library(corpus: tuple[str, ...]) -> None:
    library = byte_level_bpe(corpus)
    ours = JsonTokenizer(json.loads(library.to_str()), source="test")
    draw = random.Random(2)
    for _ in range(2000):
        ids = [draw.randrange(len(CHATML_MARKERS), ours.vocab_size - 1) for _ in range(6)]
        assert ours.decode(ids) == library.decode(ids)


@given(text=st.text(), cut=st.integers(min_value=0, max_value=20))
def test_every_text_survives_whole_and_in_two_parts(text: str, cut: int, byte_level: JsonTokenizer) -> None:
    assert byte_level.decode(byte_level.encode(text, parse_special=False)) == text
    first = byte_level.encode(text[:cut], parse_special=False)
    second = byte_level.encode(text[cut:], parse_special=False, continues=True)
    assert byte_level.decode(first + second) == text


@pytest.fixture(scope="module")
def byte_level(corpus: tuple[str, ...]) -> JsonTokenizer:
    return JsonTokenizer(json.loads(byte_level_bpe(corpus).to_str()), source="test")


def test_a_text_that_continues_gets_no_word_mark(corpus: tuple[str, ...]) -> None:
    ours = JsonTokenizer(json.loads(llama_like(corpus).to_str()), source="test")
    first, second = ours.encode("The quick"), ours.encode(" fox\nnext", continues=True)
    assert ours.decode(first + second) == "The quick fox\nnext"
    assert ours.encode("\n", continues=True) == [ours.token_id("<0x0A>")]


def test_markers_are_spelled_when_they_are_not_parsed(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    marker_ids = {tokenizer.token_id(marker) for marker in tokenizer.markers}
    text = "a" + "".join(tokenizer.markers) + "b"
    assert marker_ids <= set(tokenizer.encode(text))
    for continues in (False, True):
        ids = tokenizer.encode(text, parse_special=False, continues=continues)
        assert not marker_ids & set(ids)
        assert tokenizer.decode(ids) == text


def test_special_tokens_vanish_but_nemotrons_markers_stay(corpus: tuple[str, ...]) -> None:
    tokenizer = JsonTokenizer(json.loads(nemotron_like(corpus).to_str()), source="test")
    assert tokenizer.decode([2, *tokenizer.encode("<extra_id_1></s>")]) == "<extra_id_1>"
    assert tokenizer.is_control(2)
    assert not tokenizer.is_control(4)


def test_a_marker_that_is_not_flagged_special_stays_in_the_text(corpus: tuple[str, ...]) -> None:
    library = byte_level_bpe(corpus)
    library.add_tokens(["<|tool|>"])
    tokenizer = JsonTokenizer(json.loads(library.to_str()), source="test")
    tool = tokenizer.token_id("<|tool|>")
    assert tool not in tokenizer.encode("<|tool|>", parse_special=False)
    assert tokenizer.encode("<|tool|>") == [tool]
    assert tokenizer.decode(tokenizer.encode("<|tool|>")) == "<|tool|>"


def test_added_tokens_that_are_not_special_are_text(byte_level: JsonTokenizer) -> None:
    assert byte_level.markers == CHATML_MARKERS
    assert byte_level.encode("<think>", parse_special=False) == [byte_level.token_id("<think>")]
    assert byte_level.decode(byte_level.encode("<think>")) == "<think>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unheard"}}, "not a tokenizer.json that can be read"),
        ({"model": None}, "expected a JSON object with a field 'model'"),
        ({"added_tokens": [{"id": 1}]}, "has no field 'content' of type str"),
        ({"added_tokens": 5}, "the added token 5 has no field 'id' of type int"),
        ({"decoder": []}, "not a tokenizer.json that can be read"),
        ({"normalizer": {"type": "Prepend"}}, "not a tokenizer.json that can be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    change: dict[str, Any], message: str, tmp_path: Path, corpus: tuple[str, ...]
) -> None:
    spec = json.loads(byte_level_bpe(corpus).to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=message) as caught:
        open_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.message


def test_files_are_found_in_order(
    tmp_path: Path,
    sentencepiece_model: bytes,
    corpus: tuple[str, ...],
    train_sentencepiece: Callable[..., bytes],
) -> None:
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json or tokenizer\.model"):
        open_tokenizer(tmp_path)
    (tmp_path / "0123abcd_mt_nlg_plus.model").write_bytes(sentencepiece_model)
    assert open_tokenizer(tmp_path).token_id("<extra_id_1>") == 5
    (tmp_path / "other.model").write_bytes(train_sentencepiece("unigram"))
    with pytest.raises(TokenizerError, match="found 2 files"):
        open_tokenizer(tmp_path)
    named = open_tokenizer(tmp_path, sentencepiece_name="nemo:0123abcd_mt_nlg_plus.model")
    assert named.vocab_size == 420
    (tmp_path / "tokenizer.json").write_text(byte_level_bpe(corpus).to_str())
    assert open_tokenizer(tmp_path).markers == CHATML_MARKERS


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path, corpus: tuple[str, ...]) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_bpe(corpus).to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eot>"}}')
    with pytest.raises(TokenizerError, match="end of text token '<eot>' is not in the vocabulary"):
        open_tokenizer(tmp_path)


def test_tokens_that_only_the_configuration_declares_are_added_as_in_transformers(
    tmp_path: Path, corpus: tuple[str, ...]
) -> None:
    library = byte_level_bpe(corpus)
    library.add_tokens(["<|later|>"])
    spec = json.loads(library.to_str())
    size = len(spec["model"]["vocab"])
    removed = [token for token in spec["added_tokens"] if token["content"] != "<|im_start|>"]
    spec["added_tokens"] = [token for token in removed if token["content"] != "<|later|>"]
    flags = {"lstrip": False, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    declared = {"1": {"content": "<|im_start|>", **flags}, str(size): {"content": "<|later|>", **flags}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"added_tokens_decoder": declared, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = open_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a <|im_start|>  b<|later|> c<|im_end|>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.markers == (*CHATML_MARKERS, "<|later|>")
    config["added_tokens_decoder"]["7"] = {"content": "<|no|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"'<\|no\|>' has id 7, which another piece"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_that_loses_text_of_the_card_is_refused(
    tmp_path: Path, corpus: tuple[str, ...], card_prompt: str
) -> None:
    spec = json.loads(byte_level_bpe(corpus).to_str()) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="at character 12: expected 'System"):
        check_round_trip(open_tokenizer(tmp_path), card_prompt)


def test_the_chat_template_is_found(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_template(tmp_path) == "one"
    named = [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_chat_template(tmp_path) == "four"


@pytest.mark.parametrize("as_files", [True, False])
def test_a_template_of_its_own_for_tools_renders_conversations_with_tools(
    tmp_path: Path, as_files: bool
) -> None:
    usual, for_tools = "  {% if true %}\nplain\n{% endif %}  \n", "\n {{ tools[0].name }}\n  "
    if as_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(for_tools)
        (tmp_path / "chat_template.jinja").write_text(usual)
    else:
        named = [{"name": "tool_use", "template": for_tools}, {"name": "default", "template": usual}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    source = read_chat_template(tmp_path)
    assert source is not None
    template = ChatTemplate(source)
    for tools in (None, [{"name": "add"}]):
        (expected,), _ = render_jinja_template(
            [[{"role": "user", "content": "x"}]], tools=tools, chat_template=for_tools if tools else usual
        )
        assert template.render({"messages": [{"role": "user", "content": "x"}], "tools": tools}) == expected
    with pytest.raises(TemplateError, match="there are no tools"):
        template.render({"messages": [{"role": "assistant", "tool_calls": [{}]}], "tools": None})


def test_a_copy_in_another_process_spells_and_parses_alike(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    text = "a" + "".join(tokenizer.markers)
    spelled = tokenizer.encode(text, parse_special=False)
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - made here
    assert copy.encode(text, parse_special=False) == spelled
    assert copy.encode(text) == tokenizer.encode(text)
    assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_an_id_without_a_piece_is_an_error(byte_level: JsonTokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"no piece has id {byte_level.vocab_size}"):
        byte_level.decode([byte_level.vocab_size])


def test_tokens_added_beside_a_sentencepiece_model_are_not_lost(
    tmp_path: Path, sentencepiece_model: bytes
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    decoder = {"5": {"content": "<extra_id_1>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert open_tokenizer(tmp_path).vocab_size == 420
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 420}')
    with pytest.raises(TokenizerError, match=r"'<\|im_end\|>' \(id 420\) is not in tokenizer\.model"):
        open_tokenizer(tmp_path)
