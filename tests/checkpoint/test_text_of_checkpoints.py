"""What a checkpoint says about text: its tokenizer, where turns end, whether a BOS comes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as JsonFile
from tokenizers import processors

from nemotron4.checkpoint import open_checkpoint
from nemotron4.errors import CheckpointError
from nemotron4.records import Message
from tests.checkpoint.gguf_files import write_gguf
from tests.tiny_models import CHATML, llama_directory, nemotron_directory

BUILDERS = {"nemotron": nemotron_directory, "llama": llama_directory}


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.mark.parametrize("family", BUILDERS)
def test_a_gguf_file_speaks_like_its_source(tmp_path: Path, family: str) -> None:
    source = open_checkpoint(BUILDERS[family](tmp_path / "m"))
    file = open_checkpoint(write_gguf(tmp_path / "m", tmp_path / "m.gguf"))
    text = "<extra_id_1>User\nShall I compare thee, 12 times?<|im_end|>\n\n \u00e9\U0001f600"
    assert file.tokenizer().encode(text) == source.tokenizer().encode(text)
    assert file.eos_token_ids == source.eos_token_ids
    assert file.bos_token_id == source.bos_token_id
    assert file.adds_bos is source.adds_bos is False


@pytest.mark.parametrize(("pre", "adds"), [("tekken", True), ("llama-bpe", True), ("qwen2", False)])
def test_a_gguf_file_without_a_word_on_bos_is_read_as_llama_cpp_does(
    tmp_path: Path, pre: str, adds: bool
) -> None:
    llama_directory(tmp_path / "m")
    file = write_gguf(tmp_path / "m", tmp_path / "m.gguf", tokenizer__ggml__pre=pre)
    assert open_checkpoint(file).adds_bos is adds


def test_a_nemotron_chat_model_ends_turns_with_the_marker_too(tmp_path: Path) -> None:
    assert open_checkpoint(nemotron_directory(tmp_path / "m")).eos_token_ids == (3, 5)


def test_a_chatml_model_ends_turns_with_its_marker(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m", eos_token_id=0)
    assert open_checkpoint(directory).eos_token_ids == (0, 2)


def test_the_generation_configuration_comes_first(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    edit(directory / "generation_config.json", eos_token_id=[7, 8])
    assert open_checkpoint(directory).eos_token_ids == (7, 8, 2)


def test_an_end_that_is_no_token_id_is_refused(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    edit(directory / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(CheckpointError, match="end of text '</s>' is not a token id"):
        _ = open_checkpoint(directory).eos_token_ids


def test_without_any_declared_end_the_tokenizers_own_counts(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    edit(directory / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=None)
    edit(directory / "config.json", eos_token_id=None)
    (directory / "generation_config.json").unlink()
    assert open_checkpoint(directory).eos_token_ids == (0,)


def test_a_bos_is_added_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    tokenizer = JsonFile.from_file(str(directory / "tokenizer.json"))
    template = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert open_checkpoint(directory).adds_bos
    edit(directory / "tokenizer_config.json", add_bos_token=False)
    assert not open_checkpoint(directory).adds_bos


@pytest.mark.parametrize(
    ("family", "metadata", "expected"),
    [
        ("nemotron", {}, False),
        ("nemotron", {"tokenizer__ggml__add_bos_token": True}, True),
        ("llama", {}, False),
        ("llama", {"tokenizer__ggml__add_bos_token": True}, True),
    ],
)
def test_a_gguf_file_says_whether_a_bos_is_added(
    tmp_path: Path, family: str, metadata: dict[str, object], expected: bool
) -> None:
    source = BUILDERS[family](tmp_path / "m")
    assert open_checkpoint(write_gguf(source, tmp_path / "m.gguf", **metadata)).adds_bos is expected


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m", vocab_size=400)
    with pytest.raises(CheckpointError, match="the tokenizer has 481 ids; the model has 400 rows"):
        open_checkpoint(directory).tokenizer()


def test_a_nemotron_model_without_a_template_says_which_format_it_gets(tmp_path: Path) -> None:
    directory = nemotron_directory(tmp_path / "m")
    (note,) = open_checkpoint(directory).notes
    assert "no chat template" in note
    edit(directory / "tokenizer_config.json", chat_template="{{ messages }}")
    assert open_checkpoint(directory).notes == ()


def test_a_nemotron_model_without_a_template_renders_the_cards_prompt(tmp_path: Path) -> None:
    found = open_checkpoint(nemotron_directory(tmp_path / "m")).prompt_format()
    assert found is not None
    expected = "<extra_id_0>System\n\n<extra_id_1>User\nHello\n<extra_id_1>Assistant\n"
    assert found.render([Message("user", "Hello")]) == expected


@pytest.mark.parametrize("place", ["tokenizer_config.json", "named", "chat_template.jinja", "gguf"])
def test_a_chat_template_is_found_wherever_it_is_kept(tmp_path: Path, place: str) -> None:
    directory = llama_directory(tmp_path / "m")
    settings = directory / "tokenizer_config.json"
    if place == "named":
        templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        edit(settings, chat_template=templates)
    if place == "chat_template.jinja":
        edit(settings, chat_template="{{ 'an older one' }}")
        (directory / place).write_text(CHATML)
    path = write_gguf(directory, tmp_path / "m.gguf") if place == "gguf" else directory
    found = open_checkpoint(path).prompt_format()
    assert found is not None
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert found.render([Message("user", "Hello")]) == expected


def test_a_base_model_without_a_template_or_markers_has_no_prompt_format(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    tokenizer = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(tokenizer.replace("<|im_", "<|no_"))
    names = {"bos_token": "<|no_start|>", "eos_token": "<|no_end|>"}
    edit(directory / "tokenizer_config.json", chat_template=None, **names)
    assert open_checkpoint(directory).prompt_format() is None
