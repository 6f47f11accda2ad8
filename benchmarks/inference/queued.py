"""What a long queue costs the engine: processor time a token, scheduling, memory, by queued requests.

    python benchmarks/inference/queued.py [--requests 200 2500 5000 10000] [--prompt 100] [--new 32]
                                          [--temperature 0]

Each number of requests has a process of its own. The library's step is left out: what is measured is the
engine around the model. scheduling_ms: to take what came in and plan one step, by the clock (median, 99 of
100, longest); p99_processor_ms: 99 of 100 by the thread's processor time, which other programs leave alone.
kb_per_request: memory of the requests that wait, resident, when the first step begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cells import memory_bytes
from stand_in import stand_in

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.inference.runner import Array


class Timed:
    """A method of the engine's thread; ms that its calls took, by the clock and of the processor."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.took_ms: list[Array] = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        began = np.array([time.perf_counter(), time.thread_time()])
        result = self._method(*arguments, **named)
        self.took_ms.append(1e3 * (np.array([time.perf_counter(), time.thread_time()]) - began))
        return result


def measure(num_requests: int, prompt_length: int, num_new: int, temperature: float) -> dict[str, object]:
    draw = random.Random(num_requests)
    params = SamplingParams(max_new_tokens=num_new, temperature=temperature)
    requests = [
        SamplingRequest(tuple(draw.randrange(256) for _ in range(prompt_length)), params)
        for _ in range(num_requests)
    ]
    resident: list[int] = []
    engine = stand_in(
        max_waiting=num_requests, on_step=lambda: resident or resident.append(memory_bytes("RssAnon"))
    )
    planning = Timed(engine._scheduler.plan)
    taking = Timed(engine._take_mail)
    engine._scheduler.plan, engine._take_mail = planning, taking  # type: ignore[method-assign]
    before, began = memory_bytes("RssAnon"), time.process_time()
    engine.collect(requests)
    seconds = time.process_time() - began
    engine.close()
    steps_ms = np.array(
        [a + b for a, b in zip(taking.took_ms, planning.took_ms, strict=False)]
    )  # last: the end
    median, p99, longest = np.percentile(steps_ms, (50, 99, 100), axis=0).round(2).tolist()
    return {
        "requests": num_requests,
        "steps": len(steps_ms),
        "us_per_token": round(1e6 * seconds / (num_requests * num_new), 1),
        "scheduling_ms": [median[0], p99[0], longest[0]],
        "p99_processor_ms": p99[1],
        "kb_per_request": round((resident[0] - before) / num_requests / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[200, 2_500, 5_000, 10_000])
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    each = (options.prompt, options.new, options.temperature)
    context = multiprocessing.get_context("spawn")
    for num_requests in options.requests:
        with context.Pool(1) as pool:
            pool.apply(measure, (20, *each))  # what is slow once
            print(json.dumps(pool.apply(measure, (num_requests, *each))), flush=True)


if __name__ == "__main__":
    main()
