"""One request gives the same tokens, text, end and log-probabilities through every door to a model."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.cli.answering import Wanted
from nemotron4.cli.batch import Output, answer_file
from nemotron4.cli.conversation import Chat
from nemotron4.client import EngineChatModel, GenerateChatModel, OpenAIChatModel, Reply, Sampling
from nemotron4.engine import InferenceEngine, SamplingParams, SamplingRequest, derive_seed
from nemotron4.errors import RequestError, TemplateError
from nemotron4.inference.engine import Engine
from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.records import Message
from nemotron4.server.app import create_app
from nemotron4.server.settings import ServerSettings
from nemotron4.text.answers import encode_text, run, samples, text_request
from nemotron4.text.prompt import nemotron4 as nemotron4_format
from nemotron4.text.prompt import render
from tests import tiny_models
from tests.server.conftest import serving_app

QUESTION = (Message("user", "Where does the light come from?"),)


@dataclass(frozen=True)
class Ask:
    """One request, in no door's words."""

    prompt: str | tuple[Message, ...] = QUESTION
    max_new_tokens: int = 12
    temperature: float = 0.0
    seed: int | None = 1
    n: int = 1
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    logprobs: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a door tells of one answer; None is what it does not tell."""

    text: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = field(default=None)


Door = Callable[[Any, Ask, Path], list[Outcome]]


def _params(ask: Ask) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        stop_strings=ask.stop,
        min_new_tokens=ask.min_new_tokens,
        logprobs=0 if ask.logprobs else None,
    )


def by_load(engine: Engine, ask: Ask, _: Path) -> list[Outcome]:
    found = engine.generate(
        ask.prompt,
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        n=ask.n,
        stop=ask.stop,
        min_new_tokens=ask.min_new_tokens,
        logprobs=0 if ask.logprobs else None,
    )
    return [Outcome(g.text, g.finish_reason, g.token_ids, g.logprobs) for g in found]


def by_openai_route(engine: InferenceEngine, ask: Ask, _: Path) -> list[Outcome]:
    is_chat = not isinstance(ask.prompt, str)
    body: dict[str, Any] = {
        "max_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "n": ask.n,
        "stop": list(ask.stop),
        "min_tokens": ask.min_new_tokens,
    }
    if is_chat:
        body |= {"messages": [message.to_json() for message in ask.prompt], "logprobs": ask.logprobs}  # type: ignore[union-attr]
    else:
        body |= {"prompt": ask.prompt, "logprobs": 0 if ask.logprobs else None}
    answer = _request(engine, "POST", "/v1/chat/completions" if is_chat else "/v1/completions", body)
    return [
        Outcome(
            choice["message"]["content"] if is_chat else choice["text"],
            choice["finish_reason"],
            logprobs=_route_logprobs(choice["logprobs"], is_chat) if ask.logprobs else None,
        )
        for choice in answer["choices"]
    ]


def _route_logprobs(given: Any, is_chat: bool) -> tuple[float, ...]:
    return tuple(
        [each["logprob"] for each in given["content"]] if is_chat else given["token_logprobs"],
    )


def by_generate_route(engine: InferenceEngine, ask: Ask, _: Path) -> list[Outcome]:
    """``PUT /generate`` continues raw text and ends where NeMo does: here only at the length."""
    prompt = ask.prompt if isinstance(ask.prompt, str) else render(ask.prompt)
    body = {
        "sentences": [prompt] * ask.n,
        "tokens_to_generate": ask.max_new_tokens,
        "greedy": ask.temperature == 0,
        "temperature": ask.temperature or 1.0,
        "top_p": 1.0,
        "random_seed": ask.seed,
        "add_BOS": engine.info.adds_bos,
        "end_strings": ["<|endoftext|>", *ask.stop],
        "min_tokens_to_generate": ask.min_new_tokens,
        "compute_logprob": ask.logprobs,
    }
    answer = _request(engine, "PUT", "/generate", body)
    start = len(encode_text(engine, prompt))
    return [
        Outcome(
            sentence[len(prompt) :],
            token_ids=tuple(answer["token_ids"][row][start:]),
            logprobs=tuple(answer["logprob"][row][start - 1 :]) if ask.logprobs else None,
        )
        for row, sentence in enumerate(answer["sentences"])
    ]


def _request(engine: InferenceEngine, method: str, path: str, body: object) -> Any:
    transport = httpx.ASGITransport(create_app(engine, ServerSettings()))

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, json=body)

    answer = asyncio.run(send())
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_generate_command(engine: InferenceEngine, ask: Ask, folder: Path) -> list[Outcome]:
    prompt: dict[str, Any] = {"prompt": ask.prompt}
    if not isinstance(ask.prompt, str):
        prompt = {"messages": [message.to_json() for message in ask.prompt]}
    source = folder / "rows.jsonl"
    row = {**prompt, "min_new_tokens": ask.min_new_tokens}
    source.write_text("".join(json.dumps(row) + "\n" for _ in range(ask.n)))
    wanted = Wanted(params=_params(ask))
    with Output(folder / "answers.jsonl", {}) as output:
        answer_file(lambda: _Kept(engine), source, output, wanted, max_in_flight=4)  # type: ignore[arg-type,return-value]
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return [
        Outcome(
            row["text"], row["finish_reason"], tuple(row["token_ids"]), tuple(row.get("logprobs", ())) or None
        )
        for row in rows
    ]


class _Kept:
    """An engine whose user may not close it."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """The test closes it."""


def by_chat_command(engine: InferenceEngine, ask: Ask, _: Path) -> list[Outcome]:
    assert not isinstance(ask.prompt, str)
    output, lines = io.StringIO(), iter([ask.prompt[-1].content])

    def read_line() -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    Chat(engine, _params(ask), output=output).run(read_line, is_interactive=False)
    return [Outcome(output.getvalue().removesuffix("\n"))]


def by_chat_model(engine: InferenceEngine, ask: Ask, _: Path) -> list[Outcome]:
    model = EngineChatModel(engine)
    sampling = Sampling(
        max_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        stop=ask.stop,
        top_logprobs=0 if ask.logprobs else None,
    )

    async def ask_all() -> list[Reply]:
        seeds = [derive_seed(ask.seed, i) for i in range(ask.n)]
        each = [replace(sampling, seed=seed) for seed in seeds]
        if isinstance(ask.prompt, str):
            return [await model.complete(ask.prompt, one) for one in each]
        return [await model.chat(ask.prompt, one) for one in each]

    return [
        Outcome(
            reply.text,
            reply.finish_reason,
            logprobs=tuple(e.logprob for e in reply.logprobs) if reply.logprobs else None,
        )
        for reply in asyncio.run(ask_all())
    ]


def by_rollout(engine: Engine, ask: Ask, folder: Path) -> list[Outcome]:
    base = open_checkpoint(folder.parent / "model")
    net, _ = load_transformer(base, dtype=torch.float32)
    ids = encode_text(engine, ask.prompt) if isinstance(ask.prompt, str) else None
    if ids is None:
        prompt_format = base.prompt_format()
        assert prompt_format is not None
        ids = prompt_format.encode(base.tokenizer(), ask.prompt)  # type: ignore[arg-type]
    found = RolloutEngine(base)(net, samples(SamplingRequest(tuple(ids), _params(ask)), ask.n))
    return [Outcome(g.text, g.finish_reason, g.token_ids, g.logprobs) for g in found]


DOORS: dict[str, Door] = {
    "load": by_load,
    "openai": by_openai_route,
    "generate command": by_generate_command,
    "chat model": by_chat_model,
    "rollout": by_rollout,
    "generate route": by_generate_route,
    "chat command": by_chat_command,
}
# What a door has no word for, it is not asked.
ASKS: dict[str, tuple[Ask, set[str]]] = {
    "greedy chat": (Ask(), set()),
    "a drawn chat": (Ask(temperature=1.0, seed=7), set()),
    "raw text": (Ask(prompt="the light in", logprobs=True), {"chat command"}),
    "raw text drawn": (Ask(prompt="the light in", temperature=1.0, logprobs=True), {"chat command"}),
    "two samples of one seed": (Ask(prompt="the light", temperature=1.0, n=2), {"chat command"}),
    "chat with log-probabilities": (Ask(logprobs=True), {"chat command"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 64 output rows more than its vocabulary, which expects BOS, and with an impossible end."""
    folder = tmp_path_factory.mktemp("doors")
    path = tiny_models.nemotron_directory(folder / "model", vocab_size=tiny_models.VOCAB_SIZE + 64)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [3, 5000]}))
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with nemotron4.load(folder / "model", dtype="float32") as engine:
        yield engine


