"""What a recipe trains on: its shape, and its rows as samples, read and checked before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import ConfigError, unknown_name
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import PRESETS
from nemotron4.training import data
from nemotron4.training.formats import ALL_ATTRIBUTES, Kind, TextRow
from nemotron4.training.packing import Sample
from nemotron4.training.reading import Problem, read_rows, refuse_too_many
from nemotron4.training.recipe import Recipe, RewardSection


@dataclass(frozen=True)
class Data:
    """What the recipe's files hold, read and checked before anything trains."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    problems: Sequence[Problem]
    source_sizes: tuple[int, ...] = ()
    share_left_out: float = 0.0  # of the training rows


def model_config(recipe: Recipe, base: Checkpoint) -> ModelConfig:
    """The shape to train: the checkpoint's, or the preset's with the tokenizer's vocabulary."""
    if recipe.model.preset is None:
        config = base.config
    elif recipe.model.preset not in PRESETS:
        message, hint = unknown_name("preset", recipe.model.preset, PRESETS)
        raise ConfigError(message, hint=hint)
    else:
        config = PRESETS[recipe.model.preset]()
        needed = base.tokenizer().vocab_size
        if config.vocab_size < needed:
            config = _changed(config, vocab_size=-(-needed // 64) * 64)
    if recipe.stage == "reward":
        return _changed(config, num_reward_attributes=len(ALL_ATTRIBUTES))
    return config


def _changed(config: ModelConfig, **values: Any) -> ModelConfig:
    return ModelConfig(**{**config.__dict__, **values})


def row_kind(recipe: Recipe) -> Kind:
    if recipe.stage == "preference":
        return "kto" if recipe.preference and recipe.preference.loss == "kto" else "preference"
    if recipe.stage == "reward":
        objective = (recipe.reward or RewardSection()).objective
        return "reward" if objective == "regression" else "reward_pairs"
    if recipe.stage == "policy-gradient":
        return "prompts"
    is_weighted = recipe.steerlm is not None and recipe.steerlm.objective == "weighted"
    return "steerlm_weighted" if is_weighted else recipe.stage


def build_encoder(recipe: Recipe, base: Checkpoint, config: ModelConfig) -> data.Encoder:
    if recipe.data.max_length > config.context_length:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}; the model's context is {config.context_length}"
        )
    virtual: tuple[int, ...] = ()
    if recipe.adapter is not None and recipe.adapter.kind == "p_tuning":
        virtual = tuple(range(config.vocab_size, config.vocab_size + recipe.adapter.num_virtual_tokens))
    return data.Encoder(
        base.tokenizer(),
        base.prompt_format(),
        recipe.data.max_length,
        recipe.data.over_long,
        base.bos_token_id if base.adds_bos else None,
        virtual,
        recipe.batch.row_tokens,
    )


def read_data(recipe: Recipe, encoder: data.Encoder) -> Data:
    """Every row read and encoded; DataError if more rows are bad than the recipe allows."""
    if recipe.stage == "pretrain":
        return _read_texts(recipe, encoder)
    train, problems, total = _read_samples(recipe, encoder, recipe.data.train)
    refuse_too_many(problems, total, recipe.data.max_bad_rows)
    share = len(problems) / total if total else 0.0
    validation, more, total = _read_samples(recipe, encoder, recipe.data.validation)
    refuse_too_many(more, total, recipe.data.max_bad_rows)
    return Data(train, validation, [*problems, *more], share_left_out=share)


def _read_samples(
    recipe: Recipe, encoder: data.Encoder, paths: Sequence[Path]
) -> tuple[list[Sample], list[Problem], int]:
    kind = row_kind(recipe)
    rows, problems = read_rows(paths, kind)
    total = len(rows) + len(problems)
    if kind == "kto":
        samples, more = data.judged_samples(rows, encoder)
        return samples, [*problems, *more], total
    samples, more = data.build_samples(rows, encoder, sample_builder(recipe, encoder))
    return samples, [*problems, *more], total


def sample_builder(recipe: Recipe, encoder: data.Encoder) -> data.Build:
    """How one row of the recipe's stage becomes a sample."""
    if recipe.stage == "preference":
        needs = recipe.preference is not None and recipe.preference.loss == "rpo"
        return data.pair_sample(encoder, needs_rewards=needs)
    if recipe.stage == "reward":
        settings = recipe.reward or RewardSection()
        if settings.objective == "regression":
            return data.scored_sample(encoder, ALL_ATTRIBUTES, trained=settings.attributes)
        needs = settings.objective != "bradley_terry"
        return data.reward_pair_sample(encoder, needs_strength=needs)
    if recipe.policy_gradient is not None:
        rewards = recipe.policy_gradient.rewards
        return data.prompt_sample(
            encoder,
            num_new=recipe.policy_gradient.max_new_tokens,
            needs_messages=any(reward.needs_messages for reward in rewards),
            row_fields=[name for reward in rewards for name in reward.row_fields],
        )
    if recipe.steerlm is not None and recipe.steerlm.objective == "weighted":
        return data.weighted_sample(encoder)
    return data.sft_sample(encoder)


def _read_texts(recipe: Recipe, encoder: data.Encoder) -> Data:
    separator = encoder.tokenizer.eos_id if encoder.tokenizer.bos_id is None else encoder.tokenizer.bos_id
    if separator is None:
        raise ConfigError("the tokenizer has neither BOS nor EOS to stand between documents")
    problems: list[Problem] = []

    def windows(path: Path) -> data.TextWindows:
        rows, bad = read_rows([path], "pretrain")
        refuse_too_many(bad, len(rows) + len(bad), recipe.data.max_bad_rows)
        problems.extend(bad)
        texts = [read.row.text for read in rows if isinstance(read.row, TextRow)]
        ids = [encoder.tokenizer.encode(text, parse_special=False) for text in texts]
        return data.TextWindows(ids, separator, recipe.data.max_length, encoder.virtual_ids)

    train = [windows(path) for path in recipe.data.train]
    validation = [windows(path) for path in recipe.data.validation]
    return Data(
        data.ConcatDataset(train), data.ConcatDataset(validation), problems, tuple(len(w) for w in train)
    )
