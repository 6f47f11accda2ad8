"""What the routes add to the engine: the server as ``nemotron4 serve`` runs it, over fixed steps.

    python benchmarks/inference/routes.py [--rounds 3] [--requests 40] [--streams 64] [--rate 5000]

generate: 32 clients send ``PUT /generate`` one after another, with pauses; ms that a request took longer than
its row in the engine. streams: 64 connections to ``POST /v1/completions`` get one event a token, first
with steps that make ``--rate`` tokens/s, then with steps of no time; tokens/s of engine and clients, and
ms from a row's end in the engine to the end of its stream. Clients and server are two processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection

from stand_in import stand_in

from nemotron4.engine import SamplingParams, TokenStep
from nemotron4.inference.engine import Engine
from nemotron4.server.run import run
from nemotron4.server.settings import ServerSettings

CLIENTS, NEW = 32, 32
STEP_S = 0.01  # of the engine that answers /generate
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Watched(Engine):
    """Notes when each row began and ended, by its prompt; ``perf_counter`` is one clock for all processes."""

    rows: dict[str, tuple[float, float]]

    async def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        began = time.perf_counter()
        async for step in super().stream(prompt_ids, params):
            if step.finish_reason is not None:
                self.rows[self.tokenizer.decode(prompt_ids)] = (began, time.perf_counter())
            yield step


def serve(port: int, step_s: float, results: Connection) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # a line for each request
    engines: list[Watched] = []
    steps: list[float] = []

    def start() -> Engine:
        engine = stand_in(Watched, step_s=step_s, on_step=lambda: steps.append(time.perf_counter()))
        assert isinstance(engine, Watched)
        engine.rows = {}
        engines.append(engine)
        return engine

    run(start, port=port, settings=ServerSettings(page=None))
    results.send((engines[0].rows, steps))


class Server:
    """The server's process, and what it noted, once it has ended."""

    def __init__(self, step_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._results, there = context.Pipe()
        self._process = context.Process(target=serve, args=(self.port, step_s, there))
        self._process.start()

    def end(self) -> tuple[dict[str, tuple[float, float]], list[float]]:
        assert self._process.pid is not None
        self._process.terminate()
        noted = self._results.recv()
        self._process.join()
        return noted


async def connect(port: int) -> tuple[Reader, Writer]:
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:  # until the server is ready
            await asyncio.sleep(0.05)


def request(method: str, path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def ask(port: int, client: int, num_requests: int) -> dict[str, float]:
    """Seconds of each request by its prompt."""
    reader, writer = await connect(port)
    pause = random.Random(client)
    took: dict[str, float] = {}
    for number in range(num_requests):
        prompt = f"client {client} asks for the {number}th time"
        await asyncio.sleep(pause.uniform(0, 10 * STEP_S))
        began = time.perf_counter()
        writer.write(
            request("PUT", "/generate", {"sentences": [prompt], "tokens_to_generate": NEW, "greedy": True})
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200"), head
        await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
        took[prompt] = time.perf_counter() - began
    writer.close()
    return took


async def read_stream(port: int, prompt: str, num_new: int) -> tuple[int, float]:
    """Events that came, and when the last one did."""
    reader, writer = await connect(port)
    body = {"prompt": prompt, "max_tokens": num_new, "temperature": 0, "stream": True}
    writer.write(request("POST", "/v1/completions", body))
    num_events, rest = 0, b""
    while b"[DONE]" not in rest:
        part = await reader.read(1 << 16)
        assert part, "the stream ended early"
        num_events += (rest + part).count(b"data: {") - rest.count(b"data: {")
        rest = (rest + part)[-16:]
    writer.close()
    return num_events, time.perf_counter()


def measure_generate(num_requests: int) -> dict[str, object]:
    server = Server(STEP_S)

    async def all_clients() -> list[dict[str, float]]:
        await ask(server.port, CLIENTS, 5)  # what is slow once
        return await asyncio.gather(*(ask(server.port, i, num_requests) for i in range(CLIENTS)))

    answers = asyncio.run(all_clients())
    rows, _ = server.end()
    added_ms = [
        1e3 * (seconds - (rows[prompt][1] - rows[prompt][0]))
        for took in answers
        for prompt, seconds in took.items()
    ]
    p50, p99 = statistics.median(added_ms), statistics.quantiles(added_ms, n=100)[98]
    return {"case": "generate", "requests": len(added_ms), "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}


def measure_streams(num_streams: int, num_new: int, step_s: float) -> dict[str, object]:
    server = Server(step_s)

    async def all_clients() -> list[tuple[int, float]]:
        await read_stream(server.port, "what is slow once", 32)
        prompts = [f"stream {i}" for i in range(num_streams)]
        return await asyncio.gather(*(read_stream(server.port, each, num_new) for each in prompts))

    answers = asyncio.run(all_clients())
    rows, _ = server.end()
    ends = [rows[f"stream {i}"][1] for i in range(num_streams)]
    began = min(rows[f"stream {i}"][0] for i in range(num_streams))
    num_tokens = num_streams * num_new
    assert sum(count for count, _ in answers) == num_tokens, "one event a token"
    lags = [at - end for (_, at), end in zip(answers, ends, strict=True)]
    return {
        "case": f"streams, steps of {1e3 * step_s:.1f} ms",
        "engine_tokens_per_s": round(num_tokens / (max(ends) - began)),
        "tokens_per_s": round(num_tokens / (max(at for _, at in answers) - began)),
        "lag_ms": round(1e3 * statistics.median(lags), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40, help="of each client")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new", type=int, default=256, help="tokens of a stream")
    parser.add_argument("--rate", type=int, default=5000, help="tokens/s of all streams")
    options = parser.parse_args()
    for _ in range(options.rounds):
        print(json.dumps(measure_generate(options.requests)), flush=True)
        for step_s in (options.streams / options.rate, 0.0):
            print(json.dumps(measure_streams(options.streams, options.new, step_s)), flush=True)


if __name__ == "__main__":
    main()
