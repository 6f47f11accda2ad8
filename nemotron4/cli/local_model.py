"""A model loaded into this process, as the chat model that evaluation and synthesis talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron4.client import ChatModel


def open_local_model(model: str, name: str | None = None) -> ChatModel:
    """Load a model by path or id; its own chat template renders the messages."""
    from nemotron4.client import EngineChatModel
    from nemotron4.errors import ConfigError
    from nemotron4.inference.interface import SamplingParams
    from nemotron4.inference.load import load

    engine = load(model)
    prompt_format = engine.prompt_format
    if prompt_format is None:
        raise ConfigError(f"{model} has no chat template, so messages cannot be rendered")
    return EngineChatModel(
        engine,
        make_params=SamplingParams,
        encode_chat=lambda messages: prompt_format.encode(engine.tokenizer, messages),
        stop=prompt_format.stop_strings,
        name=name,
    )
