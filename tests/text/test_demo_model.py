"""The text side of SmolLM2-135M-Instruct, as it stands in its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemotron4.checkpoint import open_checkpoint
from nemotron4.records import Message
from nemotron4.text.prompt import PromptFormat, encode_answer
from nemotron4.text.tokenizer import Tokenizer

pytestmark = pytest.mark.demo_model

CONVERSATION = [
    Message("user", "Write two lines on NVIDIA."),
    Message("assistant", "Thou silicon muse,\nthat maketh numbers sing."),
    Message("user", "12 more?"),
]


@pytest.fixture(scope="module")
def demo() -> tuple[Tokenizer, PromptFormat]:
    checkpoint = open_checkpoint("smollm2")
    prompt_format = checkpoint.prompt_format()
    assert prompt_format is not None
    return checkpoint.tokenizer(), prompt_format


def test_known_ids(demo: tuple[Tokenizer, PromptFormat]) -> None:
    tokenizer, _ = demo
    assert tokenizer.encode("Hello 123") == [19556, 216, 33, 34, 35]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)


def test_its_own_template_is_used(demo: tuple[Tokenizer, PromptFormat]) -> None:
    tokenizer, prompt_format = demo
    assert prompt_format.render(CONVERSATION) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWrite two lines on NVIDIA.<|im_end|>\n"
        "<|im_start|>assistant\nThou silicon muse,\nthat maketh numbers sing.<|im_end|>\n"
        "<|im_start|>user\n12 more?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_format.encode(tokenizer, CONVERSATION) == tokenizer.encode(
        prompt_format.render(CONVERSATION)
    )
    assert prompt_format.stop_token_ids(tokenizer) == {2}


def test_an_answer_is_cut_from_its_prompt(demo: tuple[Tokenizer, PromptFormat]) -> None:
    tokenizer, prompt_format = demo
    cut = encode_answer(prompt_format, tokenizer, CONVERSATION, "Aye.")
    assert list(cut.prompt_ids) == prompt_format.encode(tokenizer, CONVERSATION)
    assert [tokenizer.piece(i) for i in cut.answer_ids] == ["A", "ye", ".", "<|im_end|>"]


@pytest.mark.slow
def test_ids_are_those_of_transformers_own_gguf_reader(
    demo: tuple[Tokenizer, PromptFormat], demo_model: Path, corpus: tuple[str, ...]
) -> None:
    tokenizer, prompt_format = demo
    peer = AutoTokenizer.from_pretrained(demo_model.parent, gguf_file=demo_model.name)
    # The peer does not set single digits apart; in this vocabulary that shows only behind a space.
    for text in (*corpus, prompt_format.render(CONVERSATION), "🎉 naïve\t\n\n x  y", ""):
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == peer.decode(
            peer.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
