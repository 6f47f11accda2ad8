"""What every engine offers: our own, vLLM, and the fake that ships for tests. No tensor, no torch.

A server or a client knows an engine only by this file. A request goes in as token ids and
``SamplingParams``; it comes back as a stream of ``TokenStep`` (one per new token), the last of which
carries a finish reason. Text is the tokenizer's business, except for stop strings, which the engine
must test while it generates.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from nemotron4.errors import RequestError
from nemotron4.records import Message
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The result depends on these and the prompt, never on other requests.

    Filters apply in this order: logit bias, minimum tokens, repetition / presence / frequency penalty,
    temperature, top-k (ties kept), top-p (crossing token kept), min-p.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 is greedy: argmax, the filters below are ignored, the penalties are not
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # sign-aware: divides positive logits, multiplies negative ones
    presence_penalty: float = 0.0  # over generated tokens only, as in the OpenAI API
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0  # until then the ids of ``min_tokens_masks`` cannot be drawn
    stop_token_ids: frozenset[int] = frozenset()  # the token stays in ``token_ids``
    min_tokens_masks: frozenset[int] = frozenset()  # usually the end-of-text ids
    stop_strings: tuple[str, ...] = ()
    stop_scope: Literal["new_text", "row_suffix"] = "new_text"
    # new_text: the first occurrence anywhere in the new text stops (OpenAI). row_suffix: prompt + new text
    # must end with the string right after a token (NeMo); an empty string then stops after one token.
    seed: int | None = None  # None draws a fresh seed from the system
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k most likely
    prompt_logprobs: int | None = None  # the same for each prompt token after the first
    full_logprobs: bool = False  # the whole vocabulary per position (NeMo's all_probs)

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "0 or more"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]"),
            (self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "0 or more"),
            (self.seed is None or self.seed >= 0, "seed", self.seed, "None or 0 and more"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None or 0 and more"),
        )
        for is_valid, name, value, expected in checks:
            if not is_valid:
                raise RequestError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True)
class TokenLogprob:
    """Raw model log-probability (temperature 1, before every filter), in nats."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities at one position: the token that stands there, the most likely ones, or all."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()  # most likely first
    full: Sequence[float] | None = None  # index = token id


@dataclass(frozen=True)
class TokenStep:
    """One new token of one request.

    ``token_id`` is None only in a step that carries nothing but the finish reason
    (``max_new_tokens`` 0, or an abort).
    """

    token_id: int | None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None  # in the first step only; entry 0 is token 1
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that matched


@dataclass(frozen=True)
class ModelInfo:
    """What a server tells about the model it serves."""

    name: str
    context_length: int  # prompt and new tokens together
    vocab_size: int
    num_parameters: int
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]  # end-of-text and end-of-turn ids of the checkpoint's generation config
    adds_bos: bool = False  # the model expects BOS before a raw text
    notes: tuple[str, ...] = ()  # assumptions made where the checkpoint is silent, a sentence each


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and progress lines. Counters only grow."""

    num_running: int
    num_waiting: int
    max_waiting: int
    cache_blocks_used: int
    cache_blocks_total: int
    prompt_tokens_total: int
    prompt_tokens_reused_total: int  # found in the prefix cache
    generated_tokens_total: int
    requests_finished_total: int
    preemptions_total: int


class InferenceEngine(Protocol):
    """A model that is loaded and can generate. Safe to use from any number of asyncio tasks."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prompt_format(self) -> PromptFormat | None:
        """How the model's own chat turns are written; None for a model that has no chat template."""
        ...

    def stats(self) -> EngineStats: ...

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        """Generate for one prompt. Closing the iterator early cancels the request and frees its memory.

        Raises RequestError before the first step if the request can never be served (empty prompt, id
        outside the vocabulary, prompt + max_new_tokens above the context length), EngineBusyError if the
        queue is full.
        """
        ...

    def close(self) -> None:
        """Stop the engine; requests in flight end with finish reason ``abort``."""
        ...


@runtime_checkable
class CanFail(Protocol):
    """An engine with processes of its own, which may end while the server still stands."""

    @property
    def failure(self) -> str | None:
        """Why no request can be served any more, or None."""
        ...


@dataclass(frozen=True)
class Reward:
    """What a reward model says of the last answer of a conversation; the values are unbounded."""

    raw: tuple[float, ...]  # every output, in the head's order
    attributes: Mapping[str, float]  # the five named ones
    scalar: float  # their weighted sum


@runtime_checkable
class RewardScorer(Protocol):
    """An engine that judges conversations instead of continuing them; its ``stream`` refuses."""

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Reward]:
        """One reward for each conversation, which ends with the answer to judge. Blocks.

        Raises RequestError for one that does not fit the context: it is never cut.
        """
        ...

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        """The same for token ids that are read as they are, at the last one."""
        ...
