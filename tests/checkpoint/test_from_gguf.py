"""GGUF files as the source of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from transformers import AutoTokenizer

from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.records import Message
from tests.checkpoint.gguf_files import write_gguf
from tests.tiny_models import llama_directory, nemotron_directory

TEXT = "Shall I compare thee to a summer's day? In 2024: 6,144 processors.\n"


@pytest.mark.parametrize(
    ("make", "kind"),
    [(nemotron_directory, Kind.F32), (llama_directory, Kind.Q8_0), (llama_directory, Kind.Q4_0)],
    ids=["nemotron", "llama-q8", "llama-q4"],
)
def test_a_gguf_file_becomes_a_hugging_face_directory(tmp_path: Path, make: Any, kind: Kind) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}
    if make is llama_directory:
        shape["head_dim"] = 16
    source = open_checkpoint(write_gguf(make(tmp_path / "m", **shape), tmp_path / "m.gguf", kind))
    out = tmp_path / "out"
    convert(source, out, ConvertOptions(to="hf", dtype="fp32"))
    opened = open_checkpoint(out)
    assert opened.config == source.config
    for name in opened.tensors:
        assert torch.equal(opened.read(name), source.read(name, torch.float32)), name
    assert opened.tokenizer().encode(TEXT) == source.tokenizer().encode(TEXT)
    messages = [Message("user", "hi")]
    formats = [each.prompt_format() for each in (opened, source)]
    ids = [
        f.encode(each.tokenizer(), messages) for f, each in zip(formats, (opened, source), strict=True) if f
    ]
    assert ids[0] == ids[1]
    assert (opened.eos_token_ids, opened.adds_bos) == (source.eos_token_ids, source.adds_bos)
    assert AutoTokenizer.from_pretrained(out).encode(TEXT, add_special_tokens=False) == (
        source.tokenizer().encode(TEXT)
    )


def test_rows_of_a_gguf_tensor_are_those_of_the_whole(tmp_path: Path) -> None:
    source = write_gguf(
        llama_directory(
            tmp_path / "m", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
        ),
        tmp_path / "m.gguf",
        Kind.Q8_0,
    )
    checkpoint = open_checkpoint(source)
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.read(name)
        for start, stop in ((0, 1), (3, 21), (info.shape[0] - 5, info.shape[0])):
            assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop]), name
