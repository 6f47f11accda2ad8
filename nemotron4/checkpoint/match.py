"""Names and shapes of a checkpoint against those of a model: everything has its place. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import CheckpointError, unknown_name
from nemotron4.model.config import weight_shapes


def check_language_model(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The weights that a language model of this configuration takes, a tied one once, all of them there."""
    checkpoint.require_readable()
    shapes = weight_shapes(checkpoint.config)
    tied = configured_tie(checkpoint)
    surplus = checkpoint.tensors.keys() - shapes.keys()
    skipped = {name: reason for name in surplus if (reason := skip_reason(name, checkpoint))}
    check_shapes(shapes, checkpoint, skipped, tied)
    check_tied_values(checkpoint, tied)
    return tuple(name for name in shapes if name not in tied)


def configured_tie(checkpoint: Checkpoint) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if checkpoint.config.tie_embeddings else {}


def skip_reason(name: str, checkpoint: Checkpoint) -> str | None:
    if name.endswith("rotary_emb.inv_freq"):
        return "RoPE frequencies are computed from the configuration"
    if name in configured_tie(checkpoint):
        return f"the same weight as {configured_tie(checkpoint)[name]}"
    return None


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    skipped: Mapping[str, str],
    tied: Mapping[str, str],
) -> None:
    stored = checkpoint.tensors
    surplus = [name for name in stored if name not in wanted and name not in skipped]
    missing = [name for name in wanted if name not in stored and name not in tied]
    if missing:
        guess = unknown_name("tensor", missing[0], surplus)[1] if surplus else None
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.path}: tensor {missing[0]!r} is missing{more}", hint=guess)
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise CheckpointError(
            f"{stored[surplus[0]].file}: tensor {surplus[0]!r} has no place in the model{more}",
            hint="the configuration does not describe these weights",
        )
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].file}: tensor {name!r} has shape {list(stored[name].shape)}; "
                f"the configuration expects {list(shape)}"
            )


def check_tied_values(checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """A second copy of a tied weight must hold the same values; otherwise the configuration is wrong."""
    for name, source in tied.items():
        if name not in checkpoint.tensors:
            continue
        if not bool((checkpoint.read(name) == checkpoint.read(source)).all()):
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: tensor {name!r} differs from {source!r}, "
                "although the configuration ties them",
                hint="set tie_word_embeddings to false in config.json",
            )
