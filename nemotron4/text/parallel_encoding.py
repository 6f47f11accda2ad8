"""Texts to token ids in several processes, in order. No torch, so that a process starts quickly."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy

from nemotron4.errors import TokenizerError
from nemotron4.text.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**19


class EncodedTexts(NamedTuple):
    """Texts of a batch, each with its end. ``failed``: places of those that cannot be encoded, and why."""

    tokens: bytes  # int32 or uint16
    lengths: bytes  # int32
    failed: tuple[tuple[int, str], ...]


def encode_batches(
    batches: Iterable[Sequence[str]], tokenizer: Tokenizer, *, end_id: int, dtype: str, num_workers: int
) -> Generator[EncodedTexts]:
    """Each batch encoded, in order. A few are under way for each worker, so memory is bounded."""
    under_way: deque[Future[EncodedTexts]] = deque()
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(tokenizer, end_id, dtype),
    ) as pool:
        try:
            for batch in batches:
                under_way.append(pool.submit(_encode, batch))
                if len(under_way) > 3 * num_workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


_settings: tuple[Tokenizer, int, str] | None = None  # of this worker


def _begin(tokenizer: Tokenizer, end_id: int, dtype: str) -> None:
    global _settings
    _settings = tokenizer, end_id, dtype
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)


def _encode(texts: Sequence[str]) -> EncodedTexts:
    assert _settings is not None, "the pool begins each worker"
    tokenizer, end_id, dtype = _settings
    found, failed = [], []
    for place, text in enumerate(texts):
        try:
            ids = tokenizer.encode(text, parse_special=False)
        except TokenizerError as error:
            failed.append((place, error.message))
            continue
        ids.append(end_id)
        found.append(numpy.array(ids, dtype))
    lengths = numpy.array([len(ids) for ids in found], "<i4")
    return EncodedTexts(b"".join(ids.tobytes() for ids in found), lengths.tobytes(), tuple(failed))
