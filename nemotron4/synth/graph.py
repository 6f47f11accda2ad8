"""A recipe made ready to run: its stages with kinds, typed knobs and configuration hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron4 import config
from nemotron4.client import Sampling
from nemotron4.errors import ConfigError, RequestError, unknown_name
from nemotron4.json_form import to_json
from nemotron4.records import JsonObject
from nemotron4.synth.recipe import StageConfig, SynthRecipe
from nemotron4.synth.rows import digest
from nemotron4.synth.stage import Kind, PromptBook


@dataclass(frozen=True)
class PreparedStage:
    """One stage of a run. ``cfg`` changes when anything that decides its rows changes."""

    config: StageConfig
    kind: Kind
    knobs: Any
    sampling: Sampling | None
    endpoints: tuple[str, ...]
    consumers: tuple[str, ...]
    makes: type
    cfg: bytes

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_source(self) -> bool:
        return self.kind.roots is not None

    @property
    def is_barrier(self) -> bool:
        return self.kind.decide is not None or self.kind.decide_by_vector is not None


@dataclass(frozen=True)
class Pipeline:
    """A checked recipe. ``notes`` say what is no mistake, but perhaps not meant."""

    recipe: SynthRecipe
    stages: tuple[PreparedStage, ...]
    prompts: PromptBook
    notes: tuple[str, ...] = ()


def build_graph(
    recipe: SynthRecipe, kinds: Mapping[str, Kind], prompts: PromptBook
) -> tuple[PreparedStage, ...]:
    """The stages in the recipe's order; every mismatch between them is a ConfigError that names the stage."""
    identities = {name: endpoint.identity | endpoint.sent for name, endpoint in recipe.endpoint.items()}
    made: dict[str, type] = {}
    stages: list[PreparedStage] = []
    for entry in recipe.stage:
        kind = kinds.get(entry.kind)
        if kind is None:
            message, hint = unknown_name("kind of stage", entry.kind, kinds)
            raise ConfigError(f"stage {entry.name!r}: {message}", hint=hint)
        _check_inputs(entry, kind, made)
        knobs = _knobs(entry, kind)
        sampling = _sampling(entry, kind)
        endpoints = _endpoints(entry, kind, knobs, recipe)
        made[entry.name] = kind.makes_by(knobs) if kind.makes_by else kind.makes or made[entry.takes[0]]
        stages.append(
            PreparedStage(
                config=entry,
                kind=kind,
                knobs=knobs,
                sampling=sampling,
                endpoints=endpoints,
                consumers=recipe.consumers(entry.name),
                makes=made[entry.name],
                cfg=_configuration(entry, kind, knobs, sampling, endpoints, prompts, identities, recipe.seed),
            )
        )
    return tuple(stages)


def _check_inputs(entry: StageConfig, kind: Kind, made: Mapping[str, type]) -> None:
    if (kind.roots is not None) != (not entry.takes):
        expected = "takes nothing" if kind.roots is not None else "must take at least one stage"
        raise ConfigError(f"stage {entry.name!r}: a stage of kind {entry.kind!r} {expected}")
    for upstream in entry.takes:
        if made[upstream] not in kind.takes:
            wanted = " or ".join(t.__name__ for t in kind.takes)
            raise ConfigError(
                f"stage {entry.name!r} ({entry.kind}) takes {wanted} rows, "
                f"but {upstream!r} makes {made[upstream].__name__} rows"
            )


def _knobs(entry: StageConfig, kind: Kind) -> Any:
    try:
        knobs: Any = config.build(kind.knobs, entry.knobs)
        for field in dataclasses.fields(knobs):
            _check_number(field, getattr(knobs, field.name))
        return knobs
    except ConfigError as error:
        text = error.message.removeprefix("settings: ").removeprefix("settings")
        raise ConfigError(f"stage {entry.name!r} ({entry.kind}): {text}", hint=error.hint) from error


def _check_number(field: dataclasses.Field[Any], value: Any) -> None:
    """ConfigError for a number that no stage can work with: it would fail every row, after it was paid."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if field.name == "threshold" or field.name.endswith("share"):
        is_fine, expected = 0 <= value <= 1, "0 to 1"
    elif isinstance(value, int) and isinstance(field.default, int):
        # 0 is no limit where that is the default.
        least = 1 if field.default and not field.name.startswith("min_") else 0
        is_fine, expected = value >= least, f"{least} or more"
    elif field.name == "timeout_s":
        is_fine, expected = value > 0, "more than 0"
    else:
        return
    if not is_fine:
        raise ConfigError(f"{field.name} is {value}; expected {expected}")


def _sampling(entry: StageConfig, kind: Kind) -> Sampling | None:
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("temperature", entry.temperature), ("top_p", entry.top_p), ("max_tokens", entry.max_tokens),
        )
        if value is not None
    }  # fmt: skip
    if kind.sampling is None:
        if given or entry.endpoint:
            what = ", ".join([*given, *(["endpoint"] if entry.endpoint else [])])
            raise ConfigError(f"stage {entry.name!r} ({entry.kind}) makes no calls; remove {what}")
        return None
    try:
        return dataclasses.replace(kind.sampling, **given)
    except RequestError as error:
        raise ConfigError(f"stage {entry.name!r} ({entry.kind}): {error.message}") from error


def _endpoints(entry: StageConfig, kind: Kind, knobs: Any, recipe: SynthRecipe) -> tuple[str, ...]:
    if kind.sampling is None:
        return ()
    several = tuple(getattr(knobs, "endpoints", ()))
    for name in several:
        if name not in recipe.endpoint:
            message, hint = unknown_name("endpoint", name, recipe.endpoint)
            raise ConfigError(f"stage {entry.name!r}: {message}", hint=hint)
    if entry.endpoint is not None:
        return (entry.endpoint, *several)
    if several:
        return several
    if len(recipe.endpoint) == 1:
        return tuple(recipe.endpoint)
    raise ConfigError(
        f"stage {entry.name!r} ({entry.kind}) needs an endpoint",
        hint=f"endpoint = one of: {', '.join(sorted(recipe.endpoint)) or '(none is defined)'}",
    )


def _configuration(
    entry: StageConfig,
    kind: Kind,
    knobs: Any,
    sampling: Sampling | None,
    endpoints: tuple[str, ...],
    prompts: PromptBook,
    identities: Mapping[str, JsonObject],
    seed: int,
) -> bytes:
    return digest(
        "stage",
        entry.kind,
        kind.version,
        to_json(knobs),
        # What no recipe sets was not part of it from the beginning.
        None
        if sampling is None
        else {k: v for k, v in vars(sampling).items() if k not in ("schema", "choice")},
        [identities[name] for name in endpoints],
        prompts.identity(kind.prompts),
        seed,
        *([] if kind.identity is None else [kind.identity(knobs)]),
    )
