"""The reward model behind the server: one pass over each conversation, read at its last token.

Shape suffixes: B = conversations, T = positions, D = hidden size, A = attributes.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import load_weights
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.engine import ChatFormat, EngineStats, ModelInfo, Reward, SamplingParams, Tokenizer, TokenStep
from nemotron4.errors import CheckpointError, RequestError
from nemotron4.inference.load import checked, describe, find_device
from nemotron4.inference.precision import find_dtype
from nemotron4.model.attention import CausalAttend, RotaryEmbedding
from nemotron4.model.reward_head import ATTRIBUTE_NAMES, CARD_WEIGHTS, RewardModel
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.text.prompt import encode_judged

BATCH_TOKENS = 8192


class RewardEngine:
    """Implements ``InferenceEngine``, whose ``stream`` refuses, and ``RewardScorer``."""

    def __init__(
        self,
        model: RewardModel,
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompt_format: ChatFormat | None = None,
    ) -> None:
        if model.config.num_reward_attributes != len(ATTRIBUTE_NAMES):
            raise CheckpointError(
                f"{info.name}: the reward head has {model.config.num_reward_attributes} outputs; "
                f"expected {len(ATTRIBUTE_NAMES)} ({', '.join(ATTRIBUTE_NAMES)})"
            )
        self._model = model
        self._info = info
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._lock = threading.Lock()
        self._num_waiting = self._num_tokens = self._num_finished = 0

    @property
    def model(self) -> RewardModel:
        return self._model

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def prompt_format(self) -> ChatFormat | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=int(self._lock.locked()),
            max_running=1,
            num_waiting=self._num_waiting,
            max_waiting=0,
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
            f"{self._info.name} is a reward model, which writes no text", hint="use POST /score"
        )

    def close(self) -> None:
        """Nothing runs between calls."""

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Reward]:
        return self.score_ids([self._ids(turns) for turns in conversations])

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """What ``score_ids`` reads of one conversation; RequestError if it does not fit the context."""
        ids = self._ids(messages)
        if len(ids) > self._info.context_length:
            raise RequestError(
                f"the conversation has {len(ids)} tokens; expected 1 to {self._info.context_length}"
            )
        return ids

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return encode_judged(self._tokenizer, self._format, messages)

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[Reward]:
        limit = self._info.context_length
        for place, ids in enumerate(rows):
            if not ids or len(ids) > limit:
                raise RequestError(
                    f"conversation {place} has {len(ids)} tokens; expected 1 to {limit}",
                    hint="the scores are read at the last token, so a conversation is never cut",
                )
        self._num_waiting += 1
        with self._lock:
            self._num_waiting -= 1
            found: list[Reward | None] = [None] * len(rows)
            for batch in _batches([len(ids) for ids in rows]):
                for place, values in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                    found[place] = _reward(values)
            self._num_tokens += sum(map(len, rows))
            self._num_finished += len(rows)
        return [reward for reward in found if reward is not None]

    @torch.inference_mode()
    def _forward(self, rows: list[Sequence[int]]) -> list[list[float]]:
        """Rows padded on the right: a causal model never looks there."""
        device = self._model.reward_head.weight.device
        longest = max(map(len, rows))
        tokens_BT = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rows], device=device)
        positions_BT = torch.arange(longest, device=device).expand_as(tokens_BT)
        hidden_BTD = self._model.model(tokens_BT, positions_BT, CausalAttend())
        last_B = torch.tensor([len(ids) - 1 for ids in rows], device=device)
        hidden_BD = hidden_BTD[torch.arange(len(rows), device=device), last_B]
        scores: list[list[float]] = self._model(hidden_BD).tolist()
        return scores


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by length, at most BATCH_TOKENS padded tokens together."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= BATCH_TOKENS:
            found[-1].append(i)
        else:
            found.append([i])
    return found


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
) -> RewardEngine:
    """Load a reward model by name or path; CheckpointError if it has no reward head.

    ``adapter`` is the folder of a LoRA adapter that a reward stage left: it brings the head.
    """
    checkpoint = open_checkpoint(model)
    if adapter is not None:
        checkpoint = MergedCheckpoint(checkpoint, Path(adapter))
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
    return RewardEngine(net, info, tokenizer, prompt_format)
