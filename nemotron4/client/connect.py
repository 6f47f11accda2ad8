"""A chat model from the address a user gives: an OpenAI-compatible server, or PUT /generate."""

from __future__ import annotations

import os

from nemotron4.client.generate import GenerateChatModel
from nemotron4.client.interface import ChatModel
from nemotron4.client.openai import OpenAIChatModel
from nemotron4.errors import ConfigError

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

    Without a name the server is asked for the model it
    serves. A key comes from the environment only.
    """
    if not is_address(address):
        raise ConfigError(f"{address!r} is not an address", hint="write it as http://HOST:PORT")
    address = address.rstrip("/")
    if address.endswith("/generate"):
        root = address.removesuffix("/generate")
        return GenerateChatModel(root, name=name or "generate", timeout_s=timeout_s)
    if not address.endswith("/v1"):
        address += "/v1"
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
