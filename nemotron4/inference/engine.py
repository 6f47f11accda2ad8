"""``Engine``: prompts in, generations out. What ``nemotron4.load`` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.errors import ConfigError, RequestError, unknown_name
from nemotron4.inference.core import EngineCore
from nemotron4.inference.runner import StepRunner
from nemotron4.records import FieldError, Generation, Message
from nemotron4.text.answers import chat_request, encode_text, finished, samples, text_request
from nemotron4.text.messages import read_messages
from nemotron4.text.structured_output import json_schema

if TYPE_CHECKING:
    import torch

# A text, its token ids, or a conversation (rendered in the model's own format).
Prompt = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]
Reload = Callable[[StepRunner, "Mapping[str, torch.Tensor]"], StepRunner]
NAMED_APART = {"stop_strings": "stop", "full_logprobs": "logprobs"}
NAMED_APART |= dict.fromkeys(("prompt_logprobs", "prompt_logprobs_from"), "score()")


class Engine(EngineCore):
    """A loaded model, for any thread and, through ``stream``, for asyncio. Close it or use ``with``."""

    def __init__(self, *arguments: Any, reload: Reload | None = None, **more: Any) -> None:
        """``reload``: from the model that runs and changed tensors to the next one."""
        super().__init__(*arguments, **more)
        self._reload = reload

    def replace_weights(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Answer by these tensors from now on. Blocks until the requests that run have finished."""
        if self._reload is None:
            raise ConfigError("this engine's weights cannot be exchanged", hint="load a model by its name")
        self.exchange(self._reload(self._runner, changed))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        n: int = 1,
        logprobs: int | None = None,
        schema: Mapping[str, Any] | str | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Generate ``n`` texts for one prompt or each of several; temperature 0 is greedy.

        The result has the prompts' order, the ``n`` samples of one prompt side by side. Text ends before the
        stop string or stop token; ``token_ids`` contain it. ``sampling`` takes the other fields of
        SamplingParams. Texts that end by "stop" are JSON that fits ``schema``, a JSON schema; other forms are
        a ``grammar``, made by ``text.structured_output``. Equal seed and prompt give equal tokens whatever
        else runs; without a seed each sample draws its own, else sample ``i`` has ``derive_seed(seed, i)``.
        """
        for name in sampling.keys() & NAMED_APART.keys():
            raise RequestError(f"{name} is no setting of generate()", hint=f"use {NAMED_APART[name]}")
        for name in sampling.keys() - SamplingParams.__dataclass_fields__.keys():
            message, hint = unknown_name("setting", name, SamplingParams.__dataclass_fields__)
            raise RequestError(message, hint=hint)
        if schema is not None:
            sampling["grammar"] = json_schema(schema)
        if n < 1:
            raise RequestError(f"n is {n}; expected 1 or more")
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
            **sampling,
        )
        requests = [self.request(prompt, params) for prompt in _several(prompts)]
        return self.generate_each([sample for request in requests for sample in samples(request, n)])

    def generate_each(
        self,
        requests: Sequence[SamplingRequest],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """One generation for each request, in order; see ``collect``."""
        results = self.collect(requests, on_progress=on_progress)
        return [finished(self.tokenizer, *each) for each in zip(requests, results, strict=True)]

    def score(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[list[float]]:
        """Log-probability (nats) of each token after the first, of each text or row of ids."""
        if (texts is None) == (token_ids is None):
            raise RequestError("score() takes either texts or token_ids")
        texts = (texts,) if isinstance(texts, str) else texts or ()
        rows = [*(encode_text(self, text) for text in texts), *(token_ids or ())]
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        results = self.collect([SamplingRequest(tuple(row), params) for row in rows])
        return [[p.chosen.logprob for p in steps[0].prompt_logprobs or ()] for steps in results]

    def request(self, prompt: Prompt, params: SamplingParams) -> SamplingRequest:
        """Text is taken as it is, markers included; messages are rendered."""
        if isinstance(prompt, str):
            return text_request(self, prompt, params)
        if not isinstance(prompt, Sequence):
            raise RequestError(f"a prompt is {prompt!r:.60}; expected a text, token ids or messages")
        if prompt and not isinstance(prompt[0], Message | Mapping):
            return text_request(self, [_token_id(each) for each in prompt], params)
        if not prompt:
            raise RequestError("the prompt is empty", hint="give a text, token ids or messages")
        try:
            messages = read_messages(list(prompt), "messages")
        except FieldError as error:
            raise RequestError(str(error)) from error
        return chat_request(self, messages, params)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """One prompt is one prompt: a text, a list of ids, or a list of messages."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return [prompts]
    return [prompts] if prompts and isinstance(prompts[0], int | Message | Mapping) else prompts


def _token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            f"a prompt holds {value!r:.60}; expected a text, token ids or messages",
            hint="several prompts are a list of texts, of id lists or of message lists",
        )
    return value
