"""A reward model on a port: /score, the hosted form, Triton's reward_model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from nemotron4.client.remote import hosted_reward, score_reward
from nemotron4.errors import CheckpointError, EngineBusyError, RequestError
from nemotron4.inference.load import load
from nemotron4.inference.reward import CARD_WEIGHTS, RewardEngine, load_reward
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.server.app import create_app
from nemotron4.text.prompt import encode_reward, render_reward
from tests.checkpoint import nemo_layouts as layouts

CONFIG = layouts.tiny_config(num_layers=2, num_reward_attributes=9, context_length=300)
TURNS = [{"role": "user", "content": "What is the fox?"}, {"role": "assistant", "content": "quick and brown"}]
MESSAGES = [Message(turn["role"], turn["content"]) for turn in TURNS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RewardEngine:
    weights = layouts.hugging_face_weights(CONFIG)
    folder = tmp_path_factory.mktemp("reward") / "tiny-reward"
    return load_reward(layouts.write_release(folder, CONFIG, weights, tensor_parallel=4))


@pytest.fixture(scope="module")
def client(engine: RewardEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        yield client


def plain_scores(engine: RewardEngine, messages: list[Message]) -> list[float]:
    """By the formula: hidden state after the final norm at the last token, times the head, plus its bias."""
    weights = {name: value.float() for name, value in layouts.hugging_face_weights(CONFIG).items()}
    from nemotron4.model.transformer import Transformer

    language = layouts.tiny_config(num_layers=2, context_length=300)
    model = Transformer(language)
    model.load_state_dict(
        {name: value for name, value in weights.items() if not name.startswith("reward_head")}, strict=False
    )
    tokens_BT = torch.tensor([encode_reward(engine.tokenizer, messages)])
    with torch.no_grad():
        hidden_D = model.hidden(tokens_BT)[0, -1]
    scores: list[float] = (hidden_D @ weights["reward_head.weight"].T + weights["reward_head.bias"]).tolist()
    return scores


def test_scores_are_the_head_at_the_last_token(engine: RewardEngine) -> None:
    [reward] = engine.score([MESSAGES])
    assert reward.raw == pytest.approx(plain_scores(engine, MESSAGES), abs=1e-4)
    assert list(reward.attributes.values()) == list(reward.raw[4:])
    expected = sum(CARD_WEIGHTS[name] * value for name, value in reward.attributes.items())
    assert reward.scalar == pytest.approx(expected)


def test_a_converted_reward_model_gives_the_same_scores(tmp_path: Path, engine: RewardEngine) -> None:
    from nemotron4.checkpoint.convert import ConvertOptions, convert
    from nemotron4.checkpoint.opening import open_checkpoint

    source = layouts.write_release(tmp_path / "m", CONFIG, layouts.hugging_face_weights(CONFIG))
    convert(open_checkpoint(source), tmp_path / "hf", ConvertOptions(to="hf"))
    assert load_reward(tmp_path / "hf").score([MESSAGES]) == engine.score([MESSAGES])


def test_batched_scores_equal_single_ones(engine: RewardEngine) -> None:
    conversations = [[*MESSAGES[:1], Message("assistant", "word " * n)] for n in (1, 30, 7, 12, 3)]
    batched = engine.score(conversations)
    for conversation, reward in zip(conversations, batched, strict=True):
        assert reward.raw == pytest.approx(engine.score([conversation])[0].raw, abs=1e-5)


def test_a_conversation_that_does_not_fit_is_refused(engine: RewardEngine) -> None:
    with pytest.raises(RequestError, match="expected 1 to 300"):
        engine.score([[*MESSAGES[:1], Message("assistant", "word " * 700)]])


def test_score_answers_in_the_form_of_the_client(client: TestClient, engine: RewardEngine) -> None:
    answer = client.post("/score", json={"messages": TURNS}).json()
    [reward] = engine.score([MESSAGES])
    assert answer["raw"] == pytest.approx(reward.raw, abs=1e-5)
    assert answer["reward"] == pytest.approx(reward.scalar, abs=1e-5)
    assert score_reward(answer).attributes == pytest.approx(reward.attributes, abs=1e-5)


def test_text_is_scored_as_it_is(client: TestClient) -> None:
    whole = client.post("/score", json={"text": render_reward(MESSAGES)}).json()
    assert whole["raw"] == pytest.approx(
        client.post("/score", json={"messages": TURNS}).json()["raw"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either messages or text"),
        ({"messages": TURNS, "text": "x"}, "give either messages or text"),
        ({"messages": TURNS[:1]}, "expected the assistant's answer to be judged"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": "x " * 900}]}, "expected 1 to 300"),
        ({"text": ""}, "has 0 tokens"),
        ({"message": TURNS}, "give either messages or text"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(
    client: TestClient, body: dict[str, Any], message: str
) -> None:
    answer = client.post("/score", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_the_hosted_form_carries_five_attributes(client: TestClient, engine: RewardEngine) -> None:
    body = {"model": "tiny-reward", "messages": TURNS, "temperature": 0.2}
    answer = client.post("/v1/chat/completions", json=body).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(ATTRIBUTES)
    assert hosted_reward(answer).attributes == pytest.approx(engine.score([MESSAGES])[0].attributes, abs=1e-5)


def test_the_openai_package_reads_the_hosted_form(client: TestClient) -> None:
    import openai

    peer = openai.OpenAI(base_url="http://localhost/v1", api_key="x", http_client=client)
    answer = peer.chat.completions.create(model="tiny-reward", messages=TURNS)  # type: ignore[arg-type]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [entry.token for entry in logprobs.content or []] == list(ATTRIBUTES)


def test_generation_is_refused_with_the_way_to_score(client: TestClient) -> None:
    answer = client.put("/generate", json={"sentences": ["x"], "tokens_to_generate": 1})
    assert answer.status_code == 400
    assert "POST /score" in answer.json()


def test_a_language_model_has_no_score(tmp_path: Path) -> None:
    config = layouts.tiny_config(num_layers=1)
    folder = layouts.write_release(tmp_path / "m", config, layouts.hugging_face_weights(config))
    with pytest.raises(CheckpointError, match="without a reward head"):
        load_reward(folder)


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, layouts.hugging_face_weights(CONFIG))
    with pytest.raises(CheckpointError, match="a reward model, which scores"):
        load(folder)


def infer(client: TestClient, body: Any, **options: Any) -> Any:
    return client.post("/v2/models/reward_model/infer", **({"json": body} | options))


def sentences(*texts: str) -> dict[str, Any]:
    return {"name": "sentences", "datatype": "BYTES", "shape": [len(texts), 1], "data": list(texts)}


FLAG = {"name": "add_EOS", "datatype": "BOOL", "shape": [1, 1]}


def test_triton_json_scores_a_batch(client: TestClient, engine: RewardEngine) -> None:
    texts = [render_reward(MESSAGES), "the quick fox<extra_id_2>"]
    answer = infer(client, {"id": "7", "inputs": [sentences(*texts)]}).json()
    assert (answer["id"], answer["model_name"]) == ("7", "reward_model")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["rewards"]["shape"] == [2, 9]
    expected = [value for reward in engine.score_ids(ids(engine, texts)) for value in reward.raw]
    assert outputs["rewards"]["data"] == pytest.approx(expected, abs=1e-5)
    assert outputs["exceeded"]["data"] == [0, 0]


def ids(engine: RewardEngine, texts: list[str]) -> list[list[int]]:
    return [engine.tokenizer.encode(text) for text in texts]


def test_triton_tokens_and_end_of_text_are_scored(client: TestClient, engine: RewardEngine) -> None:
    [row] = ids(engine, ["the quick fox"])
    padded = [*row, 0, 0]
    body = {
        "inputs": [
            {"name": "tokens", "datatype": "INT64", "shape": [1, len(padded)], "data": padded},
            {"name": "sequence_lengths", "datatype": "INT64", "shape": [1, 1], "data": [len(row)]},
            {"name": "add_EOS", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
        ]
    }
    outputs = infer(client, body).json()["outputs"]
    assert outputs[0]["data"] == pytest.approx(engine.score_ids([[*row, 3]])[0].raw, abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "give either the input sentences"),
        ([{**sentences("x"), "datatype": "INT64", "data": [1]}], "of type INT64 is unknown"),
        ([sentences("word " * 700)], "expected 1 to 300"),
        ([{**sentences("x"), "shape": [2, 1]}], "has 1 values; shape [2, 1] needs 2"),
        ([{"name": "sentences"}], "not a KServe v2 inference request"),
        ([{**sentences("x"), "shape": [1.9, 1]}], "has shape [1.9, 1]; expected integers"),
        ([sentences("x"), {**FLAG, "data": ["false"]}], "holds 'false'; expected values of BOOL"),
        ([{"name": "tokens", "datatype": "INT64", "shape": [1, 1], "data": [1.5]}], "holds 1.5; expected"),
        ({"inputs": [sentences("x")], "outputs": [5]}, "not a KServe v2 inference request"),
        ({"inputs": [sentences("x")], "parameters": [5]}, "not a KServe v2 inference request"),
    ],
)
def test_a_triton_request_that_cannot_be_scored_is_refused(
    client: TestClient, inputs: Any, message: str
) -> None:
    answer = infer(client, inputs if isinstance(inputs, dict) else {"inputs": inputs})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_another_triton_model_is_not_found(client: TestClient) -> None:
    answer = client.post("/v2/models/other/infer", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_binary_bytes_that_are_cut_short_are_refused(client: TestClient) -> None:
    import json

    data = struct.pack("<I", 100) + b"short"
    entry = {"name": "sentences", "datatype": "BYTES", "shape": [1, 1]}
    text = json.dumps({"inputs": [entry | {"parameters": {"binary_data_size": len(data)}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = infer(client, None, json=None, content=text + data, headers=headers)
    assert answer.status_code == 400
    assert "cut short" in answer.json()["error"]["message"]


PYTRITON = """
import sys
import numpy as np
from pytriton.client import ModelClient
text = sys.argv[2].encode()
with ModelClient(sys.argv[1], "reward_model", init_timeout_s=20) as client:
    found = client.infer_batch(sentences=np.array([[text], [text]], dtype=object))
    assert found["rewards"].shape == (2, 9) and found["rewards"].dtype == np.float32
    assert found["exceeded"].shape == (2, 1)
    print(" ".join(map(repr, found["rewards"][0].tolist())))
