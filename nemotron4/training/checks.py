"""All stages of a chain looked at before the first step: files, rows, lengths of the run, memory, layout."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import CheckpointError, ConfigError, Nemotron4Error
from nemotron4.model.adapters import add_adapter, quantize_frozen
from nemotron4.model.config import ModelConfig
from nemotron4.model.quantized_weight import quantized_weights
from nemotron4.model.transformer import Transformer
from nemotron4.training import inputs, pipeline, sharded
from nemotron4.training.indexed import IndexedCorpus, is_corpus
from nemotron4.training.inputs import Data
from nemotron4.training.loading import check_adapter
from nemotron4.training.metrics import products_note
from nemotron4.training.optimizer import MOMENT_BYTES, OFFLOADED_BYTES
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.reading import HUB, files_of
from nemotron4.training.recipe import Recipe
from nemotron4.training.rewards import check_judges
from nemotron4.training.rollout_settings import PolicyGradientSection
from nemotron4.training.run import pick_device
from nemotron4.training.schedule import Plan, plan_steps


@dataclass(frozen=True)
class Checked:
    """One stage. Without ``base`` its start is not here, and its shape alone was checked."""

    recipe: Recipe
    config: ModelConfig
    base: Checkpoint | None
    read: Data | None
    plan: Plan | None
    weights_bytes: int  # of one process
    optimizer_bytes: int
    notes: tuple[str, ...]


def check(stages: Sequence[Recipe], *, by_shape: bool = False) -> list[Checked]:
    """Every stage, or the first error with the stage's place.

    A stage that starts from an earlier one is checked with that one's tokenizer and shape. ``by_shape``: a
    start that is not here is replaced by its preset, and its rows are not read.
    """
    found: list[Checked] = []
    made: dict[str, Checked] = {}
    for place, recipe in enumerate(stages):
        try:
            found.append(_check(recipe, made, by_shape))
        except Nemotron4Error as error:
            if len(stages) > 1:
                error.message = f"stage {place + 1} of {len(stages)}: {error.message}"
            raise
        made[str(recipe.output_folder)] = found[-1]
    return found


def _check(recipe: Recipe, made: dict[str, Checked], by_shape: bool) -> Checked:
    earlier = made.get(recipe.model.start or "")
    base: Checkpoint | None
    try:
        base = copy.copy(earlier.base) if earlier is not None else inputs.open_start(recipe)
        if earlier is not None and base is not None:
            inputs.choose_format(recipe, base)
    except CheckpointError:
        if not by_shape or (recipe.model.shape or recipe.model.preset) is None:
            raise
        base = None
    if base is None:
        config = earlier.config if earlier else inputs.shape_config(recipe)
        read, plan, notes = None, None, _missing(recipe)
    else:
        config = inputs.model_config(recipe, base)
        read = inputs.read_data(recipe, inputs.build_encoder(recipe, base, config))
        plan = plan_steps(recipe, len(read.train))
        device = pick_device(recipe.model.device)
        notes = [*read.ignored, *plan.notes, *products_note(recipe.model.compute, device)]
        notes += _offloaded(recipe, config, device, by_shape=by_shape)
        check_adapter(recipe, base, config)
        check_judges(recipe, made)
    if isinstance(recipe.settings, PreferenceSection):
        notes += recipe.settings.notes
    if recipe.samples is not None and base is not None:
        files_of(recipe.samples.prompts)
    if recipe.parallel.tensor > 1:
        sharded.check_divisible(config, recipe.parallel.tensor)
    if recipe.parallel.pipeline > 1:
        pipeline.check_divisible(config, recipe.parallel.pipeline)
    weights, optimizer = memory(recipe, config)
    if not by_shape:
        _refuse_too_large(recipe, weights + optimizer)
    return Checked(recipe, config, base, read, plan, weights, optimizer, tuple(notes))


def _offloaded(recipe: Recipe, config: ModelConfig, device: torch.device, *, by_shape: bool) -> list[str]:
    """What offloaded moments take where they are; ConfigError before a run that has no GPU to spare."""
    if recipe.optimizer.moments != "offloaded":
        return []
    problem = "optimizer.moments = offloaded needs a GPU: on a processor they are in main memory anyway"
    if device.type == "cpu" and not by_shape:
        raise ConfigError(problem, hint='leave it out, or use optimizer.moments = "8bit"')
    size = OFFLOADED_BYTES * trainable_parameters(recipe, config)
    taken = f"{size / 1e9:.2f} GB of main memory hold the moments and a copy of what trains"
    return [taken, *([problem] if device.type == "cpu" else [])]


def memory(recipe: Recipe, config: ModelConfig) -> tuple[int, int]:
    """Bytes of weights, and of gradients and AdamW's moments, on one process.

    With the frozen reference and the critic of a stage that draws answers; a critic counts as the policy.
    """
    wide = 2 if recipe.model.compute == "bfloat16" else 4
    trained = trainable_parameters(recipe, config)
    frozen = codes = 0
    if recipe.adapter is not None:
        net = _adapted(recipe, config)
        frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
        codes = sum(b.nbytes for weight in quantized_weights(net).values() for b in weight.buffers())
    rollouts = recipe.kind.rollouts(recipe.settings)
    if rollouts is not None and recipe.adapter is None and bool(getattr(rollouts, "kl_coefficient", True)):
        frozen += config.num_parameters
    if isinstance(rollouts, PolicyGradientSection) and rollouts.has_critic:
        trained += config.num_parameters
    shards = recipe.parallel.num_processes // recipe.parallel.replicas
    # One process keeps the 16-bit copies of what trains; several gather them block by block.
    copies = 2 * trained if wide == 2 and recipe.parallel.num_processes == 1 else 0
    state = int((4 + MOMENT_BYTES[recipe.optimizer.moments]) * trained)  # the gradient is float32
    return copies + (4 * trained + wide * frozen + codes) // shards, state // shards


def trainable_parameters(recipe: Recipe, config: ModelConfig) -> int:
    """How many numbers have a gradient: all, or the adapter's."""
    if recipe.adapter is None:
        return config.num_parameters
    return sum(p.numel() for p in _adapted(recipe, config).parameters() if p.requires_grad)


