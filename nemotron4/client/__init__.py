"""Talk to a chat model anywhere: HTTP, in this process, or the fake that ships."""

from __future__ import annotations

from nemotron4.client.engine import EngineChatModel
from nemotron4.client.fake import FakeBehaviour, FakeChatModel
from nemotron4.client.http import api_key
from nemotron4.client.interface import (
    BadContentError,
    ChatModel,
    ClientError,
    Embedding,
    HopelessError,
    Reply,
    Sampling,
    TextLogprob,
    TransientError,
)
from nemotron4.client.remote import GenerateChatModel, OpenAIChatModel
from nemotron4.client.retry import AdaptiveLimit, RateLimit, RetryPolicy, call_with_retries
from nemotron4.engine import Reward

__all__ = [
    "AdaptiveLimit",
    "BadContentError",
    "ChatModel",
    "ClientError",
    "Embedding",
    "EngineChatModel",
    "FakeBehaviour",
    "FakeChatModel",
    "GenerateChatModel",
    "HopelessError",
    "OpenAIChatModel",
    "RateLimit",
    "Reply",
    "RetryPolicy",
    "Reward",
    "Sampling",
    "TextLogprob",
    "TransientError",
    "api_key",
    "call_with_retries",
]
