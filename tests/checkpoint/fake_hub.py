"""A Hugging Face hub on loopback: the calls that ``huggingface_hub`` and ``datasets`` make."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """``repositories``: id -> file name -> content; ``downloads`` lists the files that were sent.

    A data set's id begins with ``datasets/``.
    """

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int = 200  # of every answer about a repository
    error_code: str = ""  # the hub's X-Error-Code, which tells a gated repository from a missing one
    corrupt: set[str] = field(default_factory=set)  # files sent with one byte changed
    downloads: list[str] = field(default_factory=list)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub("")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            _answer(hub, self)

        def do_GET(self) -> None:
            _answer(hub, self)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _is_large(name: str) -> bool:
    """Files that the hub keeps by their sha256."""
    return name.endswith((".safetensors", ".gguf", ".bin"))


def _entry(name: str, content: bytes, name_key: str) -> dict[str, object]:
    entry: dict[str, object] = {name_key: name, "size": len(content), "type": "file"}
    entry["oid"] = entry["blobId"] = hashlib.sha1(content).hexdigest()
    if _is_large(name):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _answer(hub: FakeHub, request: BaseHTTPRequestHandler) -> None:
    path = urlsplit(request.path).path
    if hub.status != 200:
        headers = {"X-Error-Code": hub.error_code, "X-Error-Message": "refused by the fake"}
        return _send(request, hub.status, b"{}", headers)
    parts = path.strip("/").split("/")
    kind = parts.pop(0) + "/" if parts[0] == "datasets" else ""
    if parts[0] == "api" and parts[1] in ("models", "datasets"):
        kind = "" if parts[1] == "models" else "datasets/"
        files = hub.repositories.get(kind + "/".join(parts[2:4]))
        if files is None:
            return _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if len(parts) == 4 or parts[4:] == ["revision", COMMIT]:
            siblings = [_entry(name, content, "rfilename") for name, content in files.items()]
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            return _send(request, 200, json.dumps(info).encode())
        if kind and parts[4:6] == ["revision", "main"]:
            return _send(request, 200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT}).encode())
        if parts[4:6] == ["tree", COMMIT]:
            tree = [_entry(name, content, "path") for name, content in files.items()]
            return _send(request, 200, json.dumps(tree).encode())
    elif len(parts) >= 5 and parts[2] == "resolve" and parts[3] in (COMMIT, "main"):
        name = "/".join(parts[4:])
        files = hub.repositories.get(kind + "/".join(parts[:2]))
        if files is None:
            return _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return _send(request, 404, b"{}", headers)
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if _is_large(name) else hashlib.sha1(content).hexdigest()
        if name in hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        if request.command == "GET":
            hub.downloads.append(name)
        return _send(request, 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
    return _send(request, 404, b"{}")  # the client asks about more than models


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
