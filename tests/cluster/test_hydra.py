"""The command line of megatron_gpt_eval.py: hydra's grammar over NeMo's keys."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron4.cluster.hydra import DEFAULTS, parse_overrides, parse_value
from nemotron4.errors import ConfigError

CARD = [
    "gpt_model_file=/model",
    "pipeline_model_parallel_split_rank=0",
    "server=True",
    "tensor_model_parallel_size=8",
    "trainer.precision=bf16",
    "pipeline_model_parallel_size=2",
    "trainer.devices=8",
    "trainer.num_nodes=2",
    "web_server=False",
    "port=1424",
]


def test_the_card_s_overrides_are_understood() -> None:
    values = parse_overrides(CARD)
    assert values["gpt_model_file"] == "/model"
    assert values["server"] is True
    assert values["trainer.precision"] == "bf16"
    assert (values["port"], values["trainer.num_nodes"]) == (1424, 2)
    assert values["inference.tokens_to_generate"] == DEFAULTS["inference.tokens_to_generate"] == 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("null", None),
        ("12", 12),
        ("-1", -1),
        ("0.9", 0.9),
        ("1e-4", 1e-4),
        ("bf16-mixed", "bf16-mixed"),
        ("/a/b=c.nemo", "/a/b=c.nemo"),
        ("'a, b'", "a, b"),
        (r'"say \"hi\""', 'say "hi"'),
        ("[]", []),
        ("[1, 2]", [1, 2]),
        ("['a, b', \"c\", d e]", ["a, b", "c", "d e"]),
        ("[<|endoftext|>,<extra_id_1>]", ["<|endoftext|>", "<extra_id_1>"]),
        ("{value: True, user: User}", {"value": True, "user": "User"}),
        ("", ""),
    ],
)
def test_values_are_read_as_hydra_reads_them(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "foo=1",
            "Could not override 'foo'.\nTo append to your config use +foo=1\nKey 'foo' is not in struct",
        ),
        ("inference.topk=1", "Key 'topk' is not in struct\n    full_key: inference.topk"),
        ("+port=1", "An item is already at 'port'"),
        ("~nothing", "'nothing' does not exist"),
        ("--help", "expected key=value"),
        ("port", "expected key=value"),
        ("port=1,2", "unexpected ',2'"),
        ("prompts=['a'", "expected ',' or ']'"),
        ("prompts='a", "is not closed"),
        ("+unheard_of=1", "means nothing here"),
    ],
)
def test_what_hydra_refuses_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_overrides([override])
    assert message in raised.value.message


def test_plus_adds_and_tilde_deletes() -> None:
    values = parse_overrides(["+trainer.max_steps=3", "++port=7", "~chatbot_config", "+host=0.0.0.0"])
    assert (values["trainer.max_steps"], values["port"], values["host"]) == (3, 7, "0.0.0.0")
    assert not any(name.startswith("chatbot_config") for name in values)
