"""How answers are drawn and judged: the settings that policy gradients and online preference pairs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from nemotron4.errors import ConfigError

RewardKind = Literal["reward_model", "http", "genrm", "python", "gsm8k", "boxed", "pattern", "instructions"]
AdvantageKind = Literal["group", "centred", "leave_one_out", "batch"]
Ratio = Literal["token", "sequence"]
LossOver = Literal["tokens", "answers", "sums"]
# What each kind of judge cannot do without; only these kinds take it.
NEEDED_SETTINGS = {
    "reward_model": ("model",),
    "http": ("url",),
    "genrm": ("url", "model"),
    "python": ("path",),
    "pattern": ("pattern",),
}
# What only these kinds read.
OPTIONAL_SETTINGS = {
    "api_key_env": ("http", "genrm"),
    "attribute": ("reward_model", "http"),
    "answer_field": ("gsm8k", "boxed"),
    "timeout_s": ("python",),
    "prompt": ("genrm",),
    "max_tokens": ("genrm",),
}
PREVIOUS = "previous"  # in a chain: the last reward model before this stage


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One judge of answers. With several, the reward is the sum of ``weight * (value - shift)``.

    gsm8k and boxed compare with the prompt row's field ``answer_field``; instructions reads the row's
    ``instruction_id_list`` and ``kwargs``, as IFEval has them; pattern is a regular expression that the
    whole answer must match; python is a function of the user's; genrm asks a chat model for a rating. With
    ``gate`` the judges form a chain: an answer worth less than it is not shown to those after this one.
    """

    kind: RewardKind
    weight: float = 1.0
    shift: float = 0.0
    gate: float | None = None
    model: str | None = None  # reward_model: a checkpoint; genrm: the name at the endpoint
    url: str | None = None
    api_key_env: str | None = None  # http and genrm: the environment variable that holds the key
    attribute: str = "scalar"  # reward_model and http: the weighted sum, or one attribute's name
    pattern: str | None = None
    answer_field: str = "answer"
    path: str | None = None  # python: FILE.py:FUNCTION
    timeout_s: float = 60.0  # python: for one batch of answers
    prompt: str | None = None  # genrm: a file with the judge's prompt; {prompt}, {answer} and row fields
    max_tokens: int = 1024  # genrm: of its judgment

    def __post_init__(self) -> None:
        needed = NEEDED_SETTINGS.get(self.kind, ())
        for name in sorted({name for names in NEEDED_SETTINGS.values() for name in names}):
            if (getattr(self, name) is None) == (name in needed):
                problem = "is missing" if name in needed else "has no meaning"
                raise ConfigError(f"reward of kind {self.kind!r}: {name} {problem}")
        for name, kinds in OPTIONAL_SETTINGS.items():
            if self.kind not in kinds and getattr(self, name) != getattr(RewardSource, name):
                raise ConfigError(f"reward of kind {self.kind!r}: {name} has no meaning")
        if self.weight == 0 and self.gate is None:
            raise ConfigError(f"reward of kind {self.kind!r}: weight is 0, so it would judge nothing")
        if self.timeout_s <= 0:
            raise ConfigError(
                f"reward of kind {self.kind!r}: timeout_s is {self.timeout_s}; expected above 0"
            )

    @property
    def row_fields(self) -> tuple[str, ...]:
        """Fields that every prompt row must have."""
        if self.kind in ("gsm8k", "boxed"):
            return (self.answer_field,)
        return ("instruction_id_list", "kwargs") if self.kind == "instructions" else ()

    @property
    def needs_messages(self) -> bool:
        """True for judges that read a conversation: a prompt given as rendered text has none."""
        return self.kind in ("reward_model", "http", "genrm")


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """One step: answers to ``num_prompts`` prompts, rewards, updates of ``batch.global_size`` samples."""

    table: ClassVar[str] = "preference.rollouts"
    fewest_answers: ClassVar[int] = 2  # to one prompt

    rewards: tuple[RewardSource, ...]
    num_prompts: int = 64
    group_size: int = 8  # answers to each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    unfinished: Literal["leave_out", "judge"] = "leave_out"  # answers that reach max_new_tokens
    inner_epochs: int = 1  # how often a step's answers are gone through
    servers: tuple[str, ...] = ()  # nemotron4 serve --take-weights; empty: this process writes the answers
    server_key_env: str = "NEMOTRON4_API_KEY"  # the environment variable that holds their key
    max_staleness: int = 0  # servers: steps by which the weights that answer may be behind
    importance_cap: float = 2.0  # servers: of new / old probability of a token, which weighs its gradient
    max_resamples: int = 0  # further draws of prompts, until num_prompts of them have answers that differ

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError(f"{self.table}.rewards names no judge")
        if self.group_size < self.fewest_answers:
            raise ConfigError(f"{self.table}.group_size is {self.group_size}; expected 2 or more")
        for name, least in (
            ("num_prompts", 1),
            ("max_new_tokens", 1),
            ("inner_epochs", 1),
            ("max_staleness", 0),
            ("max_resamples", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{self.table}.{name} is {getattr(self, name)}; expected {least} or more")
        if self.max_staleness and (not self.servers or self.max_resamples):
            raise ConfigError(f"{self.table}.max_staleness needs servers, and max_resamples = 0")
        if self.servers and self.temperature != 1:
            raise ConfigError(f"{self.table}.servers need temperature 1, at which probabilities compare")
        if self.importance_cap <= 0:
            raise ConfigError(f"{self.table}.importance_cap is {self.importance_cap}; expected more than 0")
        if self.temperature <= 0:
            raise ConfigError(
                f"{self.table}.temperature is {self.temperature}; expected more than 0",
                hint="greedy answers to one prompt are all equal",
            )


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """PPO's value model: a decoder with one output per token, trained with the policy."""

    start: str | None = None  # a reward model or a language model; None: model.start
    learning_rate: float = 9e-6
    value_clip: float = 0.2


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSection(RolloutSection):
    """One step: answers to ``num_prompts`` prompts, rewards, then updates of ``batch.global_size`` answers.

    reinforce has NeMo-Aligner's leave-one-out baseline, and its KL is part of the reward, as in ppo; in grpo
    it is a term of the loss. The defaults are NeMo-Aligner's where it has the setting.
    """

    table: ClassVar[str] = "policy_gradient"
    fewest_answers: ClassVar[int] = 1

    algorithm: Literal["ppo", "reinforce", "grpo"]
    kl_coefficient: float = 0.01
    absolute_kl: bool = True  # ppo, reinforce: |log-ratio| of each token instead of the log-ratio
    kl_over: Literal["tokens", "sums"] = "tokens"  # reinforce: an answer's mean KL, or its sum
    kl_estimator: Literal["k2", "k3"] = "k3"  # grpo
    clip_low: float = 0.2
    clip_high: float = 0.2
    advantage: AdvantageKind | Literal["auto"] = "auto"  # grpo: group, reinforce: leave_one_out
    ratio: Ratio = "token"  # grpo; sequence: the geometric mean over the answer (GSPO)
    loss_over: LossOver = "tokens"  # mean over tokens; over answers of each one's mean or its sum
    entropy_bonus: float = 0.0
    discount: float = 1.0  # ppo, as the next two
    gae_decay: float = 0.95
    normalise_advantages: bool = True
    critic: CriticSection = field(default_factory=CriticSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm != "ppo" and self.group_size < 2:
            raise ConfigError(
                f"policy_gradient.group_size is {self.group_size}; {self.algorithm} needs 2 or more"
            )
        for name in ("kl_coefficient", "clip_low", "clip_high", "entropy_bonus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy_gradient.{name} is {getattr(self, name)}; expected 0 or more")
        unused = {
            "ppo": ("advantage", "ratio", "kl_over", "kl_estimator", "max_resamples"),
            "reinforce": ("ratio", "kl_estimator"),
            "grpo": ("kl_over",),
        }
        for name in unused[self.algorithm]:
            if getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"policy_gradient.{name} has no meaning for {self.algorithm}")

    @property
    def has_critic(self) -> bool:
        return self.algorithm == "ppo"

    @property
    def advantage_kind(self) -> AdvantageKind:
        if self.advantage == "auto":
            return "group" if self.algorithm == "grpo" else "leave_one_out"
        return self.advantage
