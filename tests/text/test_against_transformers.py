"""Every shape of ``tokenizer.json``: ids, texts, streams and conversations are those of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.prompt import encode_conversation, from_template
from nemotron4.text.tokenizer import TextStream, Tokenizer

MARKERS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[UNK]"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = [
    *(
        "def f(x):\n    return x\n",
        "  two",
        "\t",
        "\n\n",
        "你好世界。",
        "🎉👩🏽‍🚀",
        "é",
        "e\u0301",
        "\x00\x07",
    ),
    *(
        " the",
        "The",
        "▁",
        "<s>",
        "</s>",
        "<|im_end|>",
        "<|im_start|>user\n",
        "  <|im_end|>  ",
        "<tool>",
        "12345",
    ),
    *(
        "a<tool>b",
        "Grüße",
        "Привет",
        "'s",
        "'S",
        "...",
        "        ",
        "\u200b",
        "İ",
        "ﬁ",
        "<0x0A>",
        "user",
        ".",
    ),
]


def texts(number: int = 500) -> list[str]:
    draw = random.Random(5)
    return ["".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(number)]


def trained(tokenizer: tokenizers.Tokenizer, corpus: tuple[str, ...], **settings: Any) -> None:
    size = settings.pop("vocab_size", 600)
    kind = trainers.UnigramTrainer if "unk_token" in settings else trainers.BpeTrainer
    if isinstance(tokenizer.model, models.WordPiece):
        kind = trainers.WordPieceTrainer
    tokenizer.train_from_iterator(
        corpus, kind(vocab_size=size, show_progress=False, special_tokens=MARKERS, **settings)
    )


def llama3(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, corpus, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def prefix_space(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = llama3(corpus)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def metaspace(
    corpus: tuple[str, ...], scheme: str = "first", *, legacy: bool = False
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme)])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=560, show_progress=False, special_tokens=["<unk>", *MARKERS, *pieces]),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in ("<unk>", *MARKERS)]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def phi3(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    """Markers that take the spaces around them."""
    spec = json.loads(metaspace(corpus, legacy=True).to_str())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|im_start|>", "</s>")
        token["lstrip"] = token["content"] == "<|im_end|>"
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def gemma(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    """Runs of word marks and line breaks are added tokens that are not special."""
    tokenizer = metaspace(corpus, "never")
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Replace(" ", "▁"), None  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("▁▁", "▁▁▁▁", "\n\n")])
    return tokenizer


def flags(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = llama3(corpus)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [AddedToken("<tool>", single_word=True), AddedToken("the", normalized=True, lstrip=True)]
    )
    return tokenizer


def word_piece(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trained(tokenizer, corpus)
    return tokenizer


def unigram(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    trained(tokenizer, corpus, vocab_size=200, unk_token="[UNK]")
    return tokenizer


def no_decoder(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = word_piece(corpus)
    tokenizer.decoder = None  # type: ignore[assignment]
    return tokenizer


def neighbours(corpus: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A decoder that looks at the last piece."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trained(tokenizer, corpus, end_of_word_suffix="</w>")
    return tokenizer


SHAPES: dict[str, Callable[[tuple[str, ...]], tokenizers.Tokenizer]] = {
    "llama3": llama3,
    "prefix space": prefix_space,
    "metaspace first": metaspace,
    "metaspace always": lambda corpus: metaspace(corpus, "always"),
    "metaspace never": lambda corpus: metaspace(corpus, "never"),
    "llama2": lambda corpus: metaspace(corpus, legacy=True),
    "phi3": phi3,
    "gemma": gemma,
    "flags": flags,
    "word piece": word_piece,
    "unigram": unigram,
    "no decoder": no_decoder,
    "neighbours": neighbours,
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, corpus: tuple[str, ...]) -> tuple[JsonTokenizer, Any]:
    library = SHAPES[request.param](corpus)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", chat_template=CHATML,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    spec = json.loads(theirs.backend_tokenizer.to_str())
    return JsonTokenizer(spec, source=request.param, bos="<s>", eos="</s>"), theirs


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    text_stream = TextStream(tokenizer)
    return "".join([*map(text_stream.push, ids), text_stream.finish()])


def test_ids_texts_and_streams_of_500_texts(pair: tuple[JsonTokenizer, Any]) -> None:
    ours, theirs = pair
    for text in texts():
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        decoded = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == decoded, text
        assert stream(ours, ids) == decoded, text
        if ours.decodes_each_token and "\ufffd" not in decoded:
            library, steps = theirs.backend_tokenizer, DecodeStream(skip_special_tokens=True)
            assert "".join(steps.step(library, token_id) or "" for token_id in ids) == decoded, text


def test_conversations_are_split_as_transformers_splits_them(pair: tuple[JsonTokenizer, Any]) -> None:
    ours, theirs = pair
    prompt_format = from_template(CHATML, ours)
    draw = random.Random(7)
    plain = [text for text in texts() if not any(marker in text for marker in MARKERS)]
    for _ in range(60):
        messages = [Message(role, draw.choice(plain)) for role in ("system", "user", "assistant", "user")]
        rows = [message.to_json() for message in messages]
        ids = theirs.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
        assert prompt_format.encode(ours, messages) == ids, messages


def test_the_first_marker_of_a_metaspace_file_is_followed_by_no_word_mark(corpus: tuple[str, ...]) -> None:
    ours = JsonTokenizer(json.loads(metaspace(corpus).to_str()), source="test")
    prompt_format = from_template(CHATML, ours)
    pieces = [ours.piece(i) for i in prompt_format.encode(ours, [Message("user", "Hi")])]
    assert not any(piece.startswith("▁") for piece in pieces), pieces


def test_four_spaces_of_a_gemma_file_stay_four_spaces(corpus: tuple[str, ...]) -> None:
    ours = JsonTokenizer(json.loads(gemma(corpus).to_str()), source="test")
    text = "def f(x):\n    return"
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode([ours.token_id("▁▁▁▁"), *ours.encode("return")]) == "    return"  # type: ignore[list-item]


def test_what_a_user_spells_never_becomes_a_marker(pair: tuple[JsonTokenizer, Any]) -> None:
    ours, _ = pair
    if isinstance(ours.specification["model"]["vocab"], list):
        pytest.skip("a unigram model has the marker as a piece: the text is refused")
    prompt_format = from_template(CHATML, ours)
    end = ours.token_id("<|im_end|>")
    assert prompt_format.encode(ours, [Message("user", "a <|im_end|> b")]).count(end) == 1  # type: ignore[arg-type]


def test_a_saved_folder_gives_the_same_tokenizer(tmp_path: Path, corpus: tuple[str, ...]) -> None:
    from nemotron4.text.tokenizer_files import open_tokenizer

    PreTrainedTokenizerFast(tokenizer_object=gemma(corpus), eos_token="</s>").save_pretrained(tmp_path)
    assert open_tokenizer(tmp_path).decode(open_tokenizer(tmp_path).encode("a    b")) == "a    b"


# Constructs of the published templates: tools, thoughts, loop controls, filters, marks of what trains.
FAMILIES = {
    "tools": (
        "{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
        "{{- '</tools>\n' }}{%- endif %}{%- for m in messages %}{%- if m.tool_calls %}"
        "{%- for call in m.tool_calls %}{{- call.function.name ~ ': ' ~ (call.function.arguments | tojson) }}"
        "{%- endfor %}{%- else %}{{- m.role ~ ': ' ~ m.content | trim ~ '\n' }}{%- endif %}{%- endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ bos_token }}",
    "refusal": "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}ok",
    "loops": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ m.content[:4] ~ ns.n }}"
        "{% endfor %}{{ messages | length }}{{ {'a': 'é'} | tojson(indent=1) }}"
    ),
    "thoughts": "{% for m in messages %}{{ m.thinking or '' }}{{ m.reasoning_content or '' }}|{% endfor %}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]
CALLED = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "Röme"}}}]}
TALKS = [
    [Message("system", " S "), Message("user", "a\n  "), Message("assistant", "b", {"thinking": "hm"})],
    [Message("user", "q"), Message("assistant", "", CALLED), Message("tool", "{}"), Message("user", "<x>")],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_render_byte_for_byte(family: str, corpus: tuple[str, ...]) -> None:
    ours = JsonTokenizer(json.loads(llama3(corpus).to_str()), source="test", bos="<s>", eos="</s>")
    source = FAMILIES[family]
    for messages in TALKS:
        for tools in (None, TOOLS):
            rows = [message.to_json() for message in messages]
            try:
                [expected], _ = render_jinja_template(
                    [rows], chat_template=source, tools=tools, bos_token="<s>", eos_token="</s>"
                )
            except jinja2.TemplateError as error:
                expected = str(error)
            own = from_template(source, ours)
            try:
                found = replace(own, writer=replace(own.writer, tools=tuple(tools or ()))).render(  # type: ignore[type-var]
                    messages, add_generation_prompt=False
                )
            except TemplateError as error:
                found = error.message.partition(": ")[2]
            assert found == expected


def test_what_trains_is_what_the_template_marks(corpus: tuple[str, ...]) -> None:
    marked = CHATML.replace(
        "m['content'] + '<|im_end|>' + '\n' }}",
        "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    library = llama3(corpus)
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=marked)
    ours = JsonTokenizer(json.loads(library.to_str()), source="test")
    turns_of = zip(("user", "assistant") * 2, ("One", "two <tag>", "3", "4"), strict=True)
    talk = [Message(role, text) for role, text in turns_of]
    expected = theirs.apply_chat_template(
        [message.to_json() for message in talk], return_dict=True, return_assistant_tokens_mask=True
    )
    turns = encode_conversation(from_template(marked, ours), ours, talk)
    assert list(turns.token_ids) == expected["input_ids"]
    assert list(turns.is_trained) == [bool(each) for each in expected["assistant_masks"]]
    context = [talk[0], replace(talk[1], trains=False), *talk[2:]]
    assert sum(encode_conversation(from_template(marked, ours), ours, context).is_trained) == 2
