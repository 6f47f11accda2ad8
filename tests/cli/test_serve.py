"""``nemotron4 serve``: options are checked before a model is touched; the real model answers both APIs."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemotron4.cli.main import main
from nemotron4.cli.serve import _load_builtin
from nemotron4.errors import ConfigError
from tests.checkpoint import nemo_layouts as layouts

CARD_PROMPT = (
    "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n"
    "<extra_id_1>Assistant\n"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nemo-compat", "loose"], "'--nemo-compat': 'loose' is not one of 'strict', 'fixed'"),
        (["--api-key-file", "/nonexistent/keys"], "/nonexistent/keys: cannot be read"),
        (["--port", "70000"], "'--port': should be less than or equal to 65535"),
        (["--max-body-mb", "0"], "max_body_bytes is 0"),
        (["--port", "0", "--host", "no such host"], "is no address"),
        (["--adapter", "one=/no/such/adapter"], "adapter 'one': there is no /no/such/adapter"),
        (["--api-key-file", "/no", "--adapter", "/none", "--chat-template", "no.jinja"], "there is no /none"),
        (["--api-key-file", "/no", "--adapter", "/none", "--chat-template", "no.jinja"], "format 'no.jinja'"),
        (["--tensor-parallel", "2"], "tensor_parallel is 2, pipeline_parallel 1, nodes 1"),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype is 'fp8'; the built-in engine"),
        (["--engine", "vllm", "--quantize", "int8"], "vLLM reads weights that are quantised already"),
        (
            ["--engine", "vllm", "--num-speculative-tokens", "3"],
            "num_speculative_tokens are of the built-in engine",
        ),
        (["--engine", "vllm", "--prefix-cache-gb", "1"], "prefix_cache_gb and num_speculative_tokens"),
        (["--engine", "vllm", "--nodes", "2", "--port", "0"], "several nodes must know it"),
        (["--engine", "vllm", "--tensor-parallel", "3", "--nodes", "2"], "do not divide by 2 nodes"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["serve", "/no/such/model", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_reward_model_forgets_no_option(tmp_path: Path) -> None:
    config = layouts.tiny_config(num_layers=2, num_reward_attributes=9)
    weights = layouts.hugging_face_weights(config)
    folder = layouts.write_release(tmp_path / "reward", config, weights, tensor_parallel=1)
    options = {"quantize": "int8", "chat_template": "chatml", "cache_gb": None}
    with pytest.raises(ConfigError, match="takes no quantize, no chat_template"):
        _load_builtin(str(folder), "none", None, context=None, revision=None, **options)


def test_a_busy_port_is_refused_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "/no/such/model", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@contextmanager
def _serving(model: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "nemotron4", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr)
        urls = (re.search(r"^ready: \S+ on (http://\S+)", line) for line in lines)
        yield next(found[1] for found in urls if found)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.demo_model
def test_the_demo_model_answers_the_card_and_a_chat(demo_model: Path) -> None:
    with _serving(demo_model) as url, httpx.Client(base_url=url, timeout=60) as client:
        body: dict[str, Any] = {"sentences": [CARD_PROMPT], "tokens_to_generate": 8, "greedy": True}
        sentence = client.put("/generate", json=body).json()["sentences"][0]
        assert sentence.startswith(CARD_PROMPT)
        assert len(sentence) > len(CARD_PROMPT)
        question = {"role": "user", "content": "What is the capital of France?"}
        chat = {"messages": [question], "temperature": 0, "max_tokens": 20}
        answer = client.post("/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        assert answer["choices"][0]["finish_reason"] == "stop"
