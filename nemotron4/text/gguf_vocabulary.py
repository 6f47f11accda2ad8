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
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Expressions that cut a text into words one after the other; each works on the words of the one before.
_PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",),
}
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
            "ignore_merges": name == "llama-bpe",
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
