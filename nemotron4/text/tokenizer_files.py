"""The tokenizer of a checkpoint directory, found by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemotron4.errors import TokenizerError
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer
from nemotron4.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOOL_USE = "tool_use"  # what a second template for conversations with tools is called


def open_tokenizer(directory: Path, *, sentencepiece_name: str | None = None) -> Tokenizer:
    """Read ``sentencepiece_name`` (NeMo's settings name it) or else tokenizer.json, tokenizer.model."""
    if sentencepiece_name is not None:
        return SentencePieceTokenizer.read(directory / sentencepiece_name.removeprefix("nemo:"))
    if (directory / "tokenizer.json").is_file():
        return _read_json_tokenizer(directory)
    if (directory / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer.read(directory / "tokenizer.model")
        _refuse_other_tokens(directory, tokenizer)
        return tokenizer
    models = sorted(directory.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer.read(models[0])
    found = f"; found {len(models)} files that end in .model" if models else ""
    raise TokenizerError(
        f"{directory}: expected tokenizer.json or tokenizer.model{found}",
        hint="copy the tokenizer files of the release next to the weights",
    )


def read_chat_template(directory: Path) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, else that of tokenizer_config.json, else None."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        more = directory / "additional_chat_templates" / f"{TOOL_USE}.jinja"
        return joined_templates(_read_text(path), _read_text(more) if more.is_file() else None)
    template = read_tokenizer_config(directory).get("chat_template")
    if isinstance(template, list):
        # Several templates with names; the one for conversations is called default.
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        template = named.get("default")
        if isinstance(template, str) and isinstance(named.get(TOOL_USE), str):
            return joined_templates(template, named[TOOL_USE])
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: chat_template is not a string")
    return template


def joined_templates(default: str, tool_use: str | None) -> str:
    """One template of two: transformers renders the second where a conversation has tools."""
    if tool_use is None or tool_use == default:
        return default
    # Jinja drops the line break behind a block and the last one of a template; "+" keeps spaces before one.
    tool_use, default = (text.removesuffix("\n") for text in (tool_use, default))
    return (
        f"{{% if tools %}}\n{tool_use}{{%+ else %}}\n{{% if messages | selectattr('tool_calls') | list %}}"
        "{{ raise_exception('the messages have tool_calls, and there are no tools') }}{% endif %}\n"
        f"{default}{{%+ endif %}}"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. TokenizerError names the file and the line."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of thousands of digits, deep nesting
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; {} when there is neither."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            values = read_json(directory / name)
            if not isinstance(values, dict):
                raise TokenizerError(f"{directory / name}: expected a JSON object")
            merged |= {key: value for key, value in values.items() if value is not None}
    return merged


def special_token(config: dict[str, Any], name: str) -> str | None:
    """The text of ``bos_token`` or ``eos_token``: written as a string or as an object with ``content``."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _read_json_tokenizer(directory: Path) -> Tokenizer:
    config = read_tokenizer_config(directory)
    return JsonTokenizer(
        _with_declared(read_json(directory / "tokenizer.json"), config, directory),
        source=str(directory / "tokenizer.json"),
        bos=special_token(config, "bos_token"),
        eos=special_token(config, "eos_token"),
    )


def _with_declared(spec: Any, config: dict[str, Any], directory: Path) -> Any:
    """The tokenizer with the added tokens that tokenizer_config.json alone declares, as in transformers.

    ``added_tokens_decoder`` replaces what tokenizer.json says of a token; BOS and EOS become markers where
    they are only words of the vocabulary.
    """
    listed = spec.get("added_tokens") or [] if isinstance(spec, dict) else None
    if not isinstance(listed, list) or not isinstance(spec.get("model"), dict):
        return spec  # refused by its reader
    words = spec["model"].get("vocab") or {}
    vocab = {entry[0]: i for i, entry in enumerate(words)} if isinstance(words, list) else words
    added = {token.get("content"): token for token in listed if isinstance(token, dict)}
    found = dict(added)
    for token_id, content, flags in _declared(config, directory):
        if content not in vocab and content not in added and token_id < len(vocab):
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'}: the token {content!r} has id {token_id}, which "
                "another piece of tokenizer.json has"
            )
        own = added.get(content, {}).get("id", vocab.get(content, token_id))
        found[content] = {**_FLAGS, **added.get(content, {}), **flags, "content": content, "id": own}
    for name in ("bos_token", "eos_token"):
        word = special_token(config, name)
        if word is not None and word not in found and word in vocab:
            found[word] = {**_FLAGS, "content": word, "id": vocab[word], "special": True}
    if found == added:
        return spec
    return {**spec, "added_tokens": sorted(found.values(), key=lambda token: token["id"])}


def _declared(config: dict[str, Any], directory: Path) -> list[tuple[int, str, dict[str, bool]]]:
    """Id, text and flags of each token in ``added_tokens_decoder``."""
    try:
        entries = sorted((int(key), token) for key, token in config.get("added_tokens_decoder", {}).items())
        return [(i, str(t["content"]), {n: bool(t[n]) for n in _FLAGS if n in t}) for i, t in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{directory}: added_tokens_decoder in tokenizer_config.json is not a table of tokens and ids: "
            f"{error}"
        ) from error


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _refuse_other_tokens(directory: Path, tokenizer: Tokenizer) -> None:
    """TokenizerError if transformers' files add tokens that the SentencePiece model next to them lacks."""
    added: dict[str, Any] = {}
    try:
        if (directory / "added_tokens.json").is_file():
            added |= read_json(directory / "added_tokens.json")
    except TypeError as error:
        raise TokenizerError(f"{directory}: added_tokens.json is not a table of tokens and ids") from error
    added |= {text: token_id for token_id, text, _ in _declared(read_tokenizer_config(directory), directory)}
    for content, token_id in added.items():
        if tokenizer.token_id(content) != token_id:
            raise TokenizerError(
                f"{directory}: the token {content!r} (id {token_id}) is not in tokenizer.model",
                hint="save the tokenizer with transformers, which writes a tokenizer.json that has it",
            )
