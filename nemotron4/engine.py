"""What an engine is: our own, vLLM, and the fake that ships for tests. No tensor, no torch.

A request goes in as token ids and ``SamplingParams``; it comes back as a stream of ``TokenStep`` (one per new
token), the last of which carries a finish reason. ``text.answers`` makes requests of texts and texts of
steps; only stop strings are the engine's business, which must test them while it generates.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from nemotron4.errors import RequestError, raise_together
from nemotron4.json_form import require_numbers
from nemotron4.records import Generation, Message

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must be. ``text.structured_output`` makes one and follows it.

    ``source``: a JSON schema, a regular expression, a JSON list of texts, or a grammar in Lark's form or
    llama.cpp's. ``has_text``: free text is part of it, so the answer ends as any other does.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: str
    has_text: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The result depends on these and the prompt, never on other requests.

    Filters apply in this order: logit bias, minimum tokens, repetition / presence / frequency penalty,
    temperature, top-k (ties kept), top-p (crossing token kept), min-p. What a grammar excludes is left out
    before the temperature.
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
    min_new_tokens: int = 0  # until then ``min_tokens_masks`` cannot be drawn, new_text strings do not stop
    stop_token_ids: frozenset[int] = frozenset()  # the token stays in ``token_ids``
    # For ``text.answers``: none of the model's own ends; the text with what ended it; control pieces by name.
    ignore_eos: bool = False
    shows_stop: bool = False
    shows_special: bool = False
    min_tokens_masks: frozenset[int] = frozenset()  # usually the end-of-text ids
    stop_strings: tuple[str, ...] = ()
    stop_scope: Literal["new_text", "row_suffix"] = "new_text"
    # new_text: the first occurrence anywhere in the new text stops (OpenAI). row_suffix: prompt + new text
    # must end with the string right after a token (NeMo); an empty string then stops after one token.
    grammar: Grammar | None = None  # the answer fits it whole if it ends by "stop"
    seed: int | None = None  # None draws a fresh seed from the system
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k most likely
    prompt_logprobs: int | None = None  # the same for each prompt token after the first
    prompt_logprobs_from: int = 0  # so many of them are left out; what is before may come from the cache
    full_logprobs: bool = False  # the whole vocabulary per position (NeMo's all_probs)
    hidden_mean: bool = False  # an embedding of the prompt, in the last step
    adapter: str | None = None  # one that the engine has loaded next to the model; None: the model alone

    def __post_init__(self) -> None:
        require_numbers(self)
        checks = (
            (self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "0 or more"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]"),
            (self.repetition_penalty >= 1e-6, "repetition_penalty", self.repetition_penalty, "1e-6 or more"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]"),
            (self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "0 or more"),
            (self.seed is None or self.seed >= 0, "seed", self.seed, "None or 0 and more"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None or 0 and more"),
            (not self.hidden_mean or self.max_new_tokens == 0, "hidden_mean", True, "False with new tokens"),
        )
        raise_together([RequestError(f"{n} is {v}; expected {e}") for ok, n, v, e in checks if not ok])


@dataclass(frozen=True)
class SamplingRequest:
    """A prompt as token ids, and how to continue it.

    ``drops_newline``: the answer is a turn of a format that writes a newline between an answer and the marker
    of the next turn, so one at the end of an answer that stopped by itself is not part of the text.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    drops_newline: bool = False