@pytest.mark.parametrize("name", ASKS)
def test_every_door_gives_the_same_answer(engine: Engine, folder: Path, name: str, tmp_path: Path) -> None:
    ask, without = ASKS[name]
    reference = by_load(engine, ask, folder)
    assert all(token_id < engine.tokenizer.vocab_size for g in reference for token_id in g.token_ids or ())
    for door, through in DOORS.items():
        if door in without or (door == "generate route" and not isinstance(ask.prompt, str)):
            continue
        place = folder / name.replace(" ", "-") / door.replace(" ", "-")
        place.mkdir(parents=True)
        found = through(engine, ask, folder / "x" if door == "rollout" else place)
        assert len(found) == len(reference), door
        for one, expected in zip(found, reference, strict=True):
            assert one.text == expected.text, door
            assert one.finish_reason in (None, expected.finish_reason), door
            assert one.token_ids in (None, expected.token_ids), door
            if one.logprobs is not None:
                assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-4), door


# -- texts: the shipped fake says what a model might; every door must show the same of it

TEXT_DOORS = {name: door for name, door in DOORS.items() if name not in ("load", "rollout", "generate route")}


@pytest.mark.parametrize(
    ("reply", "ask", "text", "without"),
    [
        ("the sun\n<extra_id_1>User", Ask(), "the sun", set()),
        ("the sun\n\n", Ask(max_new_tokens=30), "the sun\n", set()),
        ("a STOP b", Ask(stop=(" STOP",), max_new_tokens=30), "a", set()),
        ("a.b.c.d", Ask(stop=(".",), min_new_tokens=5, max_new_tokens=30), "a.b.c", {"chat model"}),
        ("\nkept\n", Ask(prompt="raw", max_new_tokens=30), "\nkept\n", {"chat command"}),
    ],
)
def test_every_door_shows_the_same_text(
    reply: str, ask: Ask, text: str, without: set[str], tmp_path: Path
) -> None:
    for name, door in TEXT_DOORS.items():
        if name not in without:
            place = tmp_path / name.replace(" ", "-")
            place.mkdir()
            [found] = door(FakeEngine(reply, prompt_format=nemotron4_format()), ask, place)
            assert (found.text, found.finish_reason or "stop") == (text, "stop"), name


