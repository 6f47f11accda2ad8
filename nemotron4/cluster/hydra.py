"""The command line of NeMo's ``megatron_gpt_eval.py``: hydra's override grammar over a known set of keys.

``key=value`` sets a known key, ``+key=value`` adds one, ``++key=value`` sets or adds, ``~key`` deletes.
Keys and defaults: NeMo v2.0.0rc0, ``conf/megatron_gpt_inference.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron4.errors import ConfigError, nearest

DEFAULTS: Mapping[str, Any] = {
    "gpt_model_file": None,
    "checkpoint_dir": None,
    "checkpoint_name": None,
    "hparams_file": None,
    "tensor_model_parallel_size": -1,
    "pipeline_model_parallel_size": -1,
    "pipeline_model_parallel_split_rank": -1,
    "megatron_amp_O2": False,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.accelerator": "gpu",
    "trainer.logger": False,
    "trainer.precision": 16,
    "trainer.use_distributed_sampler": False,
    "inference.greedy": False,
    "inference.top_k": 0,
    "inference.top_p": 0.9,
    "inference.temperature": 1.0,
    "inference.add_BOS": True,
    "inference.tokens_to_generate": 30,
    "inference.all_probs": False,
    "inference.repetition_penalty": 1.2,
    "inference.min_tokens_to_generate": 0,
    "inference.compute_logprob": False,
    "inference.end_strings": ["<|endoftext|>"],
    "prompts": ["Q: How are you?", "Q: How big is the universe?"],
    "prompts_jsonl": None,
    "server": False,
    "port": 5555,
    "web_server": False,
    "share": False,
    "username": "test",
    "password": "test2",
    "web_port": 9889,
    "chat": False,
    "chatbot_config.value": False,
    "chatbot_config.attributes": [],
    "chatbot_config.user": "User",
    "chatbot_config.assistant": "Assistant",
    "chatbot_config.system": "",
}
# Keys that users add with '+' and that mean something.
ADDABLE = ("engine", "expert_model_parallel_size", "host", "inference.use_flash_attention")
_OVERRIDE = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w.]*)(?:=(.*))?", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Every key with its value. ConfigError in hydra's words for a key or a value it would refuse."""
    values = dict(DEFAULTS)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None or (match[3] is None and match[1] != "~"):
            raise ConfigError(
                f"Error parsing override '{argument}': expected key=value",
                hint="hydra's grammar: key=value, +key=value",
            )
        sign, key, text = match.groups()
        known = key in values or any(name.startswith(f"{key}.") for name in values)
        if sign == "~":
            if not known:
                raise ConfigError(f"Could not delete from config. '{key}' does not exist.")
            values = {k: v for k, v in values.items() if k != key and not k.startswith(f"{key}.")}
            continue
        if sign is None and not known:
            raise _unknown(key, text)
        if sign == "+" and key in values:
            raise ConfigError(
                f"Could not append to config. An item is already at '{key}'.",
                hint=f"Either remove + prefix: '{key}={text}' or add a second + to add or override",
            )
        if sign is not None and key not in values and not _is_addable(key):
            raise ConfigError(f"'{key}' is added but means nothing here", hint=f"known: {', '.join(ADDABLE)}")
        value = parse_value(text)
        if isinstance(value, dict) and key not in DEFAULTS:
            values |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            values[key] = value
    return values


def _is_addable(key: str) -> bool:
    # Other trainer keys belong to the trainer of the original and change nothing about the answers.
    return key in DEFAULTS or key in ADDABLE or key.startswith("trainer.")


def _unknown(key: str, text: str) -> ConfigError:
    guess = nearest(key, DEFAULTS)
    return ConfigError(
        f"Could not override '{key}'.\nTo append to your config use +{key}={text}\n"
        f"Key '{key.rpartition('.')[2]}' is not in struct\n    full_key: {key}\n    object_type=dict",
        hint=f"did you mean {guess!r}?" if guess else None,
    )


def parse_value(text: str) -> Any:
    """One value: quoted or plain string, number, true, false, null, [list], {mapping}."""
    value, rest = _value(text.strip(), text, nested=False)
    if rest.strip():
        raise ConfigError(
            f"Error parsing value {text!r}: unexpected {rest.strip()[:20]!r}",
            hint="put a list into [ ] and a text with commas into quotes",
        )
    return value


def _value(rest: str, whole: str, *, nested: bool) -> tuple[Any, str]:
    if rest[:1] in ("'", '"'):
        return _quoted(rest, whole)
    if rest[:1] == "[":
        return _items(rest[1:], whole, "]")
    if rest[:1] == "{":
        return _items(rest[1:], whole, "}")
    match = re.match(r"[^,\[\]{}]*" if nested else r"[^,]*", rest)
    assert match is not None
    return _scalar(match[0].strip()), rest[match.end() :]


def _quoted(rest: str, whole: str) -> tuple[str, str]:
    match = re.match(rf"{rest[0]}((?:\\.|[^\\{rest[0]}])*){rest[0]}", rest, re.DOTALL)
    if match is None:
        raise ConfigError(f"Error parsing value {whole!r}: the quotation mark {rest[0]} is not closed")
    return re.sub(rf"\\([\\{rest[0]}])", r"\1", match[1]), rest[match.end() :]


def _items(rest: str, whole: str, end: str) -> tuple[Any, str]:
    values: list[Any] = []
    names: list[str] = []
    rest = rest.lstrip()
    while rest[:1] != end:
        if not rest:
            raise ConfigError(f"Error parsing value {whole!r}: {end!r} is missing")
        if end == "}":
            name, separator, rest = rest.partition(":")
            if not separator:
                raise ConfigError(f"Error parsing value {whole!r}: expected name:value inside {{ }}")
            names.append(str(_scalar(name.strip())))
        value, rest = _value(rest.lstrip(), whole, nested=True)
        values.append(value)
        rest = rest.lstrip()
        if rest[:1] == ",":
            rest = rest[1:].lstrip()
        elif rest[:1] != end:
            raise ConfigError(f"Error parsing value {whole!r}: expected ',' or {end!r}")
    return (dict(zip(names, values, strict=True)) if end == "}" else values), rest[1:]


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.fullmatch(text):
        plain = text.replace("_", "")
        return int(plain) if re.fullmatch(r"[+-]?\d+", plain) else float(plain)
    return re.sub(r"\\(.)", r"\1", text)
