"""Bodies as programs send them that are no Python library, or whose library is too large for a test.

``recorded.jsonl`` was recorded off the wire on 30 November 2026; the scripted engine answered:
vercel: ai 6.0.326 with @ai-sdk/openai-compatible 2.0.92.
librechat: @librechat/agents 3.2.21, which sends what LibreChat asks, with the settings of its packages/api.
open-webui: 0.12.4 in a browser. The first body with tools has all 36, the others those that were called.
NeMo-Skills' bodies are written from its source (nemo_skills/inference/model/vllm.py at 101a1da).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Body = dict[str, Any]
ASK = {"role": "user", "content": "What is the capital of France?"}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": PLACE}}
RAIN = {"role": "user", "content": "Weather in Rome?"}
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
_RECORDED = [
    json.loads(line) for line in Path(__file__).with_name("recorded.jsonl").read_text("utf-8").splitlines()
]
CASES: list[tuple[str, str, Body]] = [
    *(("nemo-skills", route, body) for route, body in SKILLS),
    *((row["program"], row["route"], row["body"]) for row in _RECORDED),
]
