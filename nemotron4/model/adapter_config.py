"""Which adapter a model gets: settings alone, which a recipe is checked with before PyTorch is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from nemotron4.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Codes = Literal["int8", "int4", "nf4"]  # of frozen weights: ``quantized_weight``
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP), "qkv": ATTENTION[:3]}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which adapter, how large, where. ``targets``: linear layers, or groups (attention, mlp, all, qkv)."""

    kind: Literal["lora", "p_tuning", "bottleneck"]
    rank: int = 32  # inner width of lora and bottleneck
    alpha: float | None = None  # lora: the update is scaled by alpha / rank; None is alpha = rank
    dropout: float = 0.0  # lora: on the adapter's input
    targets: tuple[str, ...] = ("qkv",)
    # lora: other ranks and alphas by the end of a module's name, a regular expression, as PEFT has them.
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False  # lora: scaled by alpha / sqrt(rank) (Kalajdzievski 2023)
    use_dora: bool = False  # lora: the direction of each row and its length train apart (Liu et al. 2024)
    modules_to_save: tuple[str, ...] = ()  # lora: modules that train whole and are kept with the adapter
    # On a start with an adapter: one LoRA of both (of compose_rank if given), a list, or that one trains on.
    compose: Literal["merge", "stack", "continue"] = "merge"
    compose_rank: int | None = None
    num_virtual_tokens: int = 10  # p_tuning
    encoder_hidden_size: int = 1024  # p_tuning

    def __post_init__(self) -> None:
        for name in ("rank", "num_virtual_tokens", "encoder_hidden_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"adapter {name} is {getattr(self, name)}; expected 1 or more")
        has_patterns = bool(self.rank_pattern or self.alpha_pattern)
        if self.kind != "lora" and (has_patterns or self.use_rslora or self.use_dora or self.modules_to_save):
            raise ConfigError(f"patterns, use_rslora, use_dora and modules_to_save: not for {self.kind}")
        _check_pattern("rank_pattern", self.rank_pattern, least=1)
        _check_pattern("alpha_pattern", self.alpha_pattern, least=None)
        if self.compose_rank is not None and (self.compose_rank < 1 or self.compose != "merge"):
            raise ConfigError(
                f"adapter compose_rank is {self.compose_rank}; expected 1 or more, with compose = 'merge'"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter dropout is {self.dropout}; expected in [0, 1)")

    def of(self, module: str) -> AdapterConfig:
        """As it is for one module: the first pattern that its name ends with counts."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return replace(
            self,
            rank=_matched(self.rank_pattern, module, self.rank),
            alpha=_matched(self.alpha_pattern, module, alpha),
            rank_pattern={},
            alpha_pattern={},
        )

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.use_rslora else self.rank))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Module names, groups resolved, each once."""
        names = [name for target in self.targets for name in GROUPS.get(target, (target,))]
        return tuple(dict.fromkeys(names))


def _matched(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """As PEFT's ``get_pattern_key`` finds it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_pattern(name: str, pattern: Mapping[str, float], *, least: int | None) -> None:
    for key, value in pattern.items():
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ConfigError(f"adapter {name}: {key!r} is no regular expression: {error}") from error
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if least is not None and not (is_whole and value >= least):
            raise ConfigError(f"adapter {name}: {key!r} is {value!r}; expected a whole number from {least}")
        if not is_whole and not isinstance(value, float):
            raise ConfigError(f"adapter {name}: {key!r} is {value!r}; expected a number")
