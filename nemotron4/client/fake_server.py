"""The fake behind HTTP: OpenAI routes, ``PUT /generate`` and ``POST /score`` on the loopback interface.

    python -m nemotron4.client.fake_server --port 8000 --latency-ms 20 --fail rate_limit=0.02

A hand-written HTTP/1.1 reader, because a framework would be the bottleneck of every overhead benchmark.
It understands what our clients and common HTTP libraries send: a Content-Length body, keep-alive, no chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from nemotron4.client.fake import (
    PERSONAS,
    FakeBehaviour,
    fake_attributes,
    fake_logprobs,
    fake_vector,
    make_reply,
)
from nemotron4.client.interface import Reply, Sampling
from nemotron4.records import ATTRIBUTES, JsonObject, Message

OddAnswers = Callable[[int, JsonObject], tuple[int, bytes, float | None] | None]
_STATUS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 404: "Not Found",
    405: "Method Not Allowed", 429: "Too Many Requests", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip


class FakeServer:
    """``async with FakeServer(behaviour) as server: ... server.url``. Port 0 picks a free one.

    ``calls`` counts answered calls by route; ``bodies`` counts equal requests by the SHA-256 of their body,
    so a test can tell how many replies were paid twice; ``max_in_flight`` is the highest concurrency seen.
    ``odd`` gives, for the number of a call and its request, what a strange server would send (status, body,
    seconds of Retry-After), or None for an ordinary answer.
    """

    def __init__(
        self,
        behaviour: FakeBehaviour | None = None,
        *,
        port: int = 0,
        model: str = "fake",
        api_key: str | None = None,
        count_bodies: bool = False,
        odd: OddAnswers | None = None,
    ) -> None:
        self.odd = odd
        self.behaviour = behaviour or FakeBehaviour()
        self.model = model
        self.api_key = api_key
        self.calls: Counter[str] = Counter()
        self.bodies: Counter[str] | None = Counter() if count_bodies else None
        self.in_flight = 0
        self.max_in_flight = 0
        self.number = 0
        self._port = port
        self._server: asyncio.Server | None = None
        self.connections: set[_Connection] = set()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients."""
        return f"{self.root}/v1"

    async def __aenter__(self) -> FakeServer:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self._port, backlog=1024
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        await self._server.wait_closed()

    def stats(self) -> JsonObject:
        bodies = self.bodies or Counter()
        return {
            "calls": dict(self.calls),
            "max_in_flight": self.max_in_flight,
            "distinct_bodies": len(bodies),
            "repeated_bodies": sum(bodies.values()) - len(bodies),
        }


