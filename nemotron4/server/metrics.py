"""The numbers that operators scrape, in Prometheus' text format. One registry per app, nothing global."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nemotron4.engine import InferenceEngine
from nemotron4.server.exchange import Exchange

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

    def request_ended(self, exchange: Exchange) -> None:
        self._requests.labels(exchange.method, exchange.route, str(exchange.status)).inc()
        self._request.labels(exchange.route).observe(time.monotonic() - exchange.started)

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
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"nemotron4_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"nemotron4_{name}", text, value)

    def describe(self) -> list[Metric]:
        return []
