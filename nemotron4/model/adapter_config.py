"""Which adapter a model gets: settings alone, which a recipe is checked with before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemotron4.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Codes = Literal["int8", "int4", "nf4"]  # of frozen weights: ``quantized_weight``
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP), "qkv": ATTENTION[:3]}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which adapter, how large, where. ``targets``: linear layers, or groups (attention, mlp, all, qkv)."""

    kind: Literal["lora", "p_tuning", "bottleneck"]
    rank: int = 32  # inner width of lora and bottleneck
    alpha: float | None = None  # lora: the update is scaled by alpha / rank; None is alpha = rank
    dropout: float = 0.0  # lora: on the adapter's input
    targets: tuple[str, ...] = ("qkv",)
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
        if self.kind != "lora" and (self.use_rslora or self.use_dora or self.modules_to_save):
            raise ConfigError(f"use_rslora, use_dora and modules_to_save have no meaning for {self.kind}")
        if self.compose_rank is not None and (self.compose_rank < 1 or self.compose != "merge"):
            raise ConfigError(
                f"adapter compose_rank is {self.compose_rank}; expected 1 or more, with compose = 'merge'"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter dropout is {self.dropout}; expected in [0, 1)")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.use_rslora else self.rank))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Module names, groups resolved, each once."""
        names = [name for target in self.targets for name in GROUPS.get(target, (target,))]
        return tuple(dict.fromkeys(names))
