"""The only module that knows inspect_ai: it schedules conversations, and writes the logs of its viewer.

Answers are handed to the caller as they arrive; nothing is read back from the logs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.client import ChatModel, ClientError, Reply, Sampling, TokenLogprob, call_with_retries
from nemotron4.errors import ConfigError
from nemotron4.evaluation.conversation import Answer, Conversation, hold
from nemotron4.records import Message

# Conversations of one log: bounds the memory of a run and keeps every log quick to open.
CHUNK = 1000
PROVIDER = "nemotron4"

OnAnswer = Callable[[Answer], None]
OnFailure = Callable[[str, ClientError], None]
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
    on_log: OnLog,
) -> None:
    """Hold every conversation, ``concurrency`` at a time; a failed one is reported and ends nothing else."""
    check_installed()
    from inspect_ai import eval_async
    from inspect_ai.model import GenerateConfig
    from inspect_ai.util import display_type

    # Its own display would write to stdout, which belongs to the result; the caller shows progress. The
    # variable is read by the first call of display_type, and eval_async does not make one.
    os.environ.setdefault("INSPECT_DISPLAY", "none")
    display_type()
    api = _model_api(chat)
    for start in range(0, len(conversations), CHUNK):
        chunk = conversations[start : start + CHUNK]
        found = await eval_async(
            _task(chunk, chat, name=name, metadata=metadata, on_answer=on_answer, on_failure=on_failure),
            model=api,
            log_dir=str(logs),
            log_level="error",
            log_realtime=False,
            log_buffer=100,
            fail_on_error=False,
            max_samples=concurrency,
            **GenerateConfig(max_connections=concurrency).model_dump(exclude_none=True),
        )
        for log in found:
            if log.status == "cancelled":
                raise KeyboardInterrupt
            if log.status == "error" and log.error is not None:
                raise ConfigError(f"inspect_ai could not run {name}: {log.error.message}")
            on_log(Path(log.location).name, [conversation.id for conversation in chunk])


def _model_api(chat: ChatModel) -> Any:
    """A ChatModel as an inspect model. Retries are ours, so that both kinds of call share one policy."""
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        get_model,
        modelapi,
    )

    class ChatModelAPI(ModelAPI):
        def __init__(
            self, model_name: str, base_url: None = None, api_key: None = None, config: Any = None
        ) -> None:
            super().__init__(model_name=model_name, config=config or GenerateConfig())

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:  # noqa: A002
            messages = [Message(message.role, message.text) for message in input]
            sampling = Sampling(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_logprobs=config.top_logprobs,
                seed=config.seed,
            )
            reply = await call_with_retries(lambda: chat.chat(messages, sampling))
            choice = ChatCompletionChoice(
                message=ChatMessageAssistant(content=reply.text, model=reply.model),
                stop_reason="max_tokens" if reply.finish_reason == "length" else "stop",
            )
            prompt_tokens, completion_tokens = reply.prompt_tokens or 0, reply.completion_tokens or 0
            usage = ModelUsage(
                input_tokens=prompt_tokens,
                output_tokens=completion_tokens,
                total_tokens=prompt_tokens + completion_tokens,
            )
            return ModelOutput(
                model=reply.model or self.model_name,
                choices=[choice],
                usage=usage,
                metadata={"reply": _reply_json(reply)},
            )

        def should_retry(self, ex: BaseException) -> bool:
            return False

    modelapi(name=PROVIDER)(ChatModelAPI)
    return get_model(f"{PROVIDER}/{chat.name}", memoize=False)


def _reply_json(reply: Reply) -> dict[str, Any]:
    """What inspect's own fields do not keep."""
    first = (reply.logprobs or (None,))[0]
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "finish_reason": reply.finish_reason,
        "first": None if first is None else [first.token, first.logprob, list(first.top)],
    }


def _reply(output: Any) -> Reply:
    kept = output.metadata["reply"]
    first = kept["first"]
    logprobs = None
    if first is not None:
        top = tuple((str(token), float(value)) for token, value in first[2])
        logprobs = (TokenLogprob(first[0], first[1], top),)
    return Reply(
        text=output.completion,
        finish_reason=kept["finish_reason"],
        model=output.model,
        prompt_tokens=kept["prompt_tokens"],
        completion_tokens=kept["completion_tokens"],
        logprobs=logprobs,
    )


def _task(
    conversations: Sequence[Conversation],
    chat: ChatModel,
    *,
    name: str,
    metadata: Mapping[str, Any],
    on_answer: OnAnswer,
    on_failure: OnFailure,
) -> Any:
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        GenerateConfig,
        get_model,
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
            sampling = conversation.sampling

            async def ask(messages: Sequence[Message]) -> Reply:
                settings = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
                if sampling.top_logprobs is not None:
                    settings |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
                state.messages = as_chat(messages)
                state.output = await get_model().generate(state.messages, config=GenerateConfig(**settings))
                state.messages.append(state.output.message)
                return _reply(state.output)

            try:
                answer = await hold(conversation, chat, ask)
            except ClientError as error:
                on_failure(conversation.id, error)
                raise
            on_answer(answer)
            return state

        return solve

    samples = [
        Sample(id=conversation.id, input=as_chat(conversation.messages)) for conversation in conversations
    ]
    return Task(dataset=MemoryDataset(samples), solver=converse(), name=name, metadata=dict(metadata))
