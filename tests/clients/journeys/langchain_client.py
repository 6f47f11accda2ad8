"""langchain-openai: eight journeys, with the three ways of ``with_structured_output`` and an agent."""

import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url, model = sys.argv[1:]
settings = {"base_url": url, "api_key": "none", "model": model, "temperature": 0}
chat = ChatOpenAI(**settings)


class City(BaseModel):
    """A city."""

    name: str
    size: int


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"20 degrees in {city}"


assert chat.invoke("What is the capital of France?").content == "Paris is the capital of France."

assert "".join(part.content for part in chat.stream("The capital of France?")).startswith("Paris is")

assert [answer.content[:5] for answer in chat.batch(["France?", "And France?"])] == ["Paris", "Paris"]

for method in ("json_schema", "function_calling"):
    formed = ChatOpenAI(**settings, max_tokens=400).with_structured_output(City, method=method)
    assert isinstance(formed.invoke("Which city?"), City), method
formed = ChatOpenAI(**settings, max_tokens=400).with_structured_output(None, method="json_mode")
assert isinstance(formed.invoke("Answer in JSON: which city?"), dict)

called = chat.bind_tools([get_weather]).invoke("Weather in Rome?")
assert called.tool_calls[0]["args"] == {"city": "Rome"}

agent = create_agent(chat, [get_weather])
turns = agent.invoke({"messages": [{"role": "user", "content": "Weather in Rome?"}]})["messages"]
assert [turn.type for turn in turns] == ["human", "ai", "tool", "ai"]
assert turns[-1].content == "It is 20 C in Rome."

# Without the flag the ids of OpenAI's own vocabulary would be sent.
vectors = OpenAIEmbeddings(base_url=url, api_key="none", model=model, check_embedding_ctx_length=False)
assert len(vectors.embed_documents(["one", "two"])) == 2

assert OpenAI(base_url=url, api_key="none", model=model, max_tokens=4).invoke("Once")
