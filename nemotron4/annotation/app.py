"""The page of judgments and its JSON routes: one for sessions of red-teaming, review and blind studies.

Alone it is served on loopback, below a secret path. A web page elsewhere must not reach it: the Host header
has to name this machine, and a write has to be JSON from the page itself. A server that mounts the routes
brings its own keys and checks.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from nemotron4.annotation.export import Export
from nemotron4.annotation.figures import has_state, progress, state_of, states
from nemotron4.annotation.store import AnnotationStore
from nemotron4.annotation.vocabulary import Annotation
from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.records import FieldError, JsonObject
from nemotron4.report import Block, as_json
from nemotron4.web import HEADERS, read_files

FOLDER = Path(__file__).parent / "web"
HOSTS = ["127.0.0.1", "localhost", "[::1]"]
# What a person judges stays in no browser's cache.
JSON_HEADERS = {**HEADERS, "Cache-Control": "no-store"}
MAX_BODY_BYTES = 2_000_000
PAGE_ROWS = 50
# A search that finds little ends after so many items and goes on with the next page, so it never hangs.
PAGE_SCANNED = 20_000


@dataclass(frozen=True)
class Listed:
    """One item in a list. ``search`` gives the text that a search looks into; ``cursor`` names the place."""

    id: str
    cursor: str
    summary: Callable[[], JsonObject]  # title, and facts: a list of words
    search: Callable[[], str]


@dataclass(frozen=True)
class ShownAnswer:
    """One answer that is judged. ``facts`` are hidden from a blind annotator."""

    key: str
    name: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """One item in full. A message whose place is an answer's key is judged where it is."""

    title: str
    messages: Sequence[JsonObject]
    answers: Sequence[ShownAnswer]
    facts: Mapping[str, str] = field(default_factory=dict)
    further: Sequence[tuple[str, str]] = ()  # summary, text: folded


class ItemSource(Protocol):
    """What a study brings: its items. Its judgments are in ``store``."""

    @property
    def title(self) -> str: ...
    @property
    def store(self) -> AnnotationStore: ...
    def groups(self) -> list[tuple[str, int]]:
        """What the list can be narrowed to, with the number of items."""

    def listed(self, group: str, after: str, annotator: str) -> Any:
        """An iterator of ``Listed`` beyond a cursor; all groups for an empty one."""

    def show(self, item: str, annotator: str) -> tuple[str, Shown]:
        """The whole id and the item; DataError where there is none."""

    def answer_keys(self, item: str, annotator: str) -> Mapping[str, str]:
        """The answers that may be judged: what this annotator sees -> what the store keeps."""

    def report(self) -> list[Block]: ...
    def figures(self) -> JsonObject:
        """The numbers of the report, for programs."""

    def export(self, form: str) -> Export: ...