@pytest.mark.parametrize("prompt", ["<s>x</s><|endoftext|>", "x", " x  <s>", "<extra_id_1>é"])
def test_a_prompt_is_echoed_as_it_was_sent(engine: Engine, prompt: str) -> None:
    answer = _request(engine, "PUT", "/generate", {"sentences": [prompt], "tokens_to_generate": 3})
    assert answer["sentences"][0].startswith(prompt)
    body = {"prompt": prompt, "echo": True, "max_tokens": 3}
    assert _request(engine, "POST", "/v1/completions", body)["choices"][0]["text"].startswith(prompt)


def test_a_client_over_http_sees_what_the_model_in_process_says(tmp_path: Path) -> None:
    engine = FakeEngine("the sun\n<extra_id_1>User", prompt_format=nemotron4_format())

    async def ask_all(url: str) -> list[str]:
        models = [OpenAIChatModel(f"{url}/v1", "fake"), GenerateChatModel(url), EngineChatModel(engine)]
        texts = [(await model.chat(QUESTION, Sampling(max_tokens=30))).text for model in models]
        for model in models:
            await model.close()
        return texts

    with serving_app(create_app(engine)) as url:
        assert asyncio.run(ask_all(url)) == ["the sun"] * 3


@pytest.mark.parametrize("continuations", [["a", "b"], ["a", "bcd"]], ids=["of one token", "of several"])
def test_a_client_over_http_weighs_what_the_model_in_process_does(continuations: list[str]) -> None:
    engine = FakeEngine()

    async def ask_all(url: str) -> list[list[list[float]]]:
        models = [OpenAIChatModel(f"{url}/v1", "fake"), GenerateChatModel(url), EngineChatModel(engine)]
        found = [await model.continuation_logprobs("the sun", continuations) for model in models]
        for model in models:
            await model.close()
        return [[[token.logprob for token in tokens] for tokens in rows] for rows in found]

    with serving_app(create_app(engine)) as url:
        first, second, own = asyncio.run(ask_all(url))
    assert [len(values) for values in own] == [len(text) for text in continuations]
    for other in (first, second):
        assert [pytest.approx(values, abs=1e-5) for values in other] == own


