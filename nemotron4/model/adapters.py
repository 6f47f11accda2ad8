"""Small trainable parts next to frozen weights: LoRA, P-tuning and bottleneck adapters.

Each replaces a leaf module by a subclass that keeps the leaf's weight under its old name, so the base
model's state dict does not change. Freshly initialised, each adds exactly zero (P-tuning adds a prompt).

Shape suffixes: V = vocabulary, D = hidden size, P = virtual tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron4.errors import ConfigError
from nemotron4.model.adapter_config import GROUPS, AdapterConfig, Codes
from nemotron4.model.quantized_weight import CodedWeight, QuantizedLinear


class LoraLinear(nn.Linear):
    """y = W x + (alpha / rank) B A x; A xavier-normal, B zero (Hu et al. 2021; NeMo's defaults)."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        _adopt(self, base)
        device, dtype = base.weight.device, base.weight.dtype
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=dtype)
        self.scale = config.scale
        self.dropout = config.dropout
        self.is_enabled = True
        self.quantized: CodedWeight | None = None  # in place of the weight
        self.lora_magnitude_vector: nn.Parameter | None
        self.register_parameter("lora_magnitude_vector", None)
        if config.use_dora:
            length = torch.empty(base.out_features, device=device, dtype=dtype)
            self.lora_magnitude_vector = nn.Parameter(length)

    def forward(self, x: Tensor) -> Tensor:
        y = self._plain(x)
        if not self.is_enabled:
            return y
        dropped = functional.dropout(x, self.dropout) if self.dropout and self.training else x
        update: Tensor = self.scale * self.lora_B(self.lora_A(dropped))
        if self.lora_magnitude_vector is None:
            return y + update
        # Row lengths of the whole weight count as constants in the gradient, as in the paper's section 4.3.
        factor = self.lora_magnitude_vector / self._summed().detach().norm(dim=1).to(y.dtype)
        plain = functional.linear(dropped, self.weight)
        changed: Tensor = (factor - 1) * plain + factor * update
        return y + changed

    def _plain(self, x: Tensor) -> Tensor:
        if self.quantized is None:
            return functional.linear(x, self.weight, self.bias)
        y: Tensor = self.quantized(x)
        return y if self.bias is None else y + self.bias

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.xavier_normal_(self.lora_A.weight, generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        # On the meta device the weight is not known yet; whoever fills it fills the lengths.
        if self.lora_magnitude_vector is not None and self.weight.device.type != "meta":
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self.weight.float().norm(dim=1))

    def _summed(self) -> Tensor:
        """W + scale B A, the product accumulated in float32."""
        update: Tensor = self.lora_B.weight.float() @ self.lora_A.weight.float()
        weight = self.weight if self.quantized is None else self.quantized.whole(torch.float32)
        return weight.float() + self.scale * update


class BottleneckLinear(nn.Linear):
    """y + U silu(D LN(y)) after a linear layer's own y; D xavier-normal, U zero (NeMo's "adapter" scheme)."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        _adopt(self, base)
        device, dtype = base.weight.device, base.weight.dtype
        size = base.out_features
        self.adapter_norm = nn.LayerNorm(size, eps=1e-5, device=device, dtype=dtype)
        self.adapter_down = nn.Linear(size, config.rank, bias=False, device=device, dtype=dtype)
        self.adapter_up = nn.Linear(config.rank, size, bias=False, device=device, dtype=dtype)
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if not self.is_enabled:
            return y
        update: Tensor = self.adapter_up(functional.silu(self.adapter_down(self.adapter_norm(y))))
        return y + update

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.adapter_norm.weight)
        nn.init.zeros_(self.adapter_norm.bias)
        nn.init.xavier_normal_(self.adapter_down.weight, generator=generator)
        nn.init.zeros_(self.adapter_up.weight)


class PromptEmbedding(nn.Embedding):
    """Token ids from the vocabulary's size upwards are virtual tokens, encoded as NeMo's P-tuning does:

    embedding -> Linear -> tanh-GELU -> Linear. A prompt starts with ids V, V+1, ..., V+P-1.
    For inference ``table`` alone is kept (``freeze_table``).
    """

    def __init__(self, base: nn.Embedding, config: AdapterConfig) -> None:
        _adopt(self, base)
        device, dtype = base.weight.device, base.weight.dtype
        self.num_virtual_tokens = config.num_virtual_tokens
        size = config.encoder_hidden_size
        self.prompt_embedding = nn.Embedding(config.num_virtual_tokens, size, device=device, dtype=dtype)
        self.prompt_first = nn.Linear(size, size, device=device, dtype=dtype)
        self.prompt_second = nn.Linear(size, base.embedding_dim, device=device, dtype=dtype)
        self.is_enabled = True

    def table(self) -> Tensor:
        """The virtual tokens' embeddings, (P, D)."""
        inner = functional.gelu(self.prompt_first(self.prompt_embedding.weight), approximate="tanh")
        table_PD: Tensor = self.prompt_second(inner)
        return table_PD

    def forward(self, tokens: Tensor) -> Tensor:
        return _embed_with_table(tokens, self.weight, self.table())

    def initialise(self, generator: torch.Generator) -> None:
        for module in (self.prompt_embedding, self.prompt_first, self.prompt_second):
            nn.init.normal_(module.weight, std=0.023, generator=generator)
        for linear in (self.prompt_first, self.prompt_second):
            nn.init.zeros_(linear.bias)


