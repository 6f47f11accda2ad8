"""Prompt ids and stop rules of a loaded model, for raw text and for conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemotron4.errors import TemplateError
from nemotron4.inference.interface import InferenceEngine, SamplingParams
from nemotron4.records import Message

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


def text_prompt_ids(engine: InferenceEngine, text: str) -> list[int]:
    """Raw text, markers included; BOS first where the model was trained with it."""
    bos_id = engine.tokenizer.bos_id if engine.info.adds_bos else None
    return [*([] if bos_id is None else [bos_id]), *engine.tokenizer.encode(text)]


def chat_prompt_ids(engine: InferenceEngine, messages: Sequence[Message]) -> list[int]:
    """A conversation in the model's own template; markers in it are only text."""
    return prompt_format(engine).encode(engine.tokenizer, messages)


def text_params(engine: InferenceEngine, params: SamplingParams) -> SamplingParams:
    """The settings, with the ids that end a text."""
    own = engine.tokenizer.eos_id
    ends = frozenset(engine.info.eos_token_ids) | (frozenset() if own is None else {own})
    return dataclasses.replace(params, stop_token_ids=ends, min_tokens_masks=ends)


def chat_params(engine: InferenceEngine, params: SamplingParams) -> SamplingParams:
    """The settings, with what ends a text and a turn: ids where that is one marker, else strings."""
    own = prompt_format(engine)
    params = text_params(engine, params)
    spelled = [stop for stop in own.stop_strings if stop not in engine.tokenizer.markers]
    return dataclasses.replace(
        params,
        stop_token_ids=params.stop_token_ids | own.stop_token_ids(engine.tokenizer),
        stop_strings=(*params.stop_strings, *spelled),
    )


def prompt_format(engine: InferenceEngine) -> PromptFormat:
    """The model's chat template, or TemplateError for a model without one."""
    found = engine.prompt_format
    if found is None:
        raise TemplateError(
            f"the model {engine.info.name!r} has no chat template, so messages cannot be written",
            hint="give it the whole prompt as text: nemotron4 generate with rows of 'prompt'",
        )
    return found
