"""Stands for ``nemotron4`` in the tests of the demonstration: ``pull`` and ``serve`` without a model.

FAKE_PULL, FAKE_SERVE and FAKE_GENERATE choose how each behaves; FAKE_PIDS names the file for process ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nemotron4.cli.lifeline import end_with_standard_input

ANSWER = "O NVIDIA, thy chips do shine."


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send({"status": "ok"})

    def do_PUT(self) -> None:
        request = self._read()
        mode = os.environ.get("FAKE_GENERATE", "answer")
        if mode == "die":
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(1)
        if mode == "hang":
            Path(os.environ["FAKE_PIDS"]).with_suffix(".asked").touch()
            time.sleep(600)
        if mode == "refuse":
            self._send("greedy must be a boolean value")
            return
        sentence = request["sentences"][0] + ANSWER + "<extra_id_1>"
        self._send({"sentences": [sentence], "token_ids": [list(range(47))], "asked": request})

    def do_POST(self) -> None:
        request = self._read()
        if self.path == "/v1/completions":
            self._send({"usage": {"prompt_tokens": 40}})
            return
        assert request["messages"][0]["role"] == "user"
        self.send_response(200)
        self.end_headers()
        words = [{"choices": [{"delta": {"content": f"{word} "}}]} for word in ("Shall", "I", "compare")]
        for event in (*words, {"choices": [], "usage": {"completion_tokens": 3}}):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass

    def _read(self) -> dict[str, Any]:
        value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(value, dict)
        return value

    def _send(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def pull() -> None:
    mode = os.environ.get("FAKE_PULL", "ok")
    if mode == "no network":
        print("error: pip could not download it\nhint: check the network", file=sys.stderr)
        sys.exit(1)
    if mode == "hang":
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note_pid(helper.pid)
        helper.wait()


def serve(port: int) -> None:
    if "FAKE_OUTLIVES" not in os.environ:
        end_with_standard_input()
    if os.environ.get("FAKE_SERVE") == "fail":
        print("error: the model file is cut off", file=sys.stderr)
        sys.exit(1)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def note_pid(pid: int) -> None:
    with open(os.environ["FAKE_PIDS"], "a") as file:
        file.write(f"{pid}\n")


if __name__ == "__main__":
    note_pid(os.getpid())
    pull() if sys.argv[1] == "pull" else serve(int(sys.argv[-1]))