class PromptTableEmbedding(nn.Embedding):
    """The same ids with the finished table: what inference loads."""

    def __init__(self, base: nn.Embedding, table_PD: Tensor) -> None:
        _adopt(self, base)
        self.prompt_table = nn.Parameter(table_PD.to(base.weight), requires_grad=False)
        self.num_virtual_tokens = table_PD.shape[0]
        self.is_enabled = True

    def forward(self, tokens: Tensor) -> Tensor:
        return _embed_with_table(tokens, self.weight, self.prompt_table)


def _embed_with_table(tokens: Tensor, weight_VD: Tensor, table_PD: Tensor) -> Tensor:
    vocab_size = weight_VD.shape[0]
    is_virtual = tokens >= vocab_size
    real = functional.embedding(tokens.masked_fill(is_virtual, 0), weight_VD)
    virtual = functional.embedding((tokens - vocab_size).clamp(min=0), table_PD)
    return torch.where(is_virtual[..., None], virtual, real)


def _adopt(new: nn.Module, base: nn.Module) -> None:
    """Give ``new`` everything ``base`` has (parameters shared, not copied) without initialising it again."""
    nn.Module.__init__(new)
    names = ("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx")
    for name in (*names, "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        if hasattr(base, name):
            setattr(new, name, getattr(base, name))
    for name in ("weight", "bias"):
        if name in base._parameters:
            new.register_parameter(name, base._parameters[name])


Adapted = LoraLinear | BottleneckLinear | PromptEmbedding | PromptTableEmbedding
ADAPTED_TYPES = (LoraLinear, BottleneckLinear, PromptEmbedding, PromptTableEmbedding)


def add_adapter(model: nn.Module, config: AdapterConfig, *, seed: int) -> None:
    """Freeze the model, put the adapter in, and initialise it. ConfigError if no module matches."""
    model.requires_grad_(False)
    if config.kind == "p_tuning":
        names = {"embed_tokens"}
    elif config.kind == "bottleneck":
        names = {"o_proj", "down_proj"}
    else:
        names = set(config.target_names)
    generator = torch.Generator().manual_seed(seed)
    found: set[str] = set()
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if name not in names or not isinstance(child, nn.Linear | nn.Embedding):
                continue
            if config.kind == "lora" and isinstance(child, nn.Embedding):
                continue
            adapted = _adapted(child, config.of(f"{path}.{name}" if path else name))
            if child.weight.device.type != "meta":
                adapted.initialise(generator)
            setattr(parent, name, adapted)
            found.add(name)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in config.modules_to_save:
            module.requires_grad_(True)
    unknown = [name for name in config.targets if name not in GROUPS and name not in found]
    if not found or (config.kind == "lora" and unknown):
        present = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ConfigError(
            f"adapter targets {', '.join(unknown or sorted(names))} match no linear layer of the model",
            hint=f"linear layers: {', '.join(present)}; groups: {', '.join(GROUPS)}",
        )


def quantize_frozen(model: nn.Module, kind: Codes) -> None:
    """Put codes in place of the blocks' frozen weights, unfilled: for an adapted model on the meta device."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if not isinstance(child, nn.Linear) or name == "lm_head" or isinstance(owner, LoraLinear):
                continue
            if isinstance(child, LoraLinear):
                with torch.device(child.weight.device):
                    child.quantized = CodedWeight(child.out_features, child.in_features, kind)
                child.register_parameter("weight", None)
            elif not child.weight.requires_grad:
                setattr(owner, name, QuantizedLinear(child, kind))


def _adapted(
    child: nn.Linear | nn.Embedding, config: AdapterConfig
) -> LoraLinear | BottleneckLinear | PromptEmbedding:
    if isinstance(child, nn.Embedding):
        return PromptEmbedding(child, config)
    return LoraLinear(child, config) if config.kind == "lora" else BottleneckLinear(child, config)


@torch.no_grad()
def fresh_adapter(model: nn.Module, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The values that ``add_adapter`` gives, tensor by tensor, for an adapted model on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in adapted_modules(model).items():
        assert not isinstance(module, PromptTableEmbedding), "it is for inference"
        for part in module.children():
            part.to_empty(device="cpu")
        module.initialise(generator)
        for key, parameter in module.named_parameters():
            if key not in ("weight", "bias") and parameter.device.type != "meta":
                yield f"{name}.{key}", parameter
        module.to("meta")


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Every replaced module by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ADAPTED_TYPES)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, which is the reference policy of preference training with adapters."""
    modules = list(adapted_modules(model).values())
    for module in modules:
        module.is_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.is_enabled = True