"""


@pytest.mark.slow
def test_the_pytriton_client_scores(engine: RewardEngine) -> None:
    """With ``nvidia-pytriton`` in an environment of its own: NEMOTRON4_PYTRITON names its python."""
    peer = os.environ.get("NEMOTRON4_PYTRITON")
    if not peer:
        pytest.skip("NEMOTRON4_PYTRITON names no python that has nvidia-pytriton")
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        text = render_reward(MESSAGES)
        done = subprocess.run(
            [peer, "-c", textwrap.dedent(PYTRITON), f"http://127.0.0.1:{port}", text],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        server.should_exit = True
        thread.join()
    assert done.returncode == 0, done.stderr
    found = [float(value) for value in done.stdout.split()]
    assert found == pytest.approx(engine.score([MESSAGES])[0].raw, abs=1e-5)


def test_the_message_form_is_that_of_every_route(client: TestClient, engine: RewardEngine) -> None:
    turns = [
        {"role": "developer", "content": "Be kind.", "id": "m1"},
        {"role": "user", "content": [{"type": "text", "text": "What is the fox?"}]},
        {"role": "assistant", "content": "quick and brown", "refusal": None, "tool_calls": None},
    ]
    expected = engine.score([[Message("system", "Be kind."), *MESSAGES]])[0]
    answer = client.post("/score", json={"messages": turns, "model": engine.info.name, "qwertz": 1})
    assert answer.json()["reward"] == pytest.approx(expected.scalar, abs=1e-5)
    assert "qwertz" in answer.headers["warning"]
    hosted = {
        "messages": turns,
        "temperature": 0.2,
        "max_tokens": 1,
        "logprobs": True,
        "qwertz": 1,
        "tools": [],
    }
    warning = client.post("/v1/chat/completions", json=hosted).headers["warning"]
    assert sorted(re.findall("unknown field '([a-z_]+)'", warning)) == ["qwertz", "tools"]
    for path in ("/score", "/v1/chat/completions"):
        refused = client.post(path, json={"messages": turns, "model": "other"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_the_hosted_form_streams(client: TestClient, engine: RewardEngine) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": TURNS, "stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
    values = {each["token"]: each["logprob"] for each in chunks[0]["logprobs"]["content"]}
    assert values == pytest.approx(dict(engine.score([MESSAGES])[0].attributes), abs=1e-5)
    assert [chunk["finish_reason"] for chunk in chunks] == [None, "stop"]


def test_rows_of_many_requests_share_passes_and_equal_single_ones(engine: RewardEngine) -> None:
    rows = [engine.tokenizer.encode("the quick fox " * n + "<extra_id_2>") for n in range(1, 30)]
    single = [engine.score_ids([row])[0].raw for row in rows]
    passes = []
    forward = engine._forward

    def counted(batch: Any) -> Any:
        passes.append(len(batch))
        return forward(batch)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.score_async([row]) for row in rows))

    engine._forward = counted  # type: ignore[method-assign]
    try:
        together = asyncio.run(all_at_once())
    finally:
        engine._forward = forward  # type: ignore[method-assign]
    assert sum(passes) == len(rows)
    assert len(passes) < len(rows) / 2
    for [reward], expected in zip(together, single, strict=True):
        assert reward.raw == pytest.approx(expected, abs=1e-5)


def test_scored_rows_are_in_metrics(client: TestClient) -> None:
    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        [line] = [line for line in lines if line.startswith("nemotron4_row_seconds_count")]
        return float(line.split()[-1])

    before = count()
    assert client.post("/score", json={"messages": TURNS}).status_code == 200
    assert count() == before + 1


def test_a_call_that_is_given_up_frees_its_rows_and_a_full_queue_is_busy(engine: RewardEngine) -> None:
    row = engine.tokenizer.encode("the quick fox<extra_id_2>")
    started, go_on = threading.Event(), threading.Event()
    forward = engine._forward
    done: list[int] = []

    def slow(batch: Any) -> Any:
        started.set()
        go_on.wait(20)
        done.append(len(batch))
        return forward(batch)

    async def leave() -> None:
        first = asyncio.create_task(engine.score_async([row]))
        await asyncio.to_thread(started.wait, 20)
        others = [asyncio.create_task(engine.score_async([row])) for _ in range(200)]
        await asyncio.sleep(0)
        assert engine.stats().num_waiting == 200
        with pytest.raises(EngineBusyError):
            await engine.score_async([row] * 900)
        with pytest.raises(RequestError, match="the queue holds 1024"):
            await engine.score_async([row] * 1100)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        go_on.set()
        await first

    engine._forward = slow  # type: ignore[method-assign]
    try:
        asyncio.run(leave())
        engine.score_ids([row])
    finally:
        engine._forward = forward  # type: ignore[method-assign]
    assert done == [1, 1]