def _adapted(recipe: Recipe, config: ModelConfig) -> Transformer:
    """The model with its adapter, on the meta device."""
    assert recipe.adapter is not None, "asked for runs that have one"
    with torch.device("meta"):
        net = Transformer(config)
        add_adapter(net, recipe.adapter, seed=0)
        if recipe.model.quantize is not None:
            quantize_frozen(net, recipe.model.quantize)
    return net


def _refuse_too_large(recipe: Recipe, needed: int) -> None:
    """ConfigError for a run that cannot fit: weights, gradients and moments alone are more than there is."""
    if pick_device(recipe.model.device).type == "cuda":
        there = torch.cuda.mem_get_info()[1]
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    if needed > there:
        raise ConfigError(
            f"weights, gradients and moments need {needed / 1e9:.1f} GB on each process, and there are "
            f"{there / 1e9:.1f} GB",
            hint="use more processes ([parallel]), an [adapter], or a smaller model",
        )


def _missing(recipe: Recipe) -> list[str]:
    """What could not be looked at."""
    name = recipe.model.start or recipe.model.tokenizer
    notes = [f"{name} is not here: checked with the shape {recipe.model.shape or recipe.model.preset}"]
    for source in (source for group in recipe.data.sources for source in group):
        try:
            if is_corpus(source.path):
                IndexedCorpus(source.path)
            elif not source.path.startswith(HUB):
                files_of(source.path)
        except Nemotron4Error:
            notes.append(f"{source.path} is not here: its rows are not checked")
    return notes
