"""A chat server whose answers are told by the prompt's last words, with what the shipped fake does not do.

``never``: 402, which nobody repeats by himself. ``guarded``: 400 with the code of a content guard.
``filtered``: an answer that the guard emptied. Everything else is answered by a script.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[list[dict[str, str]]], str]


@contextmanager
def serving_target(reply: Reply, *, name: str = "target") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][-1]["content"]
            if asked.endswith("never"):
                self._send(402, {"error": {"message": "nothing is left to spend"}})
            elif asked.endswith("guarded"):
                error = {"message": "the prompt was refused by the content guard", "code": "content_filter"}
                self._send(400, {"error": error})
            else:
                is_filtered = asked.endswith("filtered")
                text = "" if is_filtered else reply(body["messages"])
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "content_filter" if is_filtered else "stop",
                }
                self._send(200, {"model": name, "choices": [choice], "usage": {}})

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