class _Connection(asyncio.Protocol):
    """One client connection; requests on it are answered in order."""

    def __init__(self, server: FakeServer) -> None:
        self._fake = server
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._fake.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fake.connections.discard(self)
        self._transport = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next_request()

    def _next_request(self) -> None:
        if self._is_busy:
            return
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._buffer[:head_end].decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
        length = int(headers.get("content-length", "0"))
        end = head_end + 4 + length
        if len(self._buffer) < end:
            return
        body = self._buffer[head_end + 4 : end]
        self._buffer = self._buffer[end:]
        method, path, _ = head[0].split(" ", 2)
        self._is_busy = True
        self._handle(method, path, headers, body)

    def _handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        fake = self._fake
        key = fake.api_key
        if key is not None and headers.get("authorization") != f"Bearer {key}":
            return self._send(401, {"error": {"message": "wrong API key"}})
        if method == "GET":
            simple = {"/v1/models": _models(fake), "/health": {"status": "ok"}, "/stats": fake.stats()}
            return self._send(200, simple[path]) if path in simple else self._send(404, _not_found(path))
        if (method, path) not in _ROUTES:
            return self._send(404, _not_found(path))
        try:
            request = orjson.loads(body)
        except ValueError:
            return self._send(400, {"error": {"message": "the body is not JSON"}})
        fake.number += 1
        fake.calls[path] += 1
        if fake.bodies is not None:
            fake.bodies[hashlib.sha256(body).hexdigest()] += 1
        fake.in_flight += 1
        fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
        number = fake.number
        delay = fake.behaviour.delay_s(number)
        if delay:
            asyncio.get_running_loop().call_later(delay, self._answer, path, request, body, number)
        else:
            self._answer(path, request, body, number)
        return None

    def _answer(self, path: str, request: JsonObject, body: bytes, number: int) -> None:
        fake, behaviour = self._fake, self._fake.behaviour
        fake.in_flight -= 1
        if fake.odd is not None and (odd := fake.odd(number, request)) is not None:
            return self._send_bytes(*odd)
        if behaviour.hopeless is not None and behaviour.hopeless.encode() in body:
            return self._send(400, {"error": {"message": "the fake refuses this prompt", "code": "invalid"}})
        failure = behaviour.failure(number)
        if failure == "rate_limit":
            wait = behaviour.retry_after_s
            return self._send(429, {"error": {"message": "slow down"}}, retry_after_s=wait)
        if failure == "server_error":
            return self._send(503, {"error": {"message": "overloaded"}})
        if failure == "timeout":
            return None  # the client gives up by itself
        if failure == "connection":
            return self.abort()
        if failure == "not_json":
            return self._send_bytes(200, b"<html>a proxy's error page</html>")
        try:
            answer = _ROUTES["POST" if path != "/generate" else "PUT", path](fake, request, failure)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            return self._send(400, {"error": {"message": f"bad request: {error!r}"}})
        return self._send(200, answer)

    def _send(self, status: int, value: Any, *, retry_after_s: float | None = None) -> None:
        self._send_bytes(status, orjson.dumps(value), retry_after_s)

    def _send_bytes(self, status: int, content: bytes, retry_after_s: float | None = None) -> None:
        if self._transport is None:
            return
        extra = "" if retry_after_s is None else f"retry-after: {retry_after_s:g}\r\n"
        head = (
            f"HTTP/1.1 {status} {_STATUS[status]}\r\ncontent-type: application/json\r\n"
            f"{extra}content-length: {len(content)}\r\n\r\n"
        )
        self._transport.write(head.encode() + content)
        self._is_busy = False
        if self._buffer:
            self._next_request()


def _models(fake: FakeServer) -> JsonObject:
    return {"object": "list", "data": [{"id": fake.model, "object": "model", "owned_by": "nemotron4"}]}


def _not_found(path: str) -> JsonObject:
    return {"error": {"message": f"no route {path}"}}


def _sampling(request: JsonObject, top_logprobs: int | None) -> Sampling:
    stop = request.get("stop") or ()
    return Sampling(
        max_tokens=int(request.get("max_tokens") or request.get("max_completion_tokens") or 1024),
        temperature=float(request.get("temperature", 1.0)),
        top_p=float(request.get("top_p", 1.0)),
        seed=request.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        top_logprobs=top_logprobs,
        schema=(request.get("response_format") or {}).get("json_schema", {}).get("schema"),
    )


