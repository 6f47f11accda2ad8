"""Chat models behind ``PUT /generate``, the server that Nemotron-4-340B-Instruct was released with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemotron4.client.http import HttpEndpoint
from nemotron4.client.interface import BadContentError, HopelessError, Reply, Sampling, TextLogprob
from nemotron4.client.thoughts import without_thoughts
from nemotron4.engine import Reward
from nemotron4.records import JsonObject, Message
from nemotron4.text.prompt import format_named

# What the model card's client sends; a chat answer never contains them.
CARD_END_STRINGS = ("<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User")
_SHOWN_STOPS = ("<extra_id_1>User", "<extra_id_1>", "\x11", "<|endoftext|>", "</s>")


class GenerateChatModel:
    """``template`` names the prompt format in which messages are written; the card's is nemotron4."""

    def __init__(
        self,
        base_url: str,
        *,
        template: str = "nemotron4",
        name: str = "generate",
        end_strings: Sequence[str] = CARD_END_STRINGS,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = name
        self._endpoint = HttpEndpoint(base_url, timeout_s=timeout_s)
        self._format = format_named(template)
        self._end_strings = tuple(end_strings)

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        return {"model": self.name, **self._body(self._format.render(messages), sampling)}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        return without_thoughts(await self.complete(self._format.render(messages), sampling))

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        answer = await self._put(self._body(prompt, sampling))
        sentence = answer["sentences"][0]
        if not sentence.startswith(prompt):
            wrong = BadContentError("sentences[0] does not start with the prompt", kind="prompt_echo")
            wrong.paid_tokens = (0, 0)
            raise wrong
        text, stopped = self._without_stop(sentence[len(prompt) :], sampling.stop)
        # The server pads a finished row with the end token and reports neither counts nor reason.
        ended = stopped or str((answer.get("tokens") or [[""]])[0][-1]) in ("</s>", "<|endoftext|>")
        return Reply(text=text, finish_reason="stop" if ended else "length", model=self.name)

    async def continuation_logprobs(self, prompt: str, continuation: str) -> tuple[TextLogprob, ...]:
        body = self._body(prompt + continuation, Sampling(max_tokens=1)) | {"compute_logprob": True}
        answer = await self._put(body)
        shorter = await self._put(self._body(prompt, Sampling(max_tokens=1)))
        start = len(shorter["token_ids"][0]) - 1
        ids = answer["token_ids"][0]
        if ids[:start] != shorter["token_ids"][0][:start]:
            raise BadContentError("prompt and continuation share a token", kind="token_boundary")
        tokens, values = answer["tokens"][0], answer["logprob"][0]
        # Entry j of logprob belongs to token j + 1; the last token is the generated one.
        return tuple(TextLogprob(tokens[j], values[j - 1]) for j in range(start, len(ids) - 1))

    async def score(self, messages: Sequence[Message]) -> Reward:
        raise HopelessError("PUT /generate does not score conversations", kind="unsupported")

    async def close(self) -> None:
        await self._endpoint.close()

    def _body(self, prompt: str, sampling: Sampling) -> JsonObject:
        if sampling.top_logprobs:
            raise HopelessError("PUT /generate has no alternatives per token", kind="unsupported")
        return {
            "sentences": [prompt],
            "tokens_to_generate": sampling.max_tokens,
            "temperature": sampling.temperature or 1.0,
            "greedy": sampling.temperature == 0,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "repetition_penalty": 1.0,
            "min_tokens_to_generate": 1,
            "add_BOS": False,
            "end_strings": [*self._end_strings, *sampling.stop],
            "random_seed": sampling.seed,
        }

    async def _put(self, body: JsonObject) -> Any:
        answer = await self._endpoint.request("PUT", "/generate", body)
        if isinstance(answer, str):  # a refusal comes as a JSON string with status 200
            raise HopelessError(f"{self._endpoint.base_url}/generate refused: {answer}", kind="bad_request")
        try:
            answer["sentences"][0], answer["token_ids"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise BadContentError(
                "the answer of /generate lacks sentences or token_ids", kind="missing_field"
            ) from error
        return answer

    def _without_stop(self, text: str, stops: Sequence[str]) -> tuple[str, bool]:
        for stop in (*_SHOWN_STOPS, *stops):
            if text.endswith(stop):
                return text.removesuffix(stop).removesuffix("\n"), True
        return text, False
