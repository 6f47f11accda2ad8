"""The page of judgments at the command line: one way to serve it, for every study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import note, print_json

if TYPE_CHECKING:
    from nemotron4.annotation.app import ItemSource
    from nemotron4.annotation.export import Export

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")]
PAGE_PORT = 8720


def serve_page(source: ItemSource, port: int) -> None:
    """Serve the page on this machine until Ctrl-C; its address holds a token."""
    import uvicorn

    from nemotron4.annotation.app import create_app
    from nemotron4.server.run import bind

    page = create_app(source)
    listener = bind("127.0.0.1", port)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/{source.store.token()}/"
    note(f"{source.title}: {address}  (Ctrl-C ends)")
    settings = uvicorn.Config(page, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(settings).run(sockets=[listener])


def write_export(found: Export, form: str, out: Path, *, as_json: bool) -> None:
    """The rows into a file, and what was left out, in words or as one object."""
    from nemotron4 import records

    records.write(out, found.rows)
    if as_json:
        print_json({"form": form, "rows": len(found.rows), "left_out": found.left_out, "file": str(out)})
        return
    reasons = "".join(f"; {number} items left out: {reason}" for reason, number in found.left_out.items())
    note(f"wrote {len(found.rows)} rows to {out}{reasons}")
