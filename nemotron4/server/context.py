"""What the server notes about a request and how it refuses one: context, metrics, log line, error forms."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import HTMLResponse, Response

from nemotron4.engine import InferenceEngine
from nemotron4.errors import EngineBusyError, Nemotron4Error, RequestError, TemplateError, TokenizerError

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request is answered with an error status. ``param`` and ``code`` as in OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


# What the engine and the text layer raise when a request, not the server, is at fault.
REQUEST_ERRORS = (RequestError, TemplateError, TokenizerError, EngineBusyError)


class ClientGoneError(Exception):
    """The client closed the connection before its answer was whole."""


def json_text(value: object) -> bytes:
    """Flask's ``jsonify``: sorted keys, compact, ASCII, a newline at the end."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(value), status, dict(headers or {}), "application/json")


def error_object(error: ApiError) -> dict[str, object]:
    """OpenAI's error object."""
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: ApiError) -> Response:
    """The error in the form that clients of this path read."""
    if path.startswith("/generate"):
        return json_response(error.message, error.status, error.headers)
    return json_response(error_object(error), error.status, error.headers)


def api_error(error: Nemotron4Error) -> ApiError:
    """The HTTP form of one of REQUEST_ERRORS."""
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if isinstance(error, EngineBusyError):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, message, code="engine_busy", headers={"Retry-After": seconds})
    return ApiError(400, message)


NOT_FOUND = (
    "The requested URL was not found on the server. If you entered the URL manually please check your "
    "spelling and try again."
)
METHOD_NOT_ALLOWED = "The method is not allowed for the requested URL."


def html_error(status: int, name: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """The page that Flask answers with for an unknown route or method."""
    page = (
        f"<!doctype html>\n<html lang=en>\n<title>{status} {name}</title>\n<h1>{name}</h1>\n<p>{text}</p>\n"
    )
    return HTMLResponse(page, status, dict(headers or {}))


KEY = "nemotron4.context"


@dataclass
class RequestContext:
    """Filled in as the request is served; holds no prompt and no answer."""

    request_id: str
    method: str
    path: str
    route: str = "other"  # a known path, so that a metric has few label values
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    guard: list[str] = field(default_factory=list)  # verdicts: no text
    origin: str | None = None  # of a page on another site that may read the answer
    warnings: list[str] = field(default_factory=list)  # sent as the header Warning
    error: str | None = None  # the class of an unexpected exception


def context_of(scope: MutableMapping[str, Any]) -> RequestContext:
    """The context that the outermost layer put into the request's scope."""
    found = scope[KEY]
    assert isinstance(found, RequestContext)
    return found


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one app; the engine's own numbers are read when somebody asks."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "nemotron4_http_requests",
            "HTTP requests by route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._first_token = Histogram(
            "nemotron4_time_to_first_token_seconds",
            "From the arrival of a row at the engine to its first new token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "nemotron4_time_per_output_token_seconds",
            "Mean time between the new tokens of a finished row.",
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self._row = Histogram(
            "nemotron4_row_seconds",
            "From the arrival of a row at the engine to its last new token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._guard = Histogram(
            "nemotron4_guard_seconds",
            "From a question to the content guard to its verdict.",
            ("part", "verdict"),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._request = Histogram(
            "nemotron4_http_request_seconds",
            "From the request's first byte to the answer's last.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )

    def request_ended(self, context: RequestContext) -> None:
        self._requests.labels(context.method, context.route, str(context.status)).inc()
        self._request.labels(context.route).observe(time.monotonic() - context.started)

    def row_ended(self, started: float, first_token: float | None, num_tokens: int) -> None:
        """Times of one row, on the monotonic clock; a row without a token has no latency."""
        if first_token is None:
            return
        now = time.monotonic()
        self._first_token.observe(first_token - started)
        self._row.observe(now - started)
        if num_tokens > 1:
            self._per_token.observe((now - first_token) / (num_tokens - 1))

    def guarded(self, part: str, verdict: str, seconds: float) -> None:
        """One prompt or answer was screened; the histogram's count says how many got which verdict."""
        self._guard.labels(part, verdict).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "requests_running": ("Rows that generate now.", stats.num_running),
            "requests_waiting": ("Rows in the engine's queue.", stats.num_waiting),
            "requests_waiting_limit": ("Rows the queue can hold.", stats.max_waiting),
            "cache_blocks_used": ("Key-value cache blocks in use.", stats.cache_blocks_used),
            "cache_blocks_total": ("Key-value cache blocks there are.", stats.cache_blocks_total),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens taken in.", stats.prompt_tokens_total),
            "prompt_tokens_reused": (
                "Prompt tokens found in the prefix cache.",
                stats.prompt_tokens_reused_total,
            ),
            "generated_tokens": ("New tokens.", stats.generated_tokens_total),
            "requests_finished": ("Rows that ended by themselves.", stats.requests_finished_total),
            "preemptions": ("Rows set back to make room for others.", stats.preemptions_total),
            "spec_decode_num_draft_tokens": ("Tokens guessed.", stats.spec_decode_num_draft_tokens_total),
            "spec_decode_num_accepted_tokens": (
                "Guessed tokens that were drawn.",
                stats.spec_decode_num_accepted_tokens_total,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"nemotron4_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"nemotron4_{name}", text, value)

    def describe(self) -> list[Metric]:
        return []


class AccessLog:
    """Writes to the stream that is stderr when the line is written, unless another is given."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, context: RequestContext, trace: list[str]) -> None:
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": context.request_id,
            "method": context.method,
            "path": context.path,
            "status": context.status,
            "ms": round(1000 * (time.monotonic() - context.started), 1),
            "prompt_tokens": context.num_prompt_tokens,
            "new_tokens": context.num_new_tokens,
            "finish_reasons": context.finish_reasons,
        }
        if context.guard:
            line["guard"] = context.guard
        if context.error is not None:
            line["error"] = context.error
        if trace:
            line["trace"] = trace
        print(json.dumps(line), file=self._stream or sys.stderr, flush=True)
