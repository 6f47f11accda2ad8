"""Tokenizers from the vocabulary inside a GGUF file, given as its metadata keys and plain values.

Keys and token types: the GGUF specification of ggml; pre-tokenizers: the names that llama.cpp's converter
writes into ``tokenizer.ggml.pre``, and their expressions in ``llama-vocab.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron4.errors import TokenizerError, unknown_name
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceTokenizer,
    build_bpe,
)
from nemotron4.text.tokenizer import Tokenizer

SOURCE = "GGUF vocabulary"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
_DIGITS = (r"\p{N}", _GPT2)
# Words that may begin with capitals: letters outside a-z. Letters outside A-Z may follow.
_UPPER, _LOWER, _FIRST = r"((?=\p{L})[^a-z])", r"((?=\p{L})[^A-Z])", r"[^\r\n\p{L}\p{N}]?"
_CASED = (rf"{_FIRST}{_UPPER}*{_LOWER}+", rf"{_FIRST}{_UPPER}+{_LOWER}*")
_SLASHED = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}",)
_GPT4O = (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}",)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄ"
    "ῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_NO_STOPS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4": (_GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _DIGITS,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2": _LLAMA3,
    "dbrx smaug-bpe glm4 chatglm-bpe": _LLAMA3,
    "qwen2 stablelm2 deepseek-r1-qwen hunyuan megrez grok-2 solar-open": _QWEN2,
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "tekken": _TEKKEN,
    "gpt-4o llama4 kanana2 minimax-m2": _GPT4O,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm": _DEEPSEEK3,
    "seed-coder": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    "bloom poro-chat gpt3-finnish": (_NO_STOPS,),
    "viking": (_NO_STOPS, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# Expressions that cut a text into words one after the other; each works on the words of the one before. Names
# and expressions are llama.cpp's; its converters write several names for the same.
_PRE_TOKENIZERS = {name: steps for names, steps in _NAMES.items() for name in names.split()}
# Where a whole word that has an id is not built from merges. llama.cpp puts BOS first with all of them.
WHOLE_WORDS = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"]
)
_KINDS: Mapping[type, str] = {str: "a string", bool: "true or false", int: "an integer"}
# Nemotron's turn markers belong to the text whatever type a converter gave them.
_VISIBLE_MARKER = re.compile(r"<extra_id_\d+>")


def from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes."""
    kinds = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    kind = _value(metadata, "model", str)
    if kind not in kinds:
        message, hint = unknown_name("tokenizer.ggml.model", kind, kinds)
        raise TokenizerError(message, hint=hint)
    return kinds[kind](metadata)


def _byte_level_bpe(metadata: Mapping[str, object]) -> Tokenizer:
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    name = _value(metadata, "pre", str, "default")
    if name not in _PRE_TOKENIZERS:
        message, hint = unknown_name("tokenizer.ggml.pre", name, _PRE_TOKENIZERS)
        raise TokenizerError(message, hint=hint)
    splits = [_split(expression) for expression in _PRE_TOKENIZERS[name]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            _added_token(i, token, is_special=kind == CONTROL)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": name in WHOLE_WORDS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [str(merge) for merge in _list(metadata, "merges")],
        },
    }
    return JsonTokenizer(
        spec, source=SOURCE, bos=_piece(metadata, "bos", tokens), eos=_piece(metadata, "eos", tokens)
    )


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _added_token(token_id: int, content: str, *, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": is_special}


def _sentencepiece(metadata: Mapping[str, object]) -> Tokenizer:
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    scores = _numbers(metadata, "scores")
    if len(scores) != len(tokens):
        raise TokenizerError(f"{SOURCE}: {len(scores)} scores for {len(tokens)} tokens")
    pieces = [
        Piece(token, score, USER_DEFINED if _VISIBLE_MARKER.fullmatch(token) else kind)
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    if not any(piece.type == UNKNOWN for piece in pieces):
        pieces = _with_unknown(metadata, pieces)
    add_dummy_prefix = _value(metadata, "add_space_prefix", bool, True)
    try:
        model = build_bpe(pieces, add_dummy_prefix=add_dummy_prefix)
    except (UnicodeEncodeError, OverflowError) as error:
        raise TokenizerError(f"{SOURCE}: a token or score is out of range: {error}") from error
    return SentencePieceTokenizer(
        model, source=SOURCE, bos_id=_token_id(metadata, "bos"), eos_id=_token_id(metadata, "eos")
    )


def _with_unknown(metadata: Mapping[str, object], pieces: list[Piece]) -> list[Piece]:
    """The pieces with the one that the metadata calls unknown marked so: SentencePiece cannot do without."""
    token_id = _token_id(metadata, "unknown")
    if token_id is None:
        raise TokenizerError(
            f"{SOURCE}: no token has type {UNKNOWN} and tokenizer.ggml.unknown_token_id is missing"
        )
    unknown = Piece(pieces[token_id].text, pieces[token_id].score, UNKNOWN)
    return [*pieces[:token_id], unknown, *pieces[token_id + 1 :]]


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    return [token.decode() if isinstance(token, bytes) else str(token) for token in _list(metadata, "tokens")]


def _types(metadata: Mapping[str, object], num_tokens: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in metadata:
        return [NORMAL] * num_tokens
    types = [int(kind) for kind in _numbers(metadata, "token_type")]
    if len(types) != num_tokens or not all(NORMAL <= kind <= BYTE for kind in types):
        raise TokenizerError(
            f"{SOURCE}: {len(types)} token types for {num_tokens} tokens; expected as many, each 1 to 6"
        )
    return types


def _piece(metadata: Mapping[str, object], name: str, tokens: Sequence[str]) -> str | None:
    token_id = _token_id(metadata, name)
    return None if token_id is None else tokens[token_id]


def _token_id(metadata: Mapping[str, object], name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        return None
    token_id: int = _value(metadata, f"{name}_token_id", int)
    num_tokens = len(_list(metadata, "tokens"))
    if not 0 <= token_id < num_tokens:
        raise TokenizerError(f"{SOURCE}: {key} is {token_id}; expected an id below {num_tokens}")
    return token_id


def _numbers(metadata: Mapping[str, object], name: str) -> list[float]:
    try:
        return [float(value) for value in _list(metadata, name)]
    except (TypeError, ValueError) as error:
        raise TokenizerError(
            f"{SOURCE}: tokenizer.ggml.{name} holds something that is no number: {error}"
        ) from error


def _list(metadata: Mapping[str, object], name: str) -> Sequence[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        given = "missing" if value is None else repr(value)[:40]
        raise TokenizerError(f"{SOURCE}: tokenizer.ggml.{name} is {given}; expected a list")
    return value  # type: ignore[return-value]


def _value(metadata: Mapping[str, object], name: str, kind: type[Any], default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, kind):
        given = "missing" if value is None else repr(value)[:40]
        raise TokenizerError(f"{SOURCE}: tokenizer.ggml.{name} is {given}; expected {_KINDS[kind]}")
    return value
