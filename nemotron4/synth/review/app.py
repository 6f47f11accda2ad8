"""The review page of one run: its files, and a JSON interface to rows, ancestry and reviews.

It is served on loopback for the person at this machine. A web page elsewhere must not reach it: the Host
header has to name this machine, and a write has to be JSON from the page itself.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.records import ATTRIBUTES, JsonObject
from nemotron4.synth.ledger import Reader, ancestry, find_record
from nemotron4.synth.recipe import LEDGER, SynthRecipe, load_saved_recipe
from nemotron4.synth.review.labels import agreement, answers
from nemotron4.synth.review.listing import STATES, list_rows, state_word
from nemotron4.synth.review.notes import NoteBook, read_reviews
from nemotron4.synth.rows import decode
from nemotron4.web import HEADERS, read_files

FOLDER = Path(__file__).parent / "web"
HOSTS = ["127.0.0.1", "localhost", "[::1]"]
# What a person reviews stays in no browser's cache.
JSON_HEADERS = {**HEADERS, "Cache-Control": "no-store"}
MAX_BODY_BYTES = 2_000_000


class ReviewedRun:
    """What the routes work on: a run's folder. Each request opens the ledger for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe: SynthRecipe = load_saved_recipe(folder)
        self.ledger = folder / LEDGER
        self.read(lambda ledger: None)  # a missing ledger is told before the page opens

    def read(self, ask: Callable[[Reader], Any]) -> Any:
        with Reader(self.ledger) as ledger:
            return ask(ledger)

    def run(self, request: Request) -> JsonObject:
        """Stages in the recipe's order with their rows, and how far the review is."""

        def ask(ledger: Reader) -> JsonObject:
            counts = ledger.record_counts()
            reviews = read_reviews(ledger)
            words = [state_word(each) for each in reviews.values()]
            return {
                "name": self.recipe.name,
                "folder": str(self.folder),
                "stages": [
                    {"name": stage.name, "kind": stage.kind, "rows": counts.get(stage.name, 0)}
                    for stage in self.recipe.stage
                ],
                "first_stage": _first_shown(self.recipe, counts),
                "states": list(STATES),
                "attributes": list(ATTRIBUTES),
                "reviewed": len(reviews),
                "accepted": words.count("accepted"),
                "rejected": words.count("rejected"),
                "agreement": agreement(reviews),
            }

        return dict(self.read(ask))

    def rows(self, request: Request) -> JsonObject:
        given = request.query_params
        stage, state = given.get("stage", ""), given.get("state", "all")
        known = [each.name for each in self.recipe.stage]
        if stage and stage not in known:
            raise DataError(f"stage {stage!r} is unknown", hint=f"known: {', '.join(known)}")
        if state not in STATES:
            raise DataError(f"state {state!r} is unknown", hint=f"known: {', '.join(STATES)}")

        def ask(ledger: Reader) -> JsonObject:
            page = list_rows(
                ledger,
                [stage] if stage else known,
                read_reviews(ledger),
                search=given.get("search", ""),
                state=state,
                after=given.get("after", ""),
            )
            return {"rows": page.rows, "after": page.after, "num_scanned": page.num_scanned}

        return dict(self.read(ask))

    def row(self, request: Request) -> JsonObject:
        """One row: its content, the answers to be reviewed, where it comes from, what people said."""

        def ask(ledger: Reader) -> JsonObject:
            record = find_record(ledger, request.path_params["record"])
            reviews = read_reviews(ledger).get(record, [])
            content = ledger.payload(record)
            return {
                "id": record.hex(),
                "row": content,
                "answers": answers(decode(content)),
                "ancestry": ancestry(ledger, record),
                "reviews": [{**each.to_json(), "at": each.at} for each in reviews],
            }

        return dict(self.read(ask))

    def add(self, record_id: str, value: object) -> JsonObject:
        record: bytes = self.read(lambda ledger: find_record(ledger, record_id))
        notes = NoteBook(self.ledger)
        try:
            return notes.add(record, value).to_json()
        finally:
            notes.close()


def _first_shown(recipe: SynthRecipe, counts: dict[str, int]) -> str:
    """The last stage that made judged pairs or, without one, rows: what a reviewer came for."""
    made = [stage for stage in recipe.stage if counts.get(stage.name)]
    judged = [stage.name for stage in made if stage.kind.startswith("judge")]
    return (judged or [stage.name for stage in made] or [""])[-1]


def create_app(folder: Path) -> Starlette:
    """The page for a run's folder; DataError if there is no run."""
    review = ReviewedRun(folder)
    files = read_files(FOLDER)

    async def page(request: Request) -> Response:
        return files.get(request.path_params.get("name", "index.html")) or _error(404, "not found")

    async def save(request: Request) -> Response:
        refusal = _refusal(request)
        if refusal is not None:
            return refusal
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return _error(413, f"a review has at most {MAX_BODY_BYTES:,} bytes")
        try:
            value = json.loads(body)
        except ValueError:
            return _error(400, "the body is not JSON")
        return await _answered(lambda: review.add(request.path_params["record"], value))

    routes = [
        Route("/", page),
        Route("/web/{name}", page),
        Route("/api/run", _reading(review.run)),
        Route("/api/rows", _reading(review.rows)),
        Route("/api/rows/{record}", _reading(review.row)),
        Route("/api/rows/{record}/review", save, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def _reading(answer: Callable[[Request], JsonObject]) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await _answered(lambda: answer(request))

    return route


async def _answered(work: Callable[[], JsonObject]) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(work), headers=JSON_HEADERS)
    except Nemotron4Error as error:
        return _error(400, error.message, error.hint)


def _refusal(request: Request) -> Response | None:
    """What a page elsewhere could send here without asking first is not taken."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        return _error(415, "expected application/json")
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers.get('host')}":
        return _error(403, "the review page takes writes from itself alone")
    return None


def _error(status: int, message: str, hint: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "hint": hint}}, status, headers=JSON_HEADERS)
