"""The checks of NeMo's ``PUT /generate``: their order, bounds, defaults and exact texts.

Source: NeMo v2.0.0rc0, ``nemo/collections/nlp/modules/common/text_generation_server.py``, observed by running
it. A failed check is a ``RefusalError``; how it is sent depends on ``--nemo-compat``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_SENTENCES = 128
END_OF_TEXT = "<|endoftext|>"

TOO_MANY_SENTENCES = "Maximum number of sentences is 128"
TASK_IDS = (
    "Input at 'sentences' must by a tuple of two tensors like:"
    + " " * 20
    + "(context_tokens_tensor, context_length_tensor) if task ids are given"
)
# Texts of our own, where NeMo answers 500, hangs, or takes a string apart into characters.
NOT_AN_OBJECT = "The request body must be a JSON object"
NO_SENTENCES = "sentences is required: a list of strings"
NOT_STRINGS = "sentences must be a list of strings"
NO_PROMPTS = "sentences must hold at least one string"


class RefusalError(Exception):
    """A request is refused. ``status`` is what NeMo answers with, or 400 where NeMo breaks."""

    def __init__(self, text: str, status: int = 200) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


@dataclass(frozen=True, kw_only=True)
class NemoRequest:
    """A request that passed. Defaults are NeMo's."""

    sentences: tuple[str, ...]
    tokens_to_generate: int = 64
    all_probs: bool = False
    temperature: float = 1.0
    add_BOS: bool = False
    greedy: bool = False
    top_k: float = 0
    top_p: float = 0.9
    repetition_penalty: float | None = None  # None: not given. NeMo's default of 1.2 has no effect there
    end_strings: tuple[str, ...] = (END_OF_TEXT,)
    min_tokens_to_generate: int = 0
    compute_logprob: bool = False
    random_seed: int | None = None


class Check(NamedTuple):
    field: str
    is_valid: Callable[[Any], bool]
    text: str


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a bool is no number here, as in NeMo


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least  # isinstance: true counts as 1, as in NeMo


CHECKS = (
    Check("task_ids", lambda _: False, TASK_IDS),
    Check(
        "tokens_to_generate",
        lambda v: _is_int(v, 1),
        "tokens_to_generate must be an integer greater than 0",
    ),
    Check("all_probs", _is_bool, "all_probs must be a boolean value"),
    Check(
        "temperature",
        lambda v: _is_number(v) and 0 < v <= 100,
        "temperature must be a positive number less than or equal to 100.0",
    ),
    Check("add_BOS", _is_bool, "add_BOS must be a boolean value"),
    Check("greedy", _is_bool, "greedy must be a boolean value"),
    Check("top_k", lambda v: _is_number(v) and v >= 0, "top_k must be a positive integer number"),
    Check(
        "top_p",
        lambda v: _is_number(v) and 0 <= v <= 1,
        "top_p must be a positive number less than or equal to 1.0",
    ),
    Check(
        "repetition_penalty",
        lambda v: _is_number(v) and v >= 1,
        "repetition_penalty must be a positive number no less than 1.0",
    ),
    Check(
        "end_strings",
        lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
        "expect end_strings to be a list of strings",
    ),
    Check(
        "min_tokens_to_generate",
        lambda v: _is_int(v, 0),
        "min_tokens_to_generate must be an integer no less than 0",
    ),
    Check("neighbors", lambda v: _is_int(v, 0), "num of neighbors must be an integer no less than 0"),
    Check("compute_logprob", _is_bool, "compute_logprob must be a boolean value"),
    Check(
        "random_seed",
        lambda v: v is None or _is_int(v, 0),
        "random_seed must be a positive integer number or None",
    ),
)
KNOWN_FIELDS = frozenset({"sentences", *(check.field for check in CHECKS)})


def parse(body: object) -> NemoRequest:
    """The request, or the first RefusalError in NeMo's order. Unknown keys do not matter."""
    if not isinstance(body, dict):
        raise RefusalError(NOT_AN_OBJECT, 400)
    sentences = body.get("sentences")
    if not isinstance(sentences, list | str | dict):
        raise RefusalError(NO_SENTENCES, 400)
    if len(sentences) > MAX_SENTENCES:
        raise RefusalError(TOO_MANY_SENTENCES, 400)
    for check in CHECKS:
        if check.field in body and not check.is_valid(body[check.field]):
            raise RefusalError(check.text)
    # NeMo looks at what is in the list only when it tokenises, after every other check.
    if not isinstance(sentences, list) or not all(isinstance(item, str) for item in sentences):
        raise RefusalError(NOT_STRINGS, 400)
    if not sentences:
        raise RefusalError(NO_PROMPTS, 400)
    return _request(sentences, body)


def _request(sentences: list[str], body: Mapping[str, Any]) -> NemoRequest:
    values = {name: body[name] for name in NemoRequest.__dataclass_fields__ if name in body}
    values["sentences"] = tuple(sentences)
    values["end_strings"] = tuple(body.get("end_strings", (END_OF_TEXT,)))
    for name in ("tokens_to_generate", "min_tokens_to_generate", "random_seed"):
        if isinstance(values.get(name), bool):
            values[name] = int(values[name])
    for name in ("top_k", "repetition_penalty"):
        if not _is_finite(values.get(name) or 0):
            raise RefusalError(f"{name} must be a finite number", 400)
    return NemoRequest(**values)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