class JudgmentRoutes:
    """The interface of one study. ``record``: how a new item is made, where people bring them."""

    def __init__(self, source: ItemSource, record: Callable[[JsonObject], JsonObject] | None = None) -> None:
        self.source = source
        self.store = source.store
        self._record = record

    def study(self, request: Request) -> JsonObject:
        vocabulary = self.store.vocabulary
        groups = self.source.groups()
        return {
            "kind": vocabulary.kind,
            "title": self.source.title,
            "questions": [question.to_json() for question in vocabulary.questions],
            "main": vocabulary.main,
            "is_blind": vocabulary.is_blind,
            "groups": [{"name": name, "items": number} for name, number in groups],
            "states": [{"name": name, "title": title} for name, title in states(vocabulary)],
            **self._progress(groups),
        }

    def _progress(self, groups: list[tuple[str, int]] | None = None) -> JsonObject:
        numbers = [number for _, number in (self.source.groups() if groups is None else groups)]
        return {
            "progress": progress(self.store.by_item(), sum(numbers)),
            "last_change": self.store.last_change(),
        }

    def changes(self, request: Request) -> JsonObject:
        return self._progress()

    def items(self, request: Request) -> JsonObject:
        """A page of the list: in the study's order, filtered by group, state and text."""
        given = request.query_params
        vocabulary, annotator = self.store.vocabulary, given.get("annotator", "")
        group, state = given.get("group", ""), given.get("state", "all")
        known = [name for name, _ in self.source.groups()]
        if group and group not in known:
            raise DataError(f"group {group!r} is unknown", hint=f"known: {', '.join(known)}")
        wanted = given.get("search", "").casefold()
        judged = self.store.by_item()
        rows: list[JsonObject] = []
        num_scanned, after = 0, None
        for entry in self.source.listed(group, given.get("after", ""), annotator):
            num_scanned += 1
            said = judged.get(entry.id, [])
            if has_state(said, state, vocabulary, annotator) and (
                not wanted or entry.id.startswith(wanted) or wanted in entry.search().casefold()
            ):
                is_mine = any(judgment.annotator == annotator for judgment in said)
                word = (
                    ("judged" if is_mine else "open") if vocabulary.is_blind else state_of(said, vocabulary)
                )
                rows.append({"id": entry.id, **entry.summary(), "state": word, "is_mine": is_mine})
            if len(rows) == PAGE_ROWS or num_scanned == PAGE_SCANNED:
                after = entry.cursor
                break
        return {"rows": rows, "after": after, "num_scanned": num_scanned}

    def item(self, request: Request) -> JsonObject:
        annotator = request.query_params.get("annotator", "")
        item, shown = self.source.show(request.path_params["item"], annotator)
        said = self.store.judgments(item)
        if self.store.vocabulary.is_blind:
            said = [judgment for judgment in said if judgment.annotator == annotator]
        shown_as = {key: name for name, key in self.source.answer_keys(item, annotator).items()}
        judgments = [
            {**judgment.to_json(), "answer": shown_as.get(judgment.answer, "")}
            for judgment in said
            if not judgment.answer or judgment.answer in shown_as
        ]
        return {
            "id": item,
            "title": shown.title,
            "messages": list(shown.messages),
            "answers": [answer.__dict__ for answer in shown.answers],
            "facts": dict(shown.facts),
            "further": [list(each) for each in shown.further],
            "judgments": judgments,
        }

    def say(self, item: str, value: JsonObject) -> JsonObject:
        for name in value.keys() - {"annotator", "answer", "values"}:
            raise DataError(f"a judgment has no field {name!r}")
        values, answer, annotator = (
            value.get("values"),
            str(value.get("answer") or ""),
            value.get("annotator"),
        )
        if not isinstance(values, dict):
            raise DataError("values is not an object: question -> value")
        known = self.source.answer_keys(item, str(annotator))
        if answer and answer not in known:
            raise DataError(f"{item} has no answer {answer!r}; its answers are: {', '.join(known) or 'none'}")
        kept = self.store.say(item, annotator, values, answer=known[answer] if answer else "")
        return {**kept.to_json(), "answer": answer}

    def report(self, request: Request) -> JsonObject:
        return {"blocks": as_json(self.source.report()), "figures": self.source.figures()}

    def export(self, request: Request) -> JsonObject:
        return self.source.export(request.path_params["form"]).to_json()

    def routes(self) -> list[Route]:
        async def say(request: Request) -> Response:
            def work(value: JsonObject) -> JsonObject:
                item, _ = self.source.show(request.path_params["item"], "")
                return self.say(item, value)

            return await _written(request, work)

        found = [
            Route("/study", _reading(self.study)),
            Route("/changes", _reading(self.changes)),
            Route("/items", _reading(self.items)),
            # An id of a user's file may hold a slash.
            Route("/items/{item:path}/judgments", say, methods=["POST"]),
            Route("/items/{item:path}", _reading(self.item, missing=404)),
            Route("/report", _reading(self.report)),
        ]
        if not self.store.vocabulary.is_blind:  # the rows name the models
            found.append(Route("/export/{form}", _reading(self.export)))
        if self._record is not None:
            record = self._record

            async def post(request: Request) -> Response:
                return await _written(request, record, status=201)

            found.append(Route("/items", post, methods=["POST"]))
        return found


def create_app(source: ItemSource) -> Starlette:
    """The page below ``/TOKEN/``; without the token nothing is there."""
    files = read_files(FOLDER)

    async def page(request: Request) -> Response:
        return files.get(request.path_params.get("name", "index.html")) or _error(404, "not found")

    inside = [
        Route("/", page),
        Route("/web/{name}", page),
        Mount("/api", routes=JudgmentRoutes(source).routes()),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
    return Starlette(routes=[Mount(f"/{source.store.token()}", routes=inside)], middleware=middleware)


def _reading(
    answer: Callable[[Request], JsonObject], *, missing: int = 400
) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await _answered(lambda: answer(request), error_status=missing)

    return route


async def _written(
    request: Request, work: Callable[[JsonObject], JsonObject], *, status: int = 200
) -> Response:
    """What a page elsewhere could send here without asking first is not taken."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        return _error(415, "expected application/json")
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        return _error(403, "the page of judgments takes writes from itself alone")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return _error(413, f"a judgment has at most {MAX_BODY_BYTES:,} bytes")
    try:
        value = json.loads(body)
    except ValueError:
        return _error(400, "the body is not JSON")
    if not isinstance(value, dict):
        return _error(400, "the body is not an object")
    return await _answered(lambda: work(value), status=status)


async def _answered(
    work: Callable[[], JsonObject], *, status: int = 200, error_status: int = 400
) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(work), status, headers=JSON_HEADERS)
    except Nemotron4Error as error:
        return _error(error_status, error.message, error.hint)
    except FieldError as error:
        return _error(400, str(error))


def _error(status: int, message: str, hint: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "hint": hint}}, status, headers=JSON_HEADERS)


def judgment_rows(judgments: Sequence[Annotation]) -> tuple[JsonObject, ...]:
    """The form ``judgments`` of an export."""
    return tuple(judgment.to_json() for judgment in judgments)
