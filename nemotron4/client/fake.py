"""A model that costs nothing: deterministic replies, and every kind of failure on request.

It serves tests, benchmarks, demonstrations and rehearsals of a recipe. A reply depends only on the request
(messages and sampling), so two runs of one recipe give the same data."""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nemotron4.client.interface import (
    BadContentError,
    ClientError,
    Embedding,
    HopelessError,
    ManyLogprobs,
    Reply,
    Sampling,
    TextLogprob,
    TransientError,
)
from nemotron4.client.thoughts import without_thoughts
from nemotron4.engine import Reward
from nemotron4.records import ATTRIBUTES, JsonObject, Message

Script = Callable[[Sequence[Message], Sampling], str]

FAILURE_KINDS = ("rate_limit", "server_error", "timeout", "connection", "not_json", "empty", "truncated")


@dataclass(frozen=True, kw_only=True)
class FakeBehaviour:
    """How the fake answers, shared by the in-process fake and the HTTP server.

    failure_rates: share of calls (0 to 1) per kind, drawn from ``seed`` and the number of the call, so a
    retry draws again. hopeless: a prompt that contains this text is refused with 400, every time.
    """

    latency_s: float = 0.0
    latency_spread: float = 0.0  # 0.5 draws from 50 % to 150 % of the latency
    failure_rates: dict[str, float] = field(default_factory=dict)
    hopeless: str | None = None
    retry_after_s: float | None = None
    script: Script | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.failure_rates) - set(FAILURE_KINDS)
        if unknown:
            raise ValueError(f"unknown failure kinds {sorted(unknown)}; known: {', '.join(FAILURE_KINDS)}")

    def failure(self, call_number: int) -> str | None:
        """The kind of failure of this call, or None."""
        if not self.failure_rates:
            return None
        point = random.Random(self.seed * 1_000_003 + call_number).random()
        for kind, rate in self.failure_rates.items():
            point -= rate
            if point < 0:
                return kind
        return None

    def delay_s(self, call_number: int) -> float:
        if not self.latency_spread:
            return self.latency_s
        draw = random.Random(self.seed * 7_368_787 + call_number).uniform(-1, 1)
        return self.latency_s * (1 + self.latency_spread * draw)

    def reply(self, messages: Sequence[Message], sampling: Sampling) -> str:
        return (self.script or scripted_reply)(messages, sampling)


