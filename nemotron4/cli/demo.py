"""``scripts/demo``: from nothing to the model card's answer. Fetch a model, serve it, ask it, stop.

python -m nemotron4.cli.demo [--port 1424] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import httpx

from nemotron4.cli.child_server import ChildServer, require_free_port, run_child
from nemotron4.cli.console import note
from nemotron4.cli.main import explained
from nemotron4.cli.options import PORT
from nemotron4.errors import Nemotron4Error
from nemotron4.progress import Waiting

HOST = "127.0.0.1"
MODEL = "smollm2"
READY_S = 240.0  # the first start merges the adapter
QUESTION = "Write a poem on NVIDIA in the style of Shakespeare"
# The request of the model card of Nemotron-4-340B-Instruct, as its client call_server.py sends it.
CARD_PROMPT = f"<extra_id_0>System\n\n<extra_id_1>User\n{QUESTION}\n<extra_id_1>Assistant\n"
CARD_REQUEST: dict[str, Any] = {
    "sentences": [CARD_PROMPT],
    "tokens_to_generate": 1024,
    "temperature": 1.0,
    "add_BOS": False,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": True,
    "all_probs": False,
    "repetition_penalty": 1.0,
    "min_tokens_to_generate": 1,
    "end_strings": ["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"],
}
CHAT_TOKENS = 256


class DemoAnswer(NamedTuple):
    text: str
    num_tokens: int
    seconds: float

    def speed(self) -> str:
        rate = self.num_tokens / self.seconds
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s: {rate:.0f} tokens/s"


def demo(*, port: int, keep: bool, program: Sequence[str] = ()) -> int:
    """The whole demonstration; the exit status. ``program`` stands for ``nemotron4`` in tests."""
    require_free_port(HOST, port)
    pull, serve = ["pull", MODEL], ["serve", MODEL, "--host", HOST, "--port", str(port)]
    _step(f"nemotron4 {' '.join(pull)}")
    if status := run_child([*(program or _program(keep=True)), *pull]):
        return status
    _step(f"nemotron4 {' '.join(serve)}")
    with _log_file(keep=keep) as log:
        started = time.monotonic()
        command = [*(program or _program(keep=keep)), *serve]
        with ChildServer(command, url=f"http://{HOST}:{port}", log=log, may_outlive=keep) as server:
            with Waiting("loading the model"):
                server.wait_until_ready(timeout_s=READY_S)
            note(f"ready after {time.monotonic() - started:.1f} s")
            converse(server)
            if keep:
                server.keep()
                _what_next(server)
    return 0


def _program(*, keep: bool) -> list[str]:
    return [sys.executable, "-m", "nemotron4" if keep else "nemotron4.cli.lifeline"]


@contextmanager
def _log_file(*, keep: bool) -> Iterator[Path]:
    """Where the server writes; only a server that is kept keeps it."""
    descriptor, name = tempfile.mkstemp(prefix="nemotron4-demo-", suffix=".log")
    os.close(descriptor)
    is_done = False
    try:
        yield Path(name)
        is_done = True
    finally:
        if not (keep and is_done):
            Path(name).unlink()


def converse(server: ChildServer) -> None:
    """The card's request, then the same question as a chat."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=None) as client:
        try:
            _step(f"PUT {server.url}/generate   (the model card's request)")
            print(CARD_PROMPT, flush=True)
            with Waiting(f"generating up to {CARD_REQUEST['tokens_to_generate']} tokens"):
                answer = ask_card(client)
            print(answer.text, flush=True)
            note(f"\n{answer.speed()}")
            note("A ChatML model of 135M parameters; the adapter that ships taught it the card's format.")
            _step(f"POST {server.url}/v1/chat/completions   (the server writes the format)")
            note(f"{QUESTION}\n")
            note(f"\n{stream_chat(client).speed()}")
        except httpx.TransportError as error:
            raise server.failure(f"the server stopped answering ({error})") from error


def ask_card(client: httpx.Client) -> DemoAnswer:
    """What the card's client does: PUT, then cut the prompt off the front and the end string off the end."""
    started = time.monotonic()
    response = client.put("/generate", content=json.dumps(CARD_REQUEST), headers=_JSON)
    seconds = time.monotonic() - started
    body = _accepted(response).json()
    if not isinstance(body, dict):
        raise Nemotron4Error(f"/generate refused the card's request: {body}")
    text = body["sentences"][0][len(CARD_PROMPT) :].removesuffix("<extra_id_1>")
    num_tokens = len(body["token_ids"][0]) - _num_prompt_tokens(client)
    return DemoAnswer(text, num_tokens, seconds)


def _num_prompt_tokens(client: httpx.Client) -> int:
    """/generate does not say where the prompt ends in its ids; /v1/completions counts the same raw text."""
    request = {"model": MODEL, "prompt": CARD_PROMPT, "max_tokens": 1}
    body = _accepted(client.post("/v1/completions", json=request)).json()
    return int(body["usage"]["prompt_tokens"])


def stream_chat(client: httpx.Client) -> DemoAnswer:
    """Ask the question as a chat and print the answer as it comes."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 1.0,  # greedy, a model of this size soon repeats itself
        "top_p": 0.9,
        "seed": 1,
        "max_tokens": CHAT_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, num_tokens, started = "", 0, time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        _accepted(response)
        for event in _events(response):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                print(piece, end="", flush=True)
                text += piece
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    print(flush=True)
    return DemoAnswer(text, num_tokens, time.monotonic() - started)


def _accepted(response: httpx.Response) -> httpx.Response:
    """The response, or an error with the server's own words."""
    if response.is_error:
        raise Nemotron4Error(
            f"{response.url} answered {response.status_code}: {response.read().decode().strip()}"
        )
    return response


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


_JSON = {"Content-Type": "application/json"}


def _step(text: str) -> None:
    note(f"\n--- {text}")


def _what_next(server: ChildServer) -> None:
    note(
        f"\nThe server keeps running at {server.url} (process {server.pid}, log {server.log}). Try next:\n"
        f"    {server.url}/      the page: chat, raw prompts, token probabilities\n"
        f"    .venv/bin/python examples/openai_client.py {server.url}\n"
        f"    .venv/bin/nemotron4 chat {MODEL}      a conversation, in a process of its own\n"
        f"    kill {server.pid}      stops the server"
    )


def catch_signals() -> None:
    """A signal that ends the demonstration ends what it started too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_exit)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the demonstration, return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=PORT, help=f"where to serve (default: {PORT})")
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end")
    options = parser.parse_args(arguments)
    catch_signals()
    return explained(lambda: demo(port=options.port, keep=options.keep))


if __name__ == "__main__":
    sys.exit(run())
