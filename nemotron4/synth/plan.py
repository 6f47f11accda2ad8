"""What a recipe will cost, before it runs: calls, tokens, money and time, stage by stage.

Fan-outs and yields are expectations: those of the stage kinds, or the measured ones of an earlier run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron4.records import JsonObject
from nemotron4.synth.books import Books, aligned
from nemotron4.synth.graph import Stage
from nemotron4.synth.recipe import Recipe

# Tokens per call where nothing was measured (reference figures for a chat model).
_TOKENS = {"judge_llm": (1080, 10), "judge_reward": (490, 0), "respond": (130, 350), "dialogue": (700, 200)}
_LIST_TOKENS = (170, 310)


@dataclass(frozen=True)
class StagePlan:
    name: str
    rows_in: float
    calls: float
    tokens_in: float
    tokens_out: float
    money: float
    seconds: float | None
    rows_out: float


@dataclass(frozen=True)
class Plan:
    """``seconds`` is None where no rate is known: give the folder of an earlier run."""

    stages: tuple[StagePlan, ...]

    @property
    def calls(self) -> float:
        return sum(stage.calls for stage in self.stages)

    @property
    def money(self) -> float:
        return sum(stage.money for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        times = [stage.seconds for stage in self.stages if stage.calls]
        return None if None in times else sum(time for time in times if time is not None)

    def to_json(self) -> JsonObject:
        return {
            "calls": round(self.calls),
            "tokens_in": round(sum(stage.tokens_in for stage in self.stages)),
            "tokens_out": round(sum(stage.tokens_out for stage in self.stages)),
            "money": round(self.money, 4),
            "seconds": self.seconds,
            "stages": [
                {
                    "stage": s.name,
                    "rows_in": round(s.rows_in),
                    "calls": round(s.calls),
                    "rows_out": round(s.rows_out),
                    "seconds": s.seconds,
                }
                for s in self.stages
            ],
        }


def make_plan(recipe: Recipe, stages: Sequence[Stage], measured: Books | None = None) -> Plan:
    """Walk the recipe from its sources. ``measured`` gives latency, tokens and yields where it can."""
    known = {stage.name: stage for stage in measured.stages} if measured else {}
    rows: dict[str, float] = {}
    plans = []
    for stage in stages:
        rows_in = _rows_in(stage, rows)
        earlier = known.get(stage.name)
        done = earlier.requested - earlier.pending if earlier else 0
        counters = earlier.counters if earlier and done else {}
        paid = counters.get("calls", 0.0)
        calls_per_row = paid / done if done else _expected(stage, "calls")
        made = earlier.rows_made if earlier else 0
        rows_per_row = made / done if done else _expected(stage, "fan_out")
        calls = rows_in * calls_per_row
        tokens_in, tokens_out = _tokens(stage, counters, paid)
        prices = [recipe.endpoint[name] for name in stage.endpoints]
        price_in = sum(p.price_in for p in prices) / len(prices) if prices else 0.0
        price_out = sum(p.price_out for p in prices) / len(prices) if prices else 0.0
        slots = sum(p.max_in_flight for p in prices)
        latency_s = counters.get("latency_s", 0.0) / paid if paid else None
        parallel = min(slots, max(calls, 1.0))
        seconds = None if latency_s is None or not slots else calls * latency_s / parallel
        rows[stage.name] = rows_in * rows_per_row
        plans.append(
            StagePlan(
                name=stage.name,
                rows_in=rows_in,
                calls=calls,
                tokens_in=calls * tokens_in,
                tokens_out=calls * tokens_out,
                money=calls * (tokens_in * price_in + tokens_out * price_out) / 1e6,
                seconds=seconds if calls else 0.0,
                rows_out=rows[stage.name],
            )
        )
    return Plan(tuple(plans))


def _rows_in(stage: Stage, rows: Mapping[str, float]) -> float:
    if stage.kind.roots is not None:
        return float(sum(1 for _ in stage.kind.roots(stage.knobs)))
    return sum(rows[name] for name in stage.config.takes)


def _expected(stage: Stage, what: str) -> float:
    function = stage.kind.calls if what == "calls" else stage.kind.fan_out
    if function is None:
        return 1.0 if what == "fan_out" else 0.0
    return float(function(stage.knobs))


def _tokens(stage: Stage, counters: Mapping[str, float], paid: float) -> tuple[float, float]:
    if paid:
        return counters.get("prompt_tokens", 0.0) / paid, counters.get("completion_tokens", 0.0) / paid
    tokens_in, tokens_out = _TOKENS.get(stage.config.kind, _LIST_TOKENS)
    limit = tokens_out if stage.sampling is None else stage.sampling.max_tokens
    return tokens_in, min(tokens_out, limit)


def plan_table(plan: Plan) -> str:
    """The plan as aligned text."""
    rows = [("stage", "rows in", "calls", "tokens in", "tokens out", "money", "time", "rows out")]
    for s in plan.stages:
        rows.append(
            (s.name, f"{s.rows_in:.0f}", f"{s.calls:.0f}", f"{s.tokens_in:.0f}", f"{s.tokens_out:.0f}",
             f"{s.money:.4f}", _time(s.seconds), f"{s.rows_out:.0f}")
        )  # fmt: skip
    totals = plan.to_json()
    rows.append(
        ("total", "", str(totals["calls"]), str(totals["tokens_in"]), str(totals["tokens_out"]),
         f"{plan.money:.4f}", _time(plan.seconds), "")
    )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(aligned(row, widths) for row in rows)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
