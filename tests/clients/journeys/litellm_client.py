"""litellm: six journeys."""

import json
import sys

import litellm
from pydantic import BaseModel

url, model = sys.argv[1:]
settings = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0}
ask = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    name: str
    size: int


answer = litellm.completion(messages=ask, **settings)
assert answer.choices[0].message.content == "Paris is the capital of France."

parts = litellm.completion(messages=ask, stream=True, **settings)
assert "".join(part.choices[0].delta.content or "" for part in parts) == "Paris is the capital of France."

formed = litellm.completion(messages=ask, response_format=City, max_tokens=400, **settings)
City.model_validate_json(formed.choices[0].message.content)

tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
rain = [{"role": "user", "content": "Weather in Rome?"}]
called = litellm.completion(messages=rain, tools=[tool], **settings)
[call] = called.choices[0].message.tool_calls
assert json.loads(call.function.arguments) == {"city": "Rome"}

del settings["temperature"]
vectors = litellm.embedding(input=["one", "two"], encoding_format="float", **settings)
assert len(vectors.data) == 2

settings["model"] = f"text-completion-openai/{model}"
text = litellm.text_completion(prompt="Once", max_tokens=3, **settings)
assert text.choices[0].text
