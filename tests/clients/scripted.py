"""The server that the journeys of real clients talk to: scripted answers, the card's format."""

from __future__ import annotations

from nemotron4.inference.fake import FakeEngine
from nemotron4.text.prompt import nemotron4

CALL = '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>'


def reply(prompt: str) -> str:
    if "20 degrees" in prompt:
        return "It is 20 C in Rome."
    return CALL if "Weather in Rome?" in prompt else "Paris is the capital of France."


def scripted_engine(context_length: int = 4096) -> FakeEngine:
    return FakeEngine(reply, prompt_format=nemotron4(), context_length=context_length)
