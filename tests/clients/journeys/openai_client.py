"""The official client: eight journeys. test_clients.py gives the address and the model."""

import json
import sys

import openai
from pydantic import BaseModel

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
ask = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    name: str
    size: int


assert [card.id for card in client.models.list()] == [model]

answer = client.chat.completions.create(model=model, messages=ask, temperature=0)
assert answer.choices[0].message.content == "Paris is the capital of France."

events = list(
    client.chat.completions.create(
        model=model, messages=ask, temperature=0, stream=True, stream_options={"include_usage": True}
    )
)
assert "".join(e.choices[0].delta.content or "" for e in events if e.choices).startswith("Paris is")
assert events[-1].usage.completion_tokens > 5

parsed = client.chat.completions.parse(model=model, messages=ask, response_format=City, max_tokens=400)
assert parsed.choices[0].finish_reason == "stop", parsed
assert isinstance(parsed.choices[0].message.parsed, City)

tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
turns = [{"role": "user", "content": "Weather in Rome?"}]
first = client.chat.completions.create(model=model, messages=turns, tools=[tool], temperature=0)
[call] = first.choices[0].message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
turns += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}]
last = client.chat.completions.create(model=model, messages=turns, tools=[tool], temperature=0)
assert last.choices[0].message.content == "It is 20 C in Rome."

text = client.completions.create(model=model, prompt="Once", max_tokens=3, logprobs=2)
assert len(text.choices[0].logprobs.tokens) == 3

vectors = client.embeddings.create(model=model, input=["one", "two"])
assert len(vectors.data) == 2
assert abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-5

try:
    client.chat.completions.create(model="other", messages=ask)
except openai.NotFoundError as error:
    refusal = error.message
assert "is not served here" in refusal
