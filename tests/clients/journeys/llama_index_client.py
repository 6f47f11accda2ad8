"""llama-index with its OpenAILike classes: six journeys."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, model = sys.argv[1:]
settings = {"model": model, "api_base": url, "api_key": "none", "temperature": 0, "context_window": 4096}
chat = OpenAILike(**settings, is_chat_model=True, is_function_calling_model=True, max_tokens=400)


class City(BaseModel):
    """A city."""

    name: str
    size: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"20 degrees in {city}"


ask = [ChatMessage(role="user", content="What is the capital of France?")]
assert chat.chat(ask).message.content == "Paris is the capital of France."

assert "".join(part.delta or "" for part in chat.stream_chat(ask)) == "Paris is the capital of France."

text = OpenAILike(**settings, is_chat_model=False, max_tokens=4)
assert text.complete("Once").text

assert isinstance(chat.as_structured_llm(City).chat(ask).raw, City)

weather = FunctionTool.from_defaults(get_weather)
called = chat.chat_with_tools([weather], user_msg="Weather in Rome?")
[call] = chat.get_tool_calls_from_response(called)
assert call.tool_kwargs == {"city": "Rome"}
assert "20 degrees in Rome" in str(chat.predict_and_call([weather], user_msg="Weather in Rome?"))

vectors = OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none")
assert len(vectors.get_text_embedding_batch(["one", "two"])) == 2
