"""The reward model behind the server: packed passes over many conversations, each read at its last token.

Shape suffixes: N = packed positions of all conversations, D = hidden size.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import load_weights
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.engine import ChatFormat, EngineStats, ModelInfo, Reward, SamplingParams, Tokenizer, TokenStep
from nemotron4.errors import CheckpointError, EngineBusyError, Nemotron4Error, RequestError
from nemotron4.inference.load import checked, describe, find_device
from nemotron4.inference.precision import find_dtype
from nemotron4.inference.shared_rows import PackedRows
from nemotron4.model.attention import RotaryEmbedding
from nemotron4.model.reward_head import ATTRIBUTE_NAMES, CARD_WEIGHTS, RewardModel
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.text.prompt import encode_judged

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class _Row:
    """One conversation that waits for its scores; a cancelled one is passed over."""

    ids: Sequence[int]
    reward: Future[Reward] = field(default_factory=Future)


class RewardEngine:
    """Implements ``InferenceEngine``, whose ``stream`` refuses, and ``RewardScorer``.

    One thread owns the model. It takes what waits, in the order of arrival, up to BATCH_TOKENS at a time,
    whoever asked for it. There is no padding, and a prompt that several answers have is computed once.
    """

    def __init__(
        self,
        model: RewardModel,
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompt_format: ChatFormat | None = None,
        *,
        max_waiting: int = 1024,
    ) -> None:
        if model.config.num_reward_attributes != len(ATTRIBUTE_NAMES):
            raise CheckpointError(
                f"{info.name}: the reward head has {model.config.num_reward_attributes} outputs; "
                f"expected {len(ATTRIBUTE_NAMES)} ({', '.join(ATTRIBUTE_NAMES)})"
            )
        self.model = model
        self.info = replace(info, vocab_size=min(info.vocab_size, tokenizer.vocab_size))
        self.tokenizer = tokenizer
        self.prompt_format: ChatFormat | None = None
        self._format = prompt_format
        self._max_waiting = max_waiting
        self._rows: deque[_Row] = deque()
        self._has_work = threading.Condition()
        self._is_closing = False
        self._num_running = self._num_tokens = self._num_finished = 0
        self._thread = threading.Thread(target=self._loop, name="nemotron4-reward", daemon=True)
        self._thread.start()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._num_running,
            max_running=0,
            num_waiting=len(self._rows),
            max_waiting=self._max_waiting,
            cache_blocks_used=0,
            cache_blocks_total=0,
            prompt_tokens_total=self._num_tokens,
            prompt_tokens_reused_total=0,
            generated_tokens_total=0,
            requests_finished_total=self._num_finished,
            preemptions_total=0,
        )

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
        raise RequestError(
            f"{self.info.name} is a reward model, which writes no text", hint="use POST /score"
        )

    def close(self) -> None:
        """Rows that wait end with an error."""
        with self._has_work:
            self._is_closing = True
            self._has_work.notify()
        self._thread.join()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """What is read of one conversation; RequestError if it does not fit the context."""
        ids = encode_judged(self.tokenizer, self._format, messages)
        if len(ids) > self.info.context_length:
            raise RequestError(
                f"the conversation has {len(ids)} tokens; expected 1 to {self.info.context_length}"
            )
        return ids

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Reward]:
        return self.score_ids([encode_judged(self.tokenizer, self._format, each) for each in conversations])

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        return [row.reward.result() for row in self._submit(rows)]

    async def score_async(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        """See ``RewardScorer``."""
        with self._has_work:
            num_waiting = len(self._rows)
        if len(rows) > self._max_waiting:
            raise RequestError(
                f"the request has {len(rows)} conversations; the queue holds {self._max_waiting}",
                hint="send fewer at a time",
            )
        if num_waiting + len(rows) > self._max_waiting:
            raise EngineBusyError(
                f"{num_waiting} conversations are waiting; the queue holds {self._max_waiting}",
                retry_after_s=1.0,
            )
        waiting = self._submit(rows)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(row.reward) for row in waiting)))
        finally:
            for row in waiting:
                row.reward.cancel()

    def _submit(self, rows: Sequence[Sequence[int]]) -> list[_Row]:
        limit, size = self.info.context_length, self.info.vocab_size
        for place, ids in enumerate(rows):
            if not ids or len(ids) > limit:
                raise RequestError(
                    f"conversation {place} has {len(ids)} tokens; expected 1 to {limit}",
                    hint="the scores are read at the last token, so a conversation is never cut",
                )
            if not all(0 <= token_id < size for token_id in ids):
                raise RequestError(f"conversation {place} has a token id outside 0 to {size - 1}")
        waiting = [_Row(ids) for ids in rows]
        with self._has_work:
            if self._is_closing:
                raise RequestError("the engine is closed")
            self._rows.extend(waiting)
            self._has_work.notify()
        return waiting

    # -- for the engine's own thread -----------------------------------------------------------------------

    def _loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                rewards = self._forward([row.ids for row in batch])
            except Exception as error:  # a batch that cannot be computed must not end the engine
                for row in batch:
                    row.reward.set_exception(Nemotron4Error(f"this batch could not be computed: {error}"))
                continue
            self._num_tokens += sum(len(row.ids) for row in batch)
            self._num_finished += len(batch)
            for row, reward in zip(batch, rewards, strict=True):
                row.reward.set_result(reward)

    def _next_batch(self) -> list[_Row] | None:
        """What waits, BATCH_TOKENS at most; None when the engine is closed."""
        batch: list[_Row] = []
        with self._has_work:
            self._num_running = 0
            while not batch:
                self._has_work.wait_for(lambda: self._rows or self._is_closing)
                if self._is_closing:
                    for row in self._rows:
                        with contextlib.suppress(InvalidStateError):
                            row.reward.set_exception(RequestError("the engine is closed"))
                    return None
                num_tokens = 0
                while self._rows and (not batch or num_tokens + len(self._rows[0].ids) <= BATCH_TOKENS):
                    row = self._rows.popleft()
                    if row.reward.set_running_or_notify_cancel():
                        batch.append(row)
                        num_tokens += len(row.ids)
            self._num_running = len(batch)
        return batch

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        packed = PackedRows(rows, self.model.reward_head.weight.device)
        hidden_ND = self.model.model(packed.ids_N, packed.positions_N, packed)
        scores: list[list[float]] = self.model(hidden_ND[packed.ends]).tolist()
        return [_reward(values) for values in scores]


def _reward(values: Sequence[float]) -> Reward:
    named = dict(zip(ATTRIBUTE_NAMES, values, strict=True))
    attributes = {name: named[name] for name in ATTRIBUTES}
    scalar = sum(CARD_WEIGHTS[name] * attributes[name] for name in ATTRIBUTES)
    return Reward(attributes, scalar, tuple(values))


def load_reward(
    model: str | Path | Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | None = None,
    force_adapter: bool = False,
    max_waiting: int = 1024,
) -> RewardEngine:
    """Load a reward model by name or path; CheckpointError if it has no reward head.

    ``adapter`` is the folder of a LoRA adapter that a reward stage left: it brings the head.
    """
    checkpoint = open_checkpoint(model)
    if adapter is not None:
        checkpoint = MergedCheckpoint(checkpoint, Path(adapter), force=force_adapter)
    config = checkpoint.config
    if not config.num_reward_attributes:
        raise CheckpointError(
            f"{checkpoint.path}: a language model without a reward head", hint="load it with nemotron4.load"
        )
    chosen_device = find_device(device)
    chosen_dtype = find_dtype(dtype, chosen_device)
    with torch.device("meta"):
        net = RewardModel(config)
    load_weights(net, checkpoint, dtype=chosen_dtype, device=chosen_device)
    net.reward_head.float()
    net.model.rotary = RotaryEmbedding(config).to(chosen_device)  # not in a checkpoint: computed
    net.eval().requires_grad_(False)
    tokenizer = checkpoint.tokenizer()
    info, prompt_format = checked(
        describe(checkpoint, chosen_dtype, chosen_device),
        tokenizer,
        checkpoint.prompt_format(),
    )
    return RewardEngine(net, info, tokenizer, prompt_format, max_waiting=max_waiting)