def derive_seed(seed: int | None, *place: int) -> int | None:
    """The seed of one of several samples drawn with one seed; the first (place 0) keeps the seed itself.

    63 bits of blake2b("SEED/PLACE"). The samples of a prompt, the rows of PUT /generate and the rows of a
    file are all counted from 0; policy-gradient rollouts have three places: step, prompt and answer.
    """
    if seed is None or (place == (0,) and 0 <= seed < 2**63):
        return seed
    digest = hashlib.blake2b("/".join(map(str, (seed, *place))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class TokenLogprob:
    """Raw model log-probability (temperature 1, before every filter), in nats."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities at one position: the token there, the most likely ones, or all."""

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
    num_cached: int = 0  # in the first step: prompt tokens that were found in the prefix cache
    hidden_mean: tuple[float, ...] | None = None  # of the hidden states after the final norm, over the prompt


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
    checkpoint: str = ""  # its form, size and stored types, a sentence


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /metrics and progress lines. Counters only grow."""

    num_running: int
    max_running: int
    num_waiting: int
    max_waiting: int
    cache_blocks_used: int
    cache_blocks_total: int
    prompt_tokens_total: int
    prompt_tokens_reused_total: int  # found in the prefix cache
    generated_tokens_total: int
    requests_finished_total: int
    preemptions_total: int
    spec_decode_num_draft_tokens_total: int = 0  # guessed; of them drawn:
    spec_decode_num_accepted_tokens_total: int = 0


class Tokenizer(Protocol):
    """One vocabulary. ``decode(encode(text)) == text`` is checked when a checkpoint is opened."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a piece; a model's output may be wider (padding rows)."""
        ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that ``parse_special`` turns into one id: ``<extra_id_1>``, ``<|im_end|>``, ..."""
        ...

    @property
    def replaces_each_byte(self) -> bool:
        """True: every invalid byte decodes to one U+FFFD (SentencePiece); False: every broken character."""
        ...

    @property
    def decodes_each_token(self) -> bool:
        """True if ``token_bytes`` joined are the text; False for decoders that look at neighbours (CTC)."""
        ...

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = True,
        continues: bool = False,
        after: str = "",
        before: str = "",
    ) -> list[int]:
        """Ids of the text; no BOS or EOS is added.

        With ``parse_special`` a literal marker in the text becomes the marker's id; without, it becomes
        ordinary tokens that merely spell it. With ``continues`` the text follows other text, so that
        SentencePiece puts no word mark before it. ``after`` and ``before`` are the markers of a prompt
        between which the text is: some vocabularies put no word mark there, or let a marker take the spaces.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Control pieces give '', invalid bytes U+FFFD."""
        ...

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """What the token adds to the text, in UTF-8; a token may hold part of a character.

        With ``is_first`` no text is before it: SentencePiece drops the word mark there.
        """
        ...

    def piece(self, token_id: int) -> str:
        """The raw vocabulary entry, for display: ``▁hello``, ``<0x0A>``, ``</s>``."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of a raw vocabulary entry, or None."""
        ...

    def is_control(self, token_id: int) -> bool:
        """True for pieces that decode to nothing (``<s>``, ``</s>``, ``<pad>``)."""
        ...


class ChatFormat(Protocol):
    """How a model's chat turns are written: ``text.prompt.PromptFormat``."""

    @property
    def name(self) -> str: ...

    @property
    def template(self) -> str:
        """The same format as a Jinja chat template."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        ...

    @property
    def drops_newline(self) -> bool:
        """See ``SamplingRequest``."""
        ...

    def stop_token_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids that end an answer: the end of text, and every stop string that is one marker."""
        ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str: ...

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        """The prompt as ids, with the beginning of the answer. TemplateError for what has no form."""
        ...


class InferenceEngine(Protocol):
    """A model that is loaded and can generate. Safe to use from any number of asyncio tasks."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prompt_format(self) -> ChatFormat | None:
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
class AdapterHost(Protocol):
    """An engine that can compute each request with an adapter of its own."""

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """What ``SamplingParams.adapter`` may say."""

    def load_adapter(self, name: str, path: str) -> None:
        """A LoRA adapter of this model under a name. Blocks; raises CheckpointError and ConfigError."""

    def unload_adapter(self, name: str) -> None:
        """Requests that run with it go on."""


@runtime_checkable
class CanFail(Protocol):
    """An engine with processes of its own, which may end while the server still runs."""

    @property
    def failure(self) -> str | None:
        """Why no request can be served any more, or None."""
        ...


@dataclass(frozen=True)
class Reward:
    """What a reward model says of the last answer of a conversation; the values are unbounded.

    A remote model may send the attributes alone; weighing them is then the caller's business.
    """

    attributes: Mapping[str, float]  # the five named ones
    scalar: float | None = None  # their weighted sum
    raw: tuple[float, ...] = ()  # every output, in the head's order


@runtime_checkable
class TakesWeights(InferenceEngine, Protocol):
    """An engine whose weights a trainer may exchange."""

    def replace_weights(self, changed: Mapping[str, Any]) -> None:
        """Answer by these tensors from now on. Blocks until the requests that run have finished."""
        ...

    def generate_each(self, requests: Sequence[SamplingRequest]) -> list[Generation]:
        """One generation for each request, in order. Blocks."""
        ...


@runtime_checkable
class RewardScorer(Protocol):
    """An engine that judges conversations instead of continuing them; its ``stream`` refuses."""

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Reward]:
        """One reward for each conversation, which ends with the answer to judge. Blocks.

        Raises RequestError for one that does not fit the context: it is never cut.
        """
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """What is read of one conversation."""
        ...

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        """The same for token ids that are read as they are, at the last one."""
        ...

    async def score_async(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        """The same for a server: rows of all requests share passes, a cancelled call frees its own.

        EngineBusyError if the queue is full.
        """
        ...
