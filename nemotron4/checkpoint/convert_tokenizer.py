"""A SentencePiece model as the ``tokenizer.json`` that transformers and vLLM read, id for id.

User-defined symbols are split off by a pattern and not listed as added tokens: the library puts the word
mark before a text that begins with ``<extra_id_0>``, as NeMo's tokenizer does, only in that form.
"""

from __future__ import annotations

import json
import re
from typing import Any

import sentencepiece
import tokenizers

from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import user_defined_ids

WORD_MARK = "▁"
PROBES = (
    "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem.\n<extra_id_1>Assistant\n",
    "<extra_id_1>",
    " leading, double  and trailing ",
    "tab\tand\r\nlines\n\n\n",
    "1234567890 3.14 x=2",
    "def f(a, b):\n        return a[b] != '\\n'",
    "naïve café ﬁne ① Ａ ½ İ ẞ",
    "日本語と한국어 и русский, العربية, हिन्दी",
    "\U0001f600 family: \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "the quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX!",
    "",
)


def tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """The specification, or None if it would not give SentencePiece's ids for every probe text."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    spec = _specification(processor, user_defined_ids(model))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in PROBES:
        ids = processor.encode(text)
        if tokenizer.encode(text).ids != ids or tokenizer.decode(ids) != processor.decode(ids):
            return None
    return spec


def json_tokenizer_config(
    tokenizer: JsonTokenizer, *, chat_template: str | None, adds_bos: bool
) -> dict[str, Any]:
    """``tokenizer_config.json`` next to the specification of a tokenizer that has one."""
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.piece(i) for name, i in special.items() if i is not None},
        **({} if chat_template is None else {"chat_template": chat_template}),
    }


def tokenizer_config(model: bytes, *, chat_template: str | None, adds_bos: bool) -> dict[str, Any]:
    """``tokenizer_config.json`` next to a SentencePiece model; no EOS is added, as in NeMo."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    special = {"bos": processor.bos_id(), "eos": processor.eos_id()}
    special |= {"unk": processor.unk_id(), "pad": processor.pad_id()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "sentencepiece_model": "tokenizer.model",
        **{f"{name}_token": processor.id_to_piece(i) for name, i in special.items() if i >= 0},
        **({} if chat_template is None else {"chat_template": chat_template}),
    }


def _specification(processor: Any, user_defined: list[int]) -> dict[str, Any]:
    pieces = [str(processor.id_to_piece(i)) for i in range(processor.vocab_size())]
    marked = sorted((pieces[i] for i in user_defined), key=len, reverse=True)
    pattern = "|".join(map(re.escape, marked))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": WORD_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK},
            ],
        },
        "pre_tokenizer": split if marked else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(processor, pieces, set(user_defined)),
        },
    }


def _merges(processor: Any, pieces: list[str], user_defined: set[int]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: what SentencePiece's BPE merges."""
    ids = {
        piece: i
        for i, piece in enumerate(pieces)
        if i not in user_defined and not (processor.is_control(i) or processor.is_unknown(i))
    }
    found = []
    for piece, i in ids.items():
        if len(piece) < 2 or processor.is_byte(i):
            continue
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(ids[left], ids[right]) for left, right in splits if left in ids and right in ids]
        found += [(-processor.get_score(i), *pair) for pair in sorted(pairs)]
    found.sort()
    return [[pieces[left], pieces[right]] for _, left, right in found]
