"""The tiny vocabularies, trained once for all tests of this folder."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer

MARKERS = tuple(f"<extra_id_{n}>" for n in range(4))
CORPUS = (
    "System User Assistant Write a poem on NVIDIA in the style of Shakespeare",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
    "The quick brown fox jumps over the lazy dog; 1234567890 times (or so) <tag> extra_id",
    "Grüße aus München, voilà une chaîne de caractères. Привет, мир! 你好世界。",
    "def add(a, b):\n    return a + b  # two  spaces\n\tand a tab",
)


def _train_sentencepiece(kind: str = "bpe", symbols: tuple[str, ...] = MARKERS) -> bytes:
    """A model as NeMo trains them: pad 0, unk 1, bos 2, eos 3, byte fallback, single digits, identity."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=list(symbols),
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., bytes]:
    return functools.cache(_train_sentencepiece)


@pytest.fixture(scope="session")
def sentencepiece_model(train_sentencepiece: Callable[..., bytes]) -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def corpus() -> tuple[str, ...]:
    return CORPUS


@pytest.fixture(scope="session")
def card_prompt() -> str:
    return "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem\n<extra_id_1>Assistant\n"


@pytest.fixture(scope="session")
def nemotron_tokenizer(sentencepiece_model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_model, source="trained here")


@pytest.fixture(scope="session")
def chatml_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a byte-level BPE with ChatML's markers, and ``<s>`` and ``</s>`` for templates."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory = tmp_path_factory.mktemp("chatml")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chatml_tokenizer(chatml_directory: Path) -> JsonTokenizer:
    spec = json.loads((chatml_directory / "tokenizer.json").read_text())
    return JsonTokenizer(spec, source="trained here", bos="<s>", eos="</s>")
