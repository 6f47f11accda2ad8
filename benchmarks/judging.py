"""A reward model under load: scores a second with one connection and with many, on one server.

    python benchmarks/judging.py [--connections 32] [--seconds 10] [--cases 128+32 0+16 0+64] [--passes]

The model has the shape of the demo model (134.5 M) with a reward head, random weights in float32, and its
vocabulary. A case is the tokens of a prompt that all requests have, and of an answer that is each one's own;
each request is one ``POST /score``. The clients are a process of their own. Prints JSON lines: scores a
second by one connection and by many, and the ratio. ``--passes``: without a server, the fastest of five
passes over one row and over as many as connections, and the products with the body's weights in each: where
a lone row is near what many reach, company cannot help it.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time

import torch
import uvicorn

from nemotron4.checkpoint import open_checkpoint
from nemotron4.engine import ModelInfo
from nemotron4.inference.reward import RewardEngine
from nemotron4.model.presets import PRESETS
from nemotron4.model.reward_head import ATTRIBUTE_NAMES, RewardModel
from nemotron4.server.app import create_app


def random_engine(dtype: str = "float32") -> RewardEngine:
    checkpoint = open_checkpoint("smollm2")
    config = dataclasses.replace(PRESETS["smollm2-135m"](), num_reward_attributes=len(ATTRIBUTE_NAMES))
    torch.manual_seed(0)
    model = RewardModel(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    model.reward_head.float()
    info = ModelInfo("reward", config.context_length, config.vocab_size, 0, dtype, "cpu", ())
    return RewardEngine(model, info, checkpoint.tokenizer(), checkpoint.prompt_format())


def digits(numbers: random.Random, count: int) -> str:
    """A text of so many tokens: a digit is one in this vocabulary."""
    return "".join(str(numbers.randrange(10)) for _ in range(count))


def ask(port: int, case: str, connections: int, seconds: float) -> float:
    """Scores a second of so many connections that each send one request after the other."""
    counts, end = [0] * connections, time.perf_counter() + seconds
    num_shared, num_own = map(int, case.split("+"))
    prompt = digits(random.Random("prompt"), num_shared)

    def client(number: int) -> None:
        words = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.perf_counter() < end:
            body = json.dumps({"text": prompt + digits(words, num_own)})
            connection.request("POST", "/score", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert len(json.loads(response.read())["raw"]) == len(ATTRIBUTE_NAMES), response.status
            counts[number] += 1
        connection.close()

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def passes(engine: RewardEngine, case: str, num_rows: int) -> dict[str, float | str]:
    """Rows a second, and products of the body in GFLOP/s, of one row and of many at once."""
    numbers, (num_shared, num_own) = random.Random(case), map(int, case.split("+"))
    shared = [numbers.randrange(1000, 40000) for _ in range(num_shared)]
    rows = [shared + [numbers.randrange(1000, 40000) for _ in range(num_own)] for _ in range(num_rows)]
    body = sum(weight.numel() for name, weight in engine.model.named_parameters() if "layers." in name)
    found: dict[str, float | str] = {"case": case, "dtype": engine.info.dtype}
    for name, some in (("one", rows[:1]), ("many", rows)):
        times = []
        for _ in range(6):  # the first is warm-up
            start = time.perf_counter()
            engine.score_ids(some)
            times.append(time.perf_counter() - start)
        num_tokens = num_shared + num_own * len(some)
        found[f"{name}_rows_per_s"] = round(len(some) / min(times[1:]), 1)
        found[f"{name}_gflop_per_s"] = round(2 * body * num_tokens / min(times[1:]) / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cases", nargs="+", default=["128+32", "0+16", "0+64"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--passes", action="store_true")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.port is not None:  # the clients' process
        for case in settings.cases:
            one, many = (
                ask(settings.port, case, connections, settings.seconds)
                for connections in (1, settings.connections)
            )
            print(json.dumps({"case": case, "one": one, "many": many, "ratio": many / one}), flush=True)
        return
    engine = random_engine(settings.dtype)
    if settings.passes:
        for case in settings.cases:
            print(json.dumps(passes(engine, case, settings.connections)), flush=True)
        engine.close()
        return
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    app = create_app(engine, access_log=lambda context, trace: None)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(listener.getsockname()[1])]
    subprocess.run(command, check=True)
    server.should_exit = True
    thread.join()
    engine.close()


if __name__ == "__main__":
    main()
