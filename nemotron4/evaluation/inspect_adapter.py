"""The only module that knows inspect_ai: it schedules conversations, and writes the logs of its viewer.

Answers are handed to the caller as they arrive; nothing is read back from the logs. The conversations call
the endpoint themselves: a call through inspect's own model interface costs as much again as everything else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.client import ChatModel, ClientError
from nemotron4.client.interface import TransientError
from nemotron4.errors import ConfigError
from nemotron4.evaluation.conversation import Answer, Conversation, hold
from nemotron4.records import Message

# Conversations of one log: bounds the memory of a run and keeps every log quick to open.
CHUNK = 1000
PROVIDER = "nemotron4"

OnAnswer = Callable[[Answer], None]
OnFailure = Callable[[str, ClientError], None]
OnRetry = Callable[[TransientError], None]
OnLog = Callable[[str, Sequence[str]], None]  # file name of a finished log, the ids in it


def check_installed() -> None:
    """ConfigError without inspect_ai. It is only looked for: importing it takes seconds."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise ConfigError(
            "running benchmarks needs inspect_ai, which is not installed",
            hint="pip install 'nemotron4[eval]'",
        )


async def run_conversations(
    conversations: Sequence[Conversation],
    chat: ChatModel,
    *,
    name: str,
    logs: Path,
    concurrency: int,
    metadata: Mapping[str, Any],
    on_answer: OnAnswer,
    on_failure: OnFailure,
    on_retry: OnRetry,
    on_log: OnLog,
) -> None:
    """Hold every conversation, ``concurrency`` at a time; a failed one is reported and ends nothing else."""
    check_installed()
    from inspect_ai import eval_async
    from inspect_ai.util import display_type

    # Its own display would write to stdout, which belongs to the result; the caller shows progress. The
    # variable is read by the first call of display_type, and eval_async does not make one.
    os.environ.setdefault("INSPECT_DISPLAY", "none")
    display_type()
    named = _named_model(chat.name)
    for start in range(0, len(conversations), CHUNK):
        chunk = conversations[start : start + CHUNK]
        found = await eval_async(
            _task(
                chunk,
                chat,
                name=name,
                metadata=metadata,
                on_answer=on_answer,
                on_failure=on_failure,
                on_retry=on_retry,
            ),
            model=named,
            log_dir=str(logs),
            log_level="error",
            log_realtime=False,
            log_buffer=100,
            fail_on_error=False,
            max_samples=concurrency,
        )
        for log in found:
            if log.status == "cancelled":
                raise KeyboardInterrupt
            if log.status == "error" and log.error is not None:
                raise ConfigError(f"inspect_ai could not run {name}: {log.error.message}")
            on_log(Path(log.location).name, [conversation.id for conversation in chunk])


def _named_model(name: str) -> Any:
    """What a log calls the model. It is never asked."""
    from inspect_ai.model import GenerateConfig, ModelAPI, get_model, modelapi

    class NamedModel(ModelAPI):
        def __init__(
            self, model_name: str, base_url: None = None, api_key: None = None, config: Any = None
        ) -> None:
            super().__init__(model_name=model_name, config=config or GenerateConfig())

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:  # noqa: A002
            raise NotImplementedError("conversations ask their endpoint themselves")

    modelapi(name=PROVIDER)(NamedModel)
    return get_model(f"{PROVIDER}/{name}", memoize=False)


def _task(
    conversations: Sequence[Conversation],
    chat: ChatModel,
    *,
    name: str,
    metadata: Mapping[str, Any],
    on_answer: OnAnswer,
    on_failure: OnFailure,
    on_retry: OnRetry,
) -> Any:
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.solver import solver

    kinds = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
    by_id = {conversation.id: conversation for conversation in conversations}

    def as_chat(messages: Sequence[Message]) -> list[Any]:
        return [kinds[message.role](content=message.content) for message in messages]

    @solver(name=f"{PROVIDER}/converse")
    def converse() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            conversation = by_id[str(state.sample_id)]
            try:
                answer = await hold(conversation, chat, on_retry)
            except ClientError as error:
                on_failure(conversation.id, error)
                raise
            on_answer(answer)
            state.messages = as_chat(answer.messages)
            state.output = ModelOutput.from_content(chat.name, answer.texts[-1])
            state.output.usage = ModelUsage(
                input_tokens=answer.prompt_tokens or 0, output_tokens=answer.completion_tokens or 0
            )
            return state

        return solve

    samples = [
        Sample(id=conversation.id, input=as_chat(conversation.messages)) for conversation in conversations
    ]
    return Task(dataset=MemoryDataset(samples), solver=converse(), name=name, metadata=dict(metadata))
