"""Bodies as programs send them that are no Python library, or whose library is too large for a test.

Written from the sources of NeMo-Skills (nemo_skills/inference/model/vllm.py at 101a1da), the Vercel AI SDK
(packages/openai-compatible at 03955ee). Those of open-webui and LibreChat are from partial reading.
None is recorded off the wire.
"""

from __future__ import annotations

from typing import Any

Body = dict[str, Any]
ASK = {"role": "user", "content": "What is the capital of France?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": PLACE}}
RAIN = {"role": "user", "content": "Weather in Rome?"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "20 degrees"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

# Everything is sent, whether it says something or not.
_SKILLS: Body = {
    "max_tokens": 512,
    "temperature": 0.0,
    "top_p": 0.95,
    "seed": 0,
    "stop": None,
    "n": 1,
    "stream": False,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "spaces_between_special_tokens": False,
}
_SKILLS_CHAT: Body = {
    **_SKILLS,
    "logprobs": False,
    "top_logprobs": None,
    "tools": None,
    "response_format": None,
}
SKILLS: list[tuple[str, Body]] = [
    (CHAT, {**_SKILLS_CHAT, "messages": [ASK]}),
    (
        CHAT,
        {**_SKILLS_CHAT, "messages": [{"role": "system", "content": ""}, ASK], "top_k": 20, "stream": True},
    ),
    (CHAT, {**_SKILLS_CHAT, "messages": [ASK], "logprobs": True, "top_logprobs": 1, "stop": ["\n\n"]}),
    (CHAT, {**_SKILLS_CHAT, "messages": [RAIN], "tools": [TOOL]}),
    (
        TEXT,
        {**_SKILLS, "prompt": "Once", "logprobs": None, "echo": False, "logit_bias": None}
        | {"skip_special_tokens": False, "max_tokens": 8},
    ),
]
_SDK: Body = {"max_tokens": 400, "temperature": 0}
VERCEL: list[tuple[str, Body]] = [
    (CHAT, {**_SDK, "messages": [ASK]}),
    (CHAT, {**_SDK, "messages": [PARTS], "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {**_SDK, "messages": [RAIN], "tools": [TOOL], "tool_choice": "auto", "stream": True}),
    (CHAT, {**_SDK, "messages": [RAIN, CALLED, RESULT], "tools": [TOOL], "tool_choice": "auto"}),
    (
        CHAT,
        {**_SDK, "messages": [ASK]}
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": CITY, "strict": True, "name": "response"},
            }
        },
    ),
    (CHAT, {**_SDK, "messages": [ASK], "response_format": {"type": "json_object"}}),
]
WEBUI: list[tuple[str, Body]] = [
    (CHAT, {"stream": True, "messages": [ASK], "stream_options": {"include_usage": True}}),
    (CHAT, {"stream": False, "messages": [ASK], "max_completion_tokens": 1000}),  # the title of a chat
    (CHAT, {"stream": True, "messages": [ASK], "temperature": 0.7, "top_k": 40, "seed": 3, "stop": ["###"]}),
    (CHAT, {"stream": False, "messages": [PARTS], "max_tokens": 64, "frequency_penalty": 0.5}),
    (CHAT, {"stream": True, "messages": [RAIN], "tools": [TOOL], "temperature": 0}),
]
_LIBRE: Body = {"user": "65f0", "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
LIBRECHAT: list[tuple[str, Body]] = [
    (CHAT, {**_LIBRE, "messages": [ASK], "stream": True}),
    (CHAT, {**_LIBRE, "messages": [{"role": "system", "content": "Be short."}, PARTS], "stream": True}),
    (CHAT, {**_LIBRE, "messages": [{**ASK, "name": "Ada"}], "stream": False, "max_tokens": 75}),
    (CHAT, {**_LIBRE, "messages": [RAIN], "tools": [TOOL], "stream": True, "temperature": 0}),
    (CHAT, {**_LIBRE, "messages": [RAIN, CALLED, RESULT], "tools": [TOOL], "stream": True}),
]
PROGRAMS = {"nemo-skills": SKILLS, "vercel": VERCEL, "open-webui": WEBUI, "librechat": LIBRECHAT}
