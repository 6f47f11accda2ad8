"""Tiny random models on disk, with real small tokenizers, written by transformers: fixtures of many tests.

``nemotron_directory`` and ``llama_directory`` write what a user would download. Weights are far from their
initial values, so that a forgotten bias, a wrong +1 or a swapped tensor shows.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, NemotronConfig, NemotronForCausalLM, PreTrainedModel

VOCAB_SIZE = 512
NUM_EXTRA_IDS = 16
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = """Shall I compare thee to a summer's day? Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May, and summer's lease hath all too short a date.
Sometime too hot the eye of heaven shines, and often is his gold complexion dimm'd;
And every fair from fair sometime declines, by chance or nature's changing course untrimm'd.
def add(left, right):
    return left + right
In 2024 the model read 9 trillion tokens on 6,144 processors; the year before it was 8.
""".splitlines()


@functools.cache
def sentencepiece_model() -> bytes:
    """A BPE vocabulary with Nemotron's layout: pad 0, unk 1, bos 2, eos 3, <extra_id_n> 4 + n, bytes."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20),
        model_writer=trained,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        user_defined_symbols=[f"<extra_id_{i}>" for i in range(NUM_EXTRA_IDS)],
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return trained.getvalue()


@functools.cache
def byte_level_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE; its markers: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 20, trainer)
    return tokenizer.to_str()


def nemotron_directory(
    path: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random Nemotron model (head_dim is not hidden / heads) with a SentencePiece vocabulary.

    No chat template, as in NVIDIA's own conversions. ``config`` overrides NemotronConfig's arguments.
    """
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    _save(NemotronForCausalLM(NemotronConfig(**{**values, **config})), path, seed, max_shard_size, dtype)
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    return path


def llama_directory(
    path: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random Llama model with tied embeddings, a byte-level tokenizer.json and a ChatML template."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _save(LlamaForCausalLM(LlamaConfig(**{**values, **config})), path, seed, max_shard_size, dtype)
    (path / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def _save(model: PreTrainedModel, path: Path, seed: int, max_shard_size: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
