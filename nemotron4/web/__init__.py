"""What the pages of this package share: colours, the element helper, and how their files are served."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from starlette.responses import Response

SHARED = Path(__file__).parent
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".woff2": "font/woff2",
    ".svg": "image/svg+xml",
}
# What a model writes is shown by the pages, so nothing in it may run, load or send: docs/security.md.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@functools.cache
def _answer(path: Path) -> Response:
    return Response(path.read_bytes(), headers={**HEADERS, "Content-Type": _TYPES[path.suffix]})


def read_files(*folders: Path, extra: Iterable[Path] = ()) -> dict[str, Response]:
    """The answers for the files of these folders, the shared ones and ``extra``, by their path in the folder.

    What can be asked for is exactly this.
    """
    found = {path.name: path for path in (*SHARED.iterdir(), *extra)}
    found |= {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*")}
    return {name: _answer(path) for name, path in found.items() if path.suffix in _TYPES}