def _envelope(fake: FakeServer, reply: Reply, kind: str, choice: JsonObject) -> JsonObject:
    prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
    return {
        "id": f"fake-{fake.number}",
        "object": kind,
        "created": 0,
        "model": fake.model,
        "choices": [{"index": 0, **choice, "finish_reason": reply.finish_reason}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def _said(content: str | list[JsonObject]) -> str:
    """A turn's text; some clients send it as a list of parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chat(fake: FakeServer, request: JsonObject, failure: str | None) -> JsonObject:
    messages = [Message(turn["role"], _said(turn["content"])) for turn in request["messages"]]
    top = request.get("top_logprobs", 0) if request.get("logprobs") else None
    reply = make_reply(fake.behaviour, messages, _sampling(request, top), model=fake.model, failure=failure)
    choice: JsonObject = {"message": {"role": "assistant", "content": reply.text}}
    if messages and messages[-1].role == "assistant":  # a finished conversation: the hosted reward form
        values = fake_attributes(messages)
        choice["logprobs"] = {"content": [{"token": n, "logprob": values[n]} for n in ATTRIBUTES]}
    elif reply.logprobs is not None:
        choice["logprobs"] = {
            "content": [
                {
                    "token": t.token,
                    "logprob": t.logprob,
                    "top_logprobs": [{"token": a, "logprob": b} for a, b in t.top],
                }
                for t in reply.logprobs
            ]
        }
    return _envelope(fake, reply, "chat.completion", choice)


def _completion(fake: FakeServer, request: JsonObject, failure: str | None) -> JsonObject:
    prompt = request["prompt"]
    if not isinstance(prompt, str):
        raise ValueError("the fake takes one prompt as a string")
    sampling = _sampling(request, request.get("logprobs"))
    messages = (Message("user", prompt),)
    reply = make_reply(fake.behaviour, messages, sampling, model=fake.model, failure=failure)
    text = prompt + reply.text if request.get("echo") else reply.text
    choice: JsonObject = {"text": text, "logprobs": None}
    if request.get("logprobs") is not None:
        tokens = (fake_logprobs(prompt) if request.get("echo") else ()) + fake_logprobs(reply.text)
        ends = [sum(len(t.token) for t in tokens[:i]) for i in range(len(tokens))]
        choice["logprobs"] = {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "text_offset": ends,
            "top_logprobs": [dict(t.top) for t in tokens],
        }
    return _envelope(fake, reply, "text_completion", choice)


def _generate(fake: FakeServer, request: JsonObject, failure: str | None) -> Any:
    sentences, lengths = request["sentences"], request.get("tokens_to_generate", 64)
    if not isinstance(lengths, int) or lengths < 1:
        return "tokens_to_generate must be an integer greater than 0"
    temperature = 0.0 if request.get("greedy") else float(request.get("temperature", 1.0))
    sampling = Sampling(max_tokens=lengths, temperature=temperature, seed=request.get("random_seed"))
    texts: list[str] = []
    for prompt in sentences:
        messages = (Message("user", prompt),)
        reply = make_reply(fake.behaviour, messages, sampling, model=fake.model, failure=failure)
        texts.append(f"{prompt}{reply.text}" + ("" if reply.finish_reason == "length" else "\n<extra_id_1>"))
    rows = [fake_logprobs(text) for text in texts]
    return {
        "logprob": [[t.logprob for t in row[1:]] for row in rows] if request.get("compute_logprob") else None,
        "offsets": _offsets(rows),
        "sentences": texts,
        "token_ids": [[len(t.token) for t in row] for row in rows],
        "tokens": [[t.token for t in row] for row in rows],
    }


def _offsets(rows: Sequence[Sequence[Any]]) -> list[list[int]]:
    return [[sum(len(t.token) for t in row[:i]) for i in range(len(row))] for row in rows]


def _score(_: FakeServer, request: JsonObject, __: str | None) -> JsonObject:
    messages = [Message(turn["role"], turn["content"]) for turn in request["messages"]]
    return {"attributes": fake_attributes(messages)}


def _embeddings(fake: FakeServer, request: JsonObject, failure: str | None) -> JsonObject:
    given = request["input"]
    texts = [given] if isinstance(given, str) else given
    data = [{"object": "embedding", "index": i, "embedding": fake_vector(t)} for i, t in enumerate(texts)]
    tokens = sum(text.count(" ") + 1 for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": fake.model, "data": data, "usage": usage}


_ROUTES = {
    ("POST", "/v1/chat/completions"): _chat,
    ("POST", "/v1/completions"): _completion,
    ("PUT", "/generate"): _generate,
    ("POST", "/score"): _score,
    ("POST", "/v1/embeddings"): _embeddings,
}


def _behaviour_from(arguments: argparse.Namespace) -> FakeBehaviour:
    rates = {kind: float(rate) for kind, _, rate in (entry.partition("=") for entry in arguments.fail)}
    return FakeBehaviour(
        latency_s=arguments.latency_ms / 1000,
        latency_spread=arguments.latency_spread,
        failure_rates=rates,
        hopeless=arguments.hopeless,
        retry_after_s=arguments.retry_after,
        seed=arguments.seed,
        script=PERSONAS.get(arguments.persona),
    )


async def _serve(arguments: argparse.Namespace) -> None:
    server = FakeServer(_behaviour_from(arguments), port=arguments.port, count_bodies=arguments.count_bodies)
    async with server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free port; the base URL is printed")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument(
        "--latency-spread", type=float, default=0.0, help="0.5: from 50 to 150 %% of the latency"
    )
    parser.add_argument("--fail", action="append", default=[], metavar="KIND=RATE")
    parser.add_argument("--hopeless", help="prompts with this text are refused with 400")
    parser.add_argument("--retry-after", type=float, help="seconds, sent with 429")
    parser.add_argument("--persona", choices=sorted(PERSONAS), help="falls for every attack, or refuses all")
    parser.add_argument("--count-bodies", action="store_true", help="GET /stats then tells repeated requests")
    parser.add_argument("--seed", type=int, default=0)
    try:
        asyncio.run(_serve(parser.parse_args(argv)))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
