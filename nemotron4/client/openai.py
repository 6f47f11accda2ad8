"""Chat models behind an OpenAI-compatible server, reward models behind ``/score`` or the hosted form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from nemotron4.client.http import HttpEndpoint, token_counts
from nemotron4.client.interface import BadContentError, Reply, Sampling, TextLogprob
from nemotron4.client.thoughts import split_thoughts
from nemotron4.engine import Reward
from nemotron4.records import ATTRIBUTES, JsonObject, Message


class OpenAIChatModel:
    """``base_url`` ends before ``/chat/completions``, as for OpenAI's own client: usually ``.../v1``."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        extra_body: Mapping[str, Any] | None = None,
        reward_form: Literal["score", "hosted"] = "score",
    ) -> None:
        self.name = model
        # /score stands beside /v1, not below it.
        root = base_url.rstrip("/")
        self._prefix = "/v1" if root.endswith("/v1") else ""
        self._endpoint = HttpEndpoint(root.removesuffix("/v1"), api_key=api_key, timeout_s=timeout_s)
        self._extra = dict(extra_body or {})
        self._reward_form = reward_form

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        body = self._body(sampling)
        body["messages"] = [message.to_json() for message in messages]
        if sampling.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        return body

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        answer = await self._post("/chat/completions", self.chat_request(messages, sampling))
        with _paid(answer):
            choice = _first_choice(answer)
            content = (choice.get("logprobs") or {}).get("content")
            logprobs = None if content is None else tuple(_chat_logprob(entry) for entry in content)
            text, thoughts = _said(choice)
            return _reply(answer, choice, text, logprobs, thoughts)

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        body = self._body(sampling) | {"prompt": prompt}
        if sampling.top_logprobs is not None:
            body["logprobs"] = sampling.top_logprobs
        answer = await self._post("/completions", body)
        with _paid(answer):
            choice = _first_choice(answer)
            logprobs = _completion_logprobs(choice.get("logprobs"))
            return _reply(answer, choice, str(_field(choice, "text", "choices[0]")), logprobs)

    async def continuation_logprobs(self, prompt: str, continuation: str) -> tuple[TextLogprob, ...]:
        # One new token, later dropped: some servers refuse 0, and some read it as "no limit".
        body = self._body(Sampling(max_tokens=1)) | {
            "prompt": prompt + continuation,
            "echo": True,
            "logprobs": 1,
        }
        answer = await self._post("/completions", body)
        choice = _first_choice(answer)
        values = choice.get("logprobs") or {}
        offsets = _field(values, "text_offset", "choices[0].logprobs")
        entries = _completion_logprobs(values) or ()
        start, end = len(prompt), len(prompt) + len(continuation)
        if start not in offsets:
            raise BadContentError(
                f"no token starts at character {start}: prompt and continuation share a token",
                kind="token_boundary",
            )
        return tuple(entry for entry, at in zip(entries, offsets, strict=True) if start <= at < end)

    async def score(self, messages: Sequence[Message]) -> Reward:
        turns = [message.to_json() for message in messages]
        if self._reward_form == "hosted":
            body: JsonObject = {"model": self.name, "messages": turns, **self._extra}
            answer = await self._post("/chat/completions", body)
            with _paid(answer):
                return hosted_reward(answer)
        answer = await self._endpoint.request("POST", "/score", {"messages": turns})
        with _paid(answer):
            return score_reward(answer)

    async def close(self) -> None:
        await self._endpoint.close()

    async def _post(self, path: str, body: JsonObject) -> Any:
        return await self._endpoint.request("POST", self._prefix + path, body)

    def _body(self, sampling: Sampling) -> JsonObject:
        body: JsonObject = {
            "model": self.name,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return body | self._extra


@contextlib.contextmanager
def _paid(answer: Any) -> Iterator[None]:
    """What is wrong with an answer that came is an error with its price."""
    try:
        yield
    except BadContentError as error:
        error.paid_tokens = token_counts(answer)
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = BadContentError(f"the answer has an unknown form: {error!r}", kind="malformed")
        wrong.paid_tokens = token_counts(answer)
        raise wrong from error


def _said(choice: JsonObject) -> tuple[str, str | None]:
    """(answer, thoughts) of a chat choice. Without content there is an empty answer, or the refusal."""
    message: Any = choice.get("message")
    content = _field(message, "content", "choices[0].message")
    given = message.get("reasoning_content") or message.get("reasoning")
    thoughts = [given] if isinstance(given, str) else []
    if content is None:
        content = message.get("refusal") or ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind, text = part.get("type", "text"), part.get("text")
            if kind in ("thinking", "reasoning"):
                thoughts.append(str(part.get(kind) or text or ""))
            elif isinstance(text, str):
                texts.append(text)
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadContentError(f"choices[0].message.content is {content!r:.80}", kind="malformed")
    answer, inside = split_thoughts(content)
    thoughts += [] if inside is None else [inside]
    return answer, "\n\n".join(thoughts) if thoughts else None


def score_reward(answer: Any) -> Reward:
    """The answer of ``POST /score``: ``{"attributes": {...}, "reward": x, "raw": [nine values]}``."""
    attributes = _field(answer, "attributes", "the answer of /score")
    return _reward(attributes, answer.get("reward"), answer.get("raw") or ())


def hosted_reward(answer: Any) -> Reward:
    """NVIDIA's hosted form: ``choices[0].logprobs.content[]`` holds the attributes as (token, logprob)."""
    content = _field(_first_choice(answer).get("logprobs"), "content", "choices[0].logprobs")
    return _reward({entry["token"]: entry["logprob"] for entry in content}, None, ())


def _reward(attributes: Any, scalar: Any, raw: Sequence[float]) -> Reward:
    missing = [name for name in ATTRIBUTES if not isinstance(attributes.get(name), int | float)]
    if missing:
        raise BadContentError(f"the reward lacks {', '.join(missing)}", kind="reward")
    values = {name: float(attributes[name]) for name in ATTRIBUTES}
    return Reward(values, None if scalar is None else float(scalar), tuple(map(float, raw)))


def _first_choice(answer: Any) -> JsonObject:
    choices = _field(answer, "choices", "the answer")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadContentError("the answer has no choices", kind="missing_field")
    return choices[0]


def _field(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise BadContentError(f"{where} has no field {name!r}", kind="missing_field")
    return value[name]


def _reply(
    answer: JsonObject,
    choice: JsonObject,
    text: str,
    logprobs: tuple[TextLogprob, ...] | None,
    thoughts: str | None = None,
) -> Reply:
    usage = answer.get("usage") or {}
    return Reply(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "unknown"),
        model=str(answer.get("model") or ""),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        logprobs=logprobs,
        thoughts=thoughts,
    )


def _chat_logprob(entry: JsonObject) -> TextLogprob:
    top = tuple((str(rival["token"]), float(rival["logprob"])) for rival in entry.get("top_logprobs") or ())
    return TextLogprob(str(entry["token"]), float(entry["logprob"]), top)


def _completion_logprobs(values: Any) -> tuple[TextLogprob, ...] | None:
    """The legacy completions form: parallel lists; the first echoed token has no log-probability (null)."""
    if not values:
        return None
    rivals = values.get("top_logprobs") or [None] * len(values["tokens"])
    return tuple(
        TextLogprob(str(token), float("nan") if value is None else float(value), tuple((top or {}).items()))
        for token, value, top in zip(values["tokens"], values["token_logprobs"], rivals, strict=True)
    )
