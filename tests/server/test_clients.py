"""The clients that people have: the model card's program, the official ``openai`` package, on a real port."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import requests

from nemotron4.errors import EngineBusyError
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.settings import ServerSettings
from nemotron4.text.prompt import nemotron4

POEM = "Shall I compare thee to a summer's GPU?\nThou art more parallel.\n"

# The program of the Nemotron-4-340B-Instruct model card, as published; only the port is a parameter here.
CARD_CLIENT = '''
import json
import requests

headers = {"Content-Type": "application/json"}

def text_generation(data, ip='localhost', port=None):
    resp = requests.put(f'http://{ip}:{port}/generate', data=json.dumps(data), headers=headers)
    return resp.json()

def get_generation(prompt, greedy, add_BOS, token_to_gen, min_tokens, temp, top_p, top_k, repetition, batch=False):
    data = {
        "sentences": [prompt] if not batch else prompt,
        "tokens_to_generate": int(token_to_gen),
        "temperature": temp,
        "add_BOS": add_BOS,
        "top_k": top_k,
        "top_p": top_p,
        "greedy": greedy,
        "all_probs": False,
        "repetition_penalty": repetition,
        "min_tokens_to_generate": int(min_tokens),
        "end_strings": ["<|endoftext|>", "<extra_id_1>", "\\x11", "<extra_id_1>User"],
    }
    sentences = text_generation(data, port=1424)['sentences']
    return sentences[0] if not batch else sentences

PROMPT_TEMPLATE = """<extra_id_0>System

<extra_id_1>User
{prompt}
<extra_id_1>Assistant
"""

question = "Write a poem on NVIDIA in the style of Shakespeare"
prompt = PROMPT_TEMPLATE.format(prompt=question)
print(prompt)

response = get_generation(prompt, greedy=True, add_BOS=False, token_to_gen=1024, min_tokens=1, temp=1.0, top_p=1.0, top_k=0, repetition=1.0, batch=False)
response = response[len(prompt):]
if response.endswith("<extra_id_1>"):
    response = response[:-len("<extra_id_1>")]
print(response)
'''  # noqa: E501


@pytest.fixture
def running(serving: Callable[..., Any]) -> Iterator[Any]:
    engine = FakeEngine({"Shakespeare": POEM + "<extra_id_1>User", "": "é 1, 2"}, prompt_format=nemotron4())
    with serving(engine, ServerSettings(api_keys=())) as running:
        yield running
        running.wait_idle()


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_the_card_client_prints_the_poem(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program = CARD_CLIENT.replace("port=1424", f"port={running.port}")
    assert program != CARD_CLIENT
    exec(compile(program, "call_server.py", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    prompt = (
        "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n"
        "<extra_id_1>Assistant\n"
    )
    assert printed == f"{prompt}\n{POEM}\n"


def test_the_readiness_probe_of_the_card_s_script_gets_an_answer(running: Any) -> None:
    assert requests.put(running.url, timeout=5).status_code == 404


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        temperature=0,
        n=2,
        seed=1,
        logprobs=True,
        top_logprobs=1,
        user="me",
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    assert [choice.message.content for choice in answer.choices] == ["é 1, 2"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert [entry.bytes for entry in answer.choices[0].logprobs.content or ()][:2] == [[0xC3], [0xA9]]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert deltas == ["", "é", " ", "1", ",", " ", "2", ""]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "b"], temperature=0, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["aé 1, 2", "bé 1, 2"]
    assert answer.choices[0].logprobs is not None
    streamed = client.completions.create(model="fake", prompt="a", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "é 1, 2"


def test_openai_asynchronously(running: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        if number % 2:
            answer = await client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(
            model="fake", messages=MESSAGES, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    assert asyncio.run(ask_all()) == ["é 1, 2"] * 20


def test_openai_s_parse_and_stream_helpers(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=MESSAGES, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == "é 1, 2"


def test_openai_maps_the_errors(running: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="context length is 4096"):
        client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=5000)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice={"type": "function", "function": {"name": "g"}},
        )
    running.engine.fail_next(ValueError("broken"))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="fake", messages=MESSAGES)
    running.engine.fail_next(ValueError("broken"), after_tokens=2)
    with pytest.raises(openai.APIError, match="Internal server error"):
        list(client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0, stream=True))


def test_openai_with_an_api_key(serving: Callable[..., Any]) -> None:
    with serving(FakeEngine("a"), ServerSettings(api_keys=("right",))) as running:
        for key, is_right in (("right", True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
                if is_right:
                    assert client.completions.create(model="fake", prompt="p").choices[0].text
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.completions.create(model="fake", prompt="p")


def test_openai_when_the_queue_is_full(serving: Callable[..., Any]) -> None:
    with (
        serving(FakeEngine(max_running=1, max_waiting=1)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="3 rows; this server has room for 2"):
            client.completions.create(model="fake", prompt="p", n=3)
        running.engine.fail_next(EngineBusyError("full", retry_after_s=1.0))
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="fake", prompt="p")
        assert client.completions.create(model="fake", prompt="p", n=2).choices


def test_a_user_program_that_reads_sentences_from_a_refusal_sees_the_reason(running: Any) -> None:
    reply = requests.put(f"{running.url}/generate", json={"sentences": ["a"], "top_p": 2}, timeout=5)
    assert (reply.status_code, json.loads(reply.text)) == (
        200,
        "top_p must be a positive number less than or equal to 1.0",
    )
    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["X-Request-Id"])