# -- what a door is given


def test_one_prompt_is_one_prompt_and_anything_else_is_a_clear_error(engine: Engine) -> None:
    few: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0}
    assert len(engine.generate("hello", **few)) == 1
    assert len(engine.generate([5, 6, 7], **few)) == 1
    assert len(engine.generate([{"role": "user", "content": "hi"}], **few)) == 1
    assert len(engine.generate([Message("user", "hi")], **few)) == 1
    assert len(engine.generate(["a", [5, 6], [{"role": "user", "content": "hi"}]], **few)) == 3
    for bad in ([["a", "b"]], [[]], [[1, "a"]], [None], [3.5], 7, [[True]]):
        with pytest.raises(RequestError):
            engine.generate(bad, **few)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="content"):
        engine.generate([{"role": "user"}], **few)
    with pytest.raises(RequestError, match="unknown setting 'top_n'"):
        engine.generate("a", top_n=1)


def test_bos_is_added_once(engine: Engine) -> None:
    assert encode_text(engine, "light")[:1] == [engine.tokenizer.bos_id]
    request = text_request(engine, "<s>light", SamplingParams())
    assert request.prompt_ids.count(2) <= 1 or request.prompt_ids[:2] != (2, 2)


def test_an_impossible_end_is_dropped_with_a_note(engine: Engine) -> None:
    assert engine.info.eos_token_ids == (3, 5)
    assert any("5000" in note for note in engine.info.notes)


def test_a_model_without_a_usable_template_continues_text_and_refuses_messages(tmp_path: Path) -> None:
    path = tiny_models.llama_directory(tmp_path / "model")
    config = json.loads((path / "tokenizer_config.json").read_text())
    for template, is_noted in (("{{ messages[0].nothing.there }}", True), (None, False)):
        changed = {**config, "chat_template": template} if template else {"bos_token": "<|im_start|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(changed))
        if template is None:
            tokens = json.loads((path / "tokenizer.json").read_text())
            tokens["added_tokens"] = tokens["added_tokens"][:1]
            (path / "tokenizer.json").write_text(json.dumps(tokens))
        with nemotron4.load(path, dtype="float32") as engine:
            assert engine.prompt_format is None
            assert any("plain question" in note for note in engine.info.notes) is is_noted
            assert asyncio.run(EngineChatModel(engine).complete("Shall I", Sampling(max_tokens=3))).text
            with pytest.raises(TemplateError, match="no chat template"):
                engine.generate([Message("user", "hi")])


def test_ids_without_a_piece_are_not_listed_nor_accepted(engine: Engine) -> None:
    size = engine.tokenizer.vocab_size
    params = SamplingParams(max_new_tokens=4, temperature=5.0, seed=1, logprobs=600, full_logprobs=True)
    answer = asyncio.run(run(engine, text_request(engine, "light", params)))
    for position in answer.logprobs:
        assert len(position.top) == size == len(position.full or ())
        assert max(each.token_id for each in position.top) < size
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.generate([[size]])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.generate("a", logit_bias={size: 1.0})
