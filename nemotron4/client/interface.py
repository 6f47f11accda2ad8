"""What a program may ask of a chat model, wherever it runs, and the three ways it can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nemotron4.engine import Reward
from nemotron4.errors import Nemotron4Error, RequestError
from nemotron4.records import JsonObject, Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one reply is drawn. Temperature 0 is greedy; ``seed`` None leaves the draw to the endpoint."""

    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 is off, and then it is not sent: OpenAI's own API has no such field
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no log-probabilities; k: of each new token and its k best rivals
    schema: JsonObject | None = (
        None  # of a JSON answer; where an endpoint cannot hold the model to it, it asks
    )

    choice: tuple[
        str, ...
    ] = ()  # the reply is one of these texts; an endpoint that knows no such field refuses

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
        )
        for is_valid, name, value, expected in checks:
            if not is_valid:
                raise RequestError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True)
class TextLogprob:
    """One token of a text with its log-probability in nats, and its most likely rivals."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


ManyLogprobs = list[tuple[TextLogprob, ...]]  # of several texts, token by token


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. Token counts are None where the endpoint does not report them.

    ``text`` is the answer alone, empty where there is none; ``thoughts`` is what a reasoning model wrote
    before it.
    """

    text: str
    finish_reason: str  # stop, length, or the endpoint's own word
    model: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: tuple[TextLogprob, ...] | None = None
    thoughts: str | None = None


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A text as a vector, of the length that the model gives it."""

    vector: tuple[float, ...]
    prompt_tokens: int | None = None


class ChatModel(Protocol):
    """A model behind any interface. Safe to use from any number of tasks of one event loop."""

    @property
    def name(self) -> str: ...

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        """Exactly what ``chat`` sends: the model's name, the messages or the prompt, the sampling values.

        Equal requests are equal objects, so a hash of this is the identity of a call.
        """
        ...

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply: ...

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        """Continue a raw text: no template is applied."""
        ...

    async def continuation_logprobs(self, prompt: str, continuations: Sequence[str]) -> ManyLogprobs:
        """Log-probability of each token of each of ``continuations`` after ``prompt``."""
        ...

    async def score(self, messages: Sequence[Message]) -> Reward:
        """Ask a reward model about a conversation that ends with an assistant message."""
        ...

    async def embed(self, text: str) -> Embedding:
        """Ask an embedding model about a text."""
        ...

    async def close(self) -> None: ...


class ClientError(Nemotron4Error):
    """A call failed. ``kind`` is a short stable name for counting; ``status`` the HTTP status if any.

    ``paid_tokens``: (prompt, new) tokens of an answer that came and has to be paid although it cannot be
    used, 0 where they are not told; None where no answer came.
    """

    def __init__(
        self, message: str, *, kind: str, status: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.status = status
        self.paid_tokens: tuple[int, int] | None = None


TransientKind = Literal["rate_limit", "server_error", "timeout", "connection", "quota"]
HopelessKind = Literal[
    "bad_request", "unauthorized", "not_found", "context_length", "unsupported", "content_filter"
]


class TransientError(ClientError):
    """The same call may succeed later. ``retry_after_s`` is what the endpoint asked for.

    The kind ``quota`` (nothing left to spend) needs a person first: nobody repeats such a call by himself.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: TransientKind,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, kind=kind, status=status)
        self.retry_after_s = retry_after_s


class HopelessError(ClientError):
    """The same call will fail again: bad request, wrong key, unknown model, prompt too long."""

    def __init__(
        self, message: str, *, kind: HopelessKind, status: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, kind=kind, status=status, hint=hint)


class BadContentError(ClientError):
    """A reply arrived and cannot be used: not JSON, a field missing, an empty answer, a wrong form."""
