"""Chat models behind HTTP, by address: an OpenAI-compatible server, ``/score``, or ``PUT /generate``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from nemotron4.client.http import HttpEndpoint, base_url, finish_reason, reported_counts, token_counts
from nemotron4.client.interface import (
    BadContentError,
    ChatModel,
    Embedding,
    HopelessError,
    ManyLogprobs,
    Reply,
    Sampling,
    TextLogprob,
)
from nemotron4.client.thoughts import split_thoughts, without_thoughts
from nemotron4.engine import Reward
from nemotron4.errors import ConfigError
from nemotron4.records import ATTRIBUTES, JsonObject, Message
from nemotron4.text.prompt import format_named


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
        # /score is next to /v1, not below it.
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
        if sampling.choice:
            body["structured_outputs"] = {"choice": list(sampling.choice)}  # vLLM's name and ours
        if sampling.schema is not None:
            schema = {"name": "reply", "schema": sampling.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
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

    async def continuation_logprobs(self, prompt: str, continuations: Sequence[str]) -> ManyLogprobs:
        return [await self._continuation(prompt, each) for each in continuations]

    async def _continuation(self, prompt: str, continuation: str) -> tuple[TextLogprob, ...]:
        # One new token, later dropped: some servers refuse 0, and some read it as "no limit".
        body = self._body(Sampling(max_tokens=1)) | {"echo": True, "logprobs": 1}
        answer = await self._post("/completions", body | {"prompt": prompt + continuation})
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

    async def embed(self, text: str) -> Embedding:
        answer = await self._post("/embeddings", {"model": self.name, "input": text, **self._extra})
        with _paid(answer):
            vector = tuple(float(value) for value in answer["data"][0]["embedding"])
            if not vector:
                raise BadContentError("the embedding is empty", kind="missing_field")
            return Embedding(vector=vector, prompt_tokens=token_counts(answer)[0])

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
            part = {"text": part} if isinstance(part, str) else part
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
    prompt_tokens, completion_tokens = reported_counts(answer)
    return Reply(
        text=text,
        finish_reason=finish_reason(choice),
        model=str(answer.get("model") or ""),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
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


# What the model card's client sends; a chat answer never contains them.
CARD_END_STRINGS = ("<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User")
_SHOWN_STOPS = ("<extra_id_1>User", "<extra_id_1>", "\x11", "<|endoftext|>", "</s>")


class GenerateChatModel:
    """``template`` names the prompt format in which messages are written; the card's is nemotron4."""

    def __init__(
        self,
        base_url: str,
        *,
        template: str = "nemotron4",
        name: str = "generate",
        end_strings: Sequence[str] = CARD_END_STRINGS,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = name
        self._endpoint = HttpEndpoint(base_url, timeout_s=timeout_s)
        self._format = format_named(template)
        self._end_strings = tuple(end_strings)

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        return {"model": self.name, **self._body(self._format.render(messages), sampling)}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        reply = await self.complete(self._format.render(messages), sampling)
        if reply.finish_reason == "stop" and self._format.drops_newline:
            reply = replace(reply, text=reply.text.removesuffix("\n"))
        return without_thoughts(reply)

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        answer = await self._put(self._body(prompt, sampling))
        sentence = answer["sentences"][0]
        if not sentence.startswith(prompt):
            wrong = BadContentError("sentences[0] does not start with the prompt", kind="prompt_echo")
            wrong.paid_tokens = (0, 0)
            raise wrong
        text, stopped = _without_stop(sentence[len(prompt) :], sampling.stop)
        # The server pads a finished row with the end token and reports neither counts nor reason.
        ended = stopped or str((answer.get("tokens") or [[""]])[0][-1]) in ("</s>", "<|endoftext|>")
        return Reply(text=text, finish_reason="stop" if ended else "length", model=self.name)

    async def continuation_logprobs(self, prompt: str, continuations: Sequence[str]) -> ManyLogprobs:
        shorter = await self._put(self._body(prompt, Sampling(max_tokens=1)))
        start_ids = shorter["token_ids"][0][:-1]
        return [await self._after(start_ids, prompt + each) for each in continuations]

    async def _after(self, start_ids: list[int], text: str) -> tuple[TextLogprob, ...]:
        answer = await self._put(self._body(text, Sampling(max_tokens=1)) | {"compute_logprob": True})
        start, ids = len(start_ids), answer["token_ids"][0]
        if ids[:start] != start_ids:
            raise BadContentError("prompt and continuation share a token", kind="token_boundary")
        tokens, values = answer["tokens"][0], answer["logprob"][0]
        # Entry j of logprob belongs to token j + 1; the last token is the generated one.
        return tuple(TextLogprob(tokens[j], values[j - 1]) for j in range(start, len(ids) - 1))

    async def score(self, messages: Sequence[Message]) -> Reward:
        raise HopelessError("PUT /generate does not score conversations", kind="unsupported")

    async def embed(self, text: str) -> Embedding:
        raise HopelessError("PUT /generate does not embed texts", kind="unsupported")

    async def close(self) -> None:
        await self._endpoint.close()

    def _body(self, prompt: str, sampling: Sampling) -> JsonObject:
        if sampling.top_logprobs:
            raise HopelessError("PUT /generate has no alternatives per token", kind="unsupported")
        if sampling.choice:
            raise HopelessError("PUT /generate cannot be held to a choice of texts", kind="unsupported")
        return {
            "sentences": [prompt],
            "tokens_to_generate": sampling.max_tokens,
            "temperature": sampling.temperature or 1.0,
            "greedy": sampling.temperature == 0,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "repetition_penalty": 1.0,
            "min_tokens_to_generate": 1,
            "add_BOS": False,
            "end_strings": [*self._end_strings, *sampling.stop],
            "random_seed": sampling.seed,
        }

    async def _put(self, body: JsonObject) -> Any:
        answer = await self._endpoint.request("PUT", "/generate", body)
        if isinstance(answer, str):  # a refusal comes as a JSON string with status 200
            raise HopelessError(f"{self._endpoint.base_url}/generate refused: {answer}", kind="bad_request")
        try:
            answer["sentences"][0], answer["token_ids"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise BadContentError(
                "the answer of /generate lacks sentences or token_ids", kind="missing_field"
            ) from error
        return answer


KEY_VARIABLE = "NEMOTRON4_API_KEY"
JUDGE_KEY_VARIABLE = "NEMOTRON4_JUDGE_API_KEY"
# A long answer in a large batch on a slow server; given up sooner, it would be paid for again.
TIMEOUT_S = 3600.0


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def connect(
    address: str,
    name: str | None,
    *,
    key_variable: str = KEY_VARIABLE,
    timeout_s: float = TIMEOUT_S,
) -> ChatModel:
    """``.../generate`` is the card's server, everything else an OpenAI-compatible one (``/v1`` is added).

    Without a name the server is asked for the model it serves. A key comes from the environment only.
    """
    if not is_address(address):
        raise ConfigError(f"{address!r} is not an address", hint="write it as http://HOST:PORT")
    address = base_url(address)
    if address.endswith("/generate"):
        root = address.removesuffix("/generate")
        return GenerateChatModel(root, name=name or "generate", timeout_s=timeout_s)
    key = os.environ.get(key_variable)
    return OpenAIChatModel(address, name or _only_model(address, key), api_key=key, timeout_s=timeout_s)


def _only_model(address: str, key: str | None) -> str:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{address}/models", headers=headers, timeout=30.0).raise_for_status().json()
        names = [str(model["id"]) for model in answer["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{address}/models: {error!r}",
            hint="is the server running? One that lists no models needs the model's name (--model-name ...)",
        ) from error
    if len(names) != 1:
        raise ConfigError(
            f"{address} serves {len(names)} models: {', '.join(names)}", hint="pass --model-name"
        )
    return names[0]


def _without_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    for stop in (*_SHOWN_STOPS, *stops):
        if text.endswith(stop):
            return text.removesuffix(stop), True
    return text, False