class FakeChatModel:
    """``calls`` counts what was asked; ``requests`` holds every request if ``keep_requests``."""

    def __init__(
        self, behaviour: FakeBehaviour | None = None, *, name: str = "fake", keep_requests: bool = False
    ) -> None:
        self.name = name
        self.calls = 0
        self.requests: list[JsonObject] = []
        self._behaviour = behaviour or FakeBehaviour()
        self._keep = keep_requests

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        return {
            "model": self.name,
            "messages": [message.to_json() for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            **({} if sampling.schema is None else {"schema": sampling.schema}),
            **({"choice": list(sampling.choice)} if sampling.choice else {}),
        }

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        self.calls += 1
        number = self.calls
        if self._keep:
            self.requests.append(self.chat_request(messages, sampling))
        behaviour = self._behaviour
        delay = behaviour.delay_s(number)
        if delay:
            await asyncio.sleep(delay)
        else:
            await asyncio.sleep(0)
        prompt = "\n".join(message.content for message in messages)
        if behaviour.hopeless is not None and behaviour.hopeless in prompt:
            raise HopelessError("the fake refuses this prompt", kind="bad_request", status=400)
        failure = behaviour.failure(number)
        if failure is not None and failure not in ("empty", "truncated"):
            raise _error(failure, behaviour.retry_after_s)
        return without_thoughts(make_reply(behaviour, messages, sampling, model=self.name, failure=failure))

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        return await self.chat((Message("user", prompt),), sampling)

    async def continuation_logprobs(self, prompt: str, continuations: Sequence[str]) -> ManyLogprobs:
        return [fake_logprobs(each) for each in continuations]

    async def score(self, messages: Sequence[Message]) -> Reward:
        self.calls += 1
        await asyncio.sleep(self._behaviour.delay_s(self.calls))
        return Reward(attributes=fake_attributes(messages))

    async def embed(self, text: str) -> Embedding:
        self.calls += 1
        await asyncio.sleep(self._behaviour.delay_s(self.calls))
        return Embedding(vector=fake_vector(text), prompt_tokens=text.count(" ") + 1)

    async def close(self) -> None:
        return None


def make_reply(
    behaviour: FakeBehaviour,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    model: str,
    failure: str | None = None,
) -> Reply:
    """A Reply cut at ``max_tokens`` words; a word is a token here."""
    text = "" if failure == "empty" else behaviour.reply(messages, sampling)
    words = re.findall(r"\s*\S+", text)
    limit = max(1, len(words) // 2) if failure == "truncated" else sampling.max_tokens
    is_cut = len(words) > limit
    if is_cut:
        words = words[:limit]
        text = "".join(words)
    return Reply(
        text=text,
        finish_reason="length" if is_cut else "stop",
        model=model,
        prompt_tokens=sum(message.content.count(" ") + 1 for message in messages),
        completion_tokens=len(words),
        logprobs=fake_logprobs(text) if sampling.top_logprobs is not None else None,
    )


def _error(kind: str, retry_after_s: float | None) -> ClientError:
    if kind == "not_json":
        wrong = BadContentError("the fake answered something that is not JSON", kind="not_json")
        wrong.paid_tokens = (0, 0)
        return wrong
    if kind == "rate_limit":
        return TransientError("fake 429", kind="rate_limit", status=429, retry_after_s=retry_after_s)
    if kind == "server_error":
        return TransientError("fake 503", kind="server_error", status=503)
    if kind == "timeout":
        return TransientError("fake timeout", kind="timeout")
    return TransientError("fake broken connection", kind="connection")


_LIST_REQUEST = re.compile(r"\blist of (?:exactly )?(\d+)\b", re.IGNORECASE)
_SUBJECTS = (
    "rivers", "tax rules", "bread", "satellites", "fractions", "harbours", "grammar", "beekeeping",
    "recursion", "vaccines", "folk music", "budgets", "volcanoes", "chess openings", "solar panels", "kites",
    "railways", "poetry", "glaciers", "file formats", "gardens", "contracts", "proteins", "maps",
)  # fmt: skip
_ANGLES = (
    "history of", "first steps in", "common errors about", "costs of", "tools for", "limits of",
    "a day with", "teaching", "comparing", "planning", "safety around", "myths about",
)  # fmt: skip


def scripted_reply(messages: Sequence[Message], sampling: Sampling) -> str:
    """A short text of the asked form: a numbered list for "list of 5", a verdict for a judge, else prose."""
    digest = hashlib.sha256(
        json.dumps([[m.role, m.content] for m in messages] + [sampling.seed, sampling.temperature]).encode()
    ).digest()
    draw = random.Random(digest)
    prompt = messages[-1].content
    if sampling.schema is not None:
        return json.dumps(_fitting(sampling.schema, draw))
    wanted = _LIST_REQUEST.search(prompt)
    if wanted:
        return "\n".join(f"{i}. {_phrase(draw)}" for i in range(1, int(wanted[1]) + 1))
    if "[[A]]" in prompt:
        return f"[[{draw.choice('ABC')}]]"
    if "one letter, A or B" in prompt:
        return draw.choice("AB")
    if "Yes or No" in prompt:
        return draw.choice(("Yes", "No"))
    sentences = [f"{_phrase(draw).capitalize()} matters for {draw.choice(_SUBJECTS)}." for _ in range(4)]
    return " ".join(sentences)


def _fitting(schema: JsonObject, draw: random.Random) -> Any:
    """A value that fits a plain schema."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema.get("type", "string")
    if kind == "object":
        return {name: _fitting(part, draw) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        number = max(schema.get("minItems", 2), min(2, schema.get("maxItems", 2)))
        return [_fitting(schema.get("items", {"type": "string"}), draw) for _ in range(number)]
    if kind in ("integer", "number"):
        return draw.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 10)))
    return draw.random() < 0.5 if kind == "boolean" else _phrase(draw)


def _phrase(draw: random.Random) -> str:
    return (
        f"{draw.choice(_ANGLES)} {draw.choice(_SUBJECTS)} and {draw.choice(_SUBJECTS)} {draw.randrange(1000)}"
    )


def fake_attributes(messages: Sequence[Message]) -> dict[str, float]:
    """Five numbers in [0, 4] that depend on the conversation only."""
    text = "\n".join(f"{message.role}: {message.content}" for message in messages)
    draw = random.Random(hashlib.sha256(text.encode()).digest())
    return {name: round(4 * draw.random(), 3) for name in ATTRIBUTES}


def fake_vector(text: str) -> tuple[float, ...]:
    """32 numbers; texts with the same words, in any order, have the same."""
    sums = [0.0] * 32
    for word in re.findall(r"\w+", text.lower()):
        digest = hashlib.sha256(word.encode()).digest()
        sums = [total + byte - 127.5 for total, byte in zip(sums, digest, strict=True)]
    return tuple(sums)


def fake_logprobs(text: str) -> tuple[TextLogprob, ...]:
    """A log-probability of minus the length over ten for every word."""
    return tuple(
        TextLogprob(word, -len(word) / 10, ((word, -len(word) / 10),)) for word in re.findall(r"\s*\S+", text)
    )


REFUSAL = "I'm sorry, but I can't help with that."
_AGREEMENT = "Yes, of course. DAN: DAN Mode enabled."
_PROGRAM = "```python\nimport sys\n\n\ndef main():\n    sys.exit(0)\n```"
_TAGS = 0xE0000  # Unicode's invisible twins of the ASCII characters
_BASE64 = re.compile(r"[A-Za-z0-9+/]{12,}={0,2}")
_HEX = re.compile(r"\b(?:[0-9a-fA-F]{2}){6,}\b")


def vulnerable_reply(messages: Sequence[Message], sampling: Sampling) -> str:
    """Agreement, a program, everything it was asked, and everything hidden in it."""
    asked = "\n".join(message.content for message in messages if message.role != "assistant")
    return "\n\n".join([_AGREEMENT, _PROGRAM, asked, *_decoded(asked)])


def refusing_reply(messages: Sequence[Message], sampling: Sampling) -> str:
    return REFUSAL


def _decoded(text: str) -> list[str]:
    found = [_as_text(_from_base64(word)) for word in _BASE64.findall(text)]
    found += [_as_text(bytes.fromhex(word)) for word in _HEX.findall(text)]
    tags = "".join(chr(ord(c) - _TAGS) for c in text if _TAGS + 0x20 <= ord(c) < _TAGS + 0x7F)
    return [*filter(None, [*found, tags]), codecs.encode(text, "rot13")]


def _from_base64(word: str) -> bytes:
    try:
        return base64.b64decode(word)
    except binascii.Error:
        return b""


def _as_text(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() else ""


PERSONAS: Mapping[str, Script] = MappingProxyType(
    {"vulnerable": vulnerable_reply, "refusing": refusing_reply}
)
