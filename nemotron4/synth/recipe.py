"""A recipe, read strictly from TOML, and the folder that keeps it with the run it describes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemotron4 import __version__, config
from nemotron4.errors import ConfigError, DataError, unknown_name
from nemotron4.json_form import to_json
from nemotron4.records import JsonObject
from nemotron4.runs import write_json


def _check_not_negative(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= 0:  # NaN is neither
            raise ValueError(f"{name} is {getattr(settings, name)}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """One model. Prices are per million tokens, in any currency.

    form: openai (any server with /v1/chat/completions), generate (PUT /generate), local (``model`` is loaded
    into this process), fake.
    """

    url: str = ""
    model: str = "fake"
    form: Literal["openai", "generate", "fake", "local"] = "openai"
    api_key_env: str | None = None
    revision: str = ""  # part of every call's identity: change it when the server's weights change
    max_in_flight: int = 64
    requests_per_minute: int = 0  # 0: no limit but max_in_flight
    tokens_per_minute: int = 0  # prompt and new tokens together
    timeout_s: float = 600.0
    price_in: float = 0.0
    price_out: float = 0.0
    template: str = "nemotron4"  # for the form generate
    reward_form: Literal["score", "hosted"] = "score"
    extra_body: dict[str, Any] = field(default_factory=dict)
    fake_latency_ms: float = 0.0  # for the form fake

    @property
    def identity(self) -> JsonObject:
        """What of the endpoint decides a reply, besides the request."""
        return {"model": self.model, "revision": self.revision, "form": self.form}

    @property
    def sent(self) -> JsonObject:
        """What else decides its requests, where the recipe says something."""
        usual = {"extra_body": {}, "template": EndpointConfig.template}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    def __post_init__(self) -> None:
        if self.form in ("openai", "generate") and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; expected an http:// or https:// address")
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight is {self.max_in_flight}; expected 1 or more")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; expected more than 0")
        _check_not_negative(self, "requests_per_minute", "tokens_per_minute", "price_in", "price_out")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what it does (``kind``), whose rows it takes, and how it samples."""

    name: str
    kind: str
    takes: tuple[str, ...] = ()
    endpoint: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where a run stops cleanly; 0 is no limit. Money counts by the endpoints' prices."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative(self, "calls", "tokens", "money")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Patience: attempts of one call, repairs of one unusable reply, seconds without any success.

    A call that fails ``max_attempts`` times for reasons that may pass, while its endpoint answers others, is
    left pending for the next start; with ``fail_transient`` it is a failure. When more than
    ``max_failure_share`` of a stage's work fails (of 20 pieces or more), the run stops.
    """

    max_attempts: int = 8
    max_repairs: int = 2
    first_wait_s: float = 0.5
    max_wait_s: float = 60.0
    max_outage_s: float = 120.0
    max_failure_share: float = 0.5
    fail_transient: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_failure_share <= 1:
            raise ValueError(f"max_failure_share is {self.max_failure_share}; expected in (0, 1]")
        if self.max_attempts < 1 or self.max_repairs < 0:
            raise ValueError("max_attempts must be 1 or more, max_repairs 0 or more")
        _check_not_negative(self, "first_wait_s", "max_wait_s", "max_outage_s")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which stages' rows go into which file. ``licence`` and ``sources`` are printed on the data card."""

    sft: tuple[str, ...] = ()
    preference: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    records: tuple[str, ...] = ()  # rows of any type, by columns
    licence: str = "unspecified"
    sources: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        return (*self.sft, *self.preference, *self.prompts, *self.records)


@dataclass(frozen=True, kw_only=True)
class SynthRecipe:
    """Everything a run depends on, except the models themselves."""

    name: str
    stage: tuple[StageConfig, ...]
    endpoint: dict[str, EndpointConfig] = field(default_factory=dict)
    seed: int = 0
    prompts: Path | None = None  # a TOML file that replaces prompt texts
    durable: Literal["power_loss", "kill"] = "power_loss"
    budget: Budget = field(default_factory=Budget)
    retry: RetryConfig = field(default_factory=RetryConfig)
    # Rows that a stage is to make: the run ends when every stage named here has that many.
    target: dict[str, int] = field(default_factory=dict)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        names: list[str] = []
        for stage in self.stage:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name!r}")
            if len(set(stage.takes)) < len(stage.takes):
                raise ValueError(f"stage {stage.name!r} takes a stage twice")
            for upstream in stage.takes:
                if upstream not in names:
                    message, hint = unknown_name("stage", upstream, names)
                    raise ValueError(f"stage {stage.name!r} takes {message}; it must be above ({hint})")
            if stage.endpoint is not None and stage.endpoint not in self.endpoint:
                message, hint = unknown_name("endpoint", stage.endpoint, self.endpoint)
                raise ValueError(f"stage {stage.name!r}: {message} ({hint})")
            names.append(stage.name)
        for name in (*self.export.stages, *self.target):
            if name not in names:
                message, hint = unknown_name("stage", name, names)
                raise ValueError(
                    f"{'export' if name in self.export.stages else 'target'}: {message} ({hint})"
                )
        for name, number in self.target.items():
            if number < 1:
                raise ValueError(f"target.{name} is {number}; expected 1 or more")

    def consumers(self, name: str) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stage if name in stage.takes)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> SynthRecipe:
    """Read a recipe; paths inside it count from the working folder."""
    recipe = config.load(SynthRecipe, path, overrides)
    if not recipe.stage:
        raise ConfigError(f"{path}: the recipe has no stage", hint="add a [[stage]] table")
    return recipe


LEDGER = "ledger.sqlite"
RECIPE = "recipe.json"


def save_recipe(folder: Path, recipe: SynthRecipe, shard: tuple[int, int] = (0, 1)) -> None:
    """The resolved recipe, the program's version and commit, and the shard, next to the data they made."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {
        "version": __version__, "commit": _commit(), "shard": list(shard), "recipe": to_json(recipe),
    }  # fmt: skip
    write_json(folder / RECIPE, value)


def load_saved_recipe(folder: Path) -> SynthRecipe:
    """The recipe of an existing run."""
    return config.build(SynthRecipe, _saved(folder)["recipe"])


def load_saved_shard(folder: Path) -> tuple[int, int] | None:
    """(index, number) of the shard that a run is; None where an earlier version did not write it."""
    found = _saved(folder).get("shard")
    return None if found is None else (found[0], found[1])


def _saved(folder: Path) -> JsonObject:
    path = folder / RECIPE
    try:
        value: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", hint="name the folder given to `synth run --out`"
        ) from error
    return value


def _commit() -> str | None:
    """The commit of the program's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
