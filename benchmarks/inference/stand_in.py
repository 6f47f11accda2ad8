"""The engine with nothing behind it: in place of the library's step, the same logits after a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import c_float
from types import SimpleNamespace
from typing import Any

import numpy as np

from nemotron4.engine import ModelInfo
from nemotron4.inference.engine import Engine
from nemotron4.inference.fake_tokenizer import FIRST_BYTE, FakeTokenizer
from nemotron4.inference.native.library import CStep
from nemotron4.inference.runner import NativeRunner

MAX_RUNNING = 128


class Model:
    """In place of ``NativeModel``: every answer is "aaaa" to its last token."""

    handle = None
    cache = SimpleNamespace(num_blocks=MAX_RUNNING * 64, block_size=32, is_read_in_place=True)

    def __init__(self, vocab_size: int, step_s: float, on_step: Callable[[], None]) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size, hidden_size=64)
        self._step_s = step_s
        self._next_end = 0.0
        self._on_step = on_step

    def step(self, step: CStep) -> None:
        self._on_step()
        width = self.config.vocab_size
        numbers = (c_float * (step.num_logits * width)).from_address(step.logits)
        logits_RV = np.frombuffer(numbers, np.float32).reshape(-1, width)
        logits_RV[:] = 0
        logits_RV[:, FIRST_BYTE + ord("a")] = 30
        # From the end of one step to that of the next, with what the engine does in between.
        self._next_end = max(self._next_end, time.perf_counter() - self._step_s) + self._step_s
        time.sleep(max(0.0, self._next_end - time.perf_counter()) if self._step_s else 0.0)


def stand_in(
    kind: type[Engine] = Engine,
    *,
    step_s: float = 0.0,
    max_waiting: int = 1024,
    on_step: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine whose steps take ``step_s``; ``on_step`` is called as each begins."""
    tokenizer: Any = FakeTokenizer()
    runner = NativeRunner(Model(tokenizer.vocab_size, step_s, on_step))  # type: ignore[arg-type]
    info = ModelInfo(
        "stand-in", context_length=2048, vocab_size=tokenizer.vocab_size, num_parameters=0, dtype="",
        device="", eos_token_ids=(tokenizer.eos_id,),
    )  # fmt: skip
    return kind(
        runner, info, tokenizer, None, max_running=MAX_RUNNING, max_waiting=max_waiting, max_step_tokens=512
    )
