"""What an operator can set about the server, and what all its routes share. Every limit has its home here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemotron4.engine import AdapterHost
from nemotron4.errors import ConfigError

if TYPE_CHECKING:  # the command line asks for the defaults before anything else is loaded
    from nemotron4.engine import InferenceEngine
    from nemotron4.server.context import Metrics
    from nemotron4.server.guard import Guard

NemoCompat = Literal["strict", "fixed"]


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """The web page. ``port`` gives it a port of its own, where ``login`` (name, password) is asked for."""

    starts_with: Literal["chat", "raw"] = "chat"
    port: int | None = None
    login: tuple[str, str] | None = None


@dataclass(frozen=True)
class RemoteServer:
    """Another server, and this process's own key for it."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url!r} is not the address of a server", hint="write http://HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server process."""

    host: str = "127.0.0.1"
    served_names: tuple[str, ...] = ()  # of the model under /v1; (): its own
    unknown_fields: Literal["warn", "refuse"] = "warn"  # of OpenAI bodies; a warning is a header
    clips_max_tokens: bool = False  # more new tokens than the context has room for are cut, not refused
    nemo_compat: NemoCompat = "strict"  # docs/serving.md, "Compatibility"
    api_keys: tuple[str, ...] = ()  # empty: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # names a loopback server answers to, besides localhost and addresses
    allowed_origins: tuple[str, ...] = ()  # of pages that may use the server (CORS); "*" is all
    tool_format: str | None = None  # how calls of tools are written; None: told by the chat template
    takes_weights: bool = False  # of a trainer, which asks for answers by them
    page: PageSettings | None = PageSettings()  # None: GET / is 404, as at NeMo
    compare_with: RemoteServer | None = None  # another server, whose model the page shows next to this one
    reward_model: RemoteServer | None = None  # a reward model's server; POST /score is passed on to it
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 60.0  # a client that sends slower than this is answered 408
    send_timeout_s: float = 120.0  # a client that reads nothing for this long is dropped
    max_full_logprob_values: int = 2**23  # all_probs: tokens times vocabulary, about 150 MB of JSON

    def __post_init__(self) -> None:
        if self.nemo_compat not in ("strict", "fixed"):
            raise ConfigError(f"nemo_compat is {self.nemo_compat!r}; expected 'strict' or 'fixed'")
        if self.unknown_fields not in ("warn", "refuse"):
            raise ConfigError(f"unknown_fields is {self.unknown_fields!r}; expected 'warn' or 'refuse'")
        if self.takes_weights and not self.api_keys:
            raise ConfigError("a server that takes weights must ask for a key", hint="set --api-key-file")
        for name in ("max_body_bytes", "body_timeout_s", "send_timeout_s", "max_full_logprob_values"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or (is_address(self.host) and _address(self.host).is_loopback)


def is_address(host: str) -> bool:
    """True for a literal IPv4 or IPv6 address."""
    try:
        _address(host)
    except ValueError:
        return False
    return True


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(host.strip("[]"))


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file: one a line; blank lines and lines that start with ``#`` do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"{path}: holds no key", hint="write one key on each line")
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or any(character.isspace() for character in key):
            raise ConfigError(f"{path}: key {number} has a space or a character outside ASCII")
    return keys


@dataclass
class Gate:
    """Lets requests in until the server drains."""

    is_draining: bool = False
    num_in_flight: int = 0


@dataclass(frozen=True)
class Service:
    """One per app."""

    engine: InferenceEngine
    settings: ServerSettings
    metrics: Metrics
    gate: Gate = field(default_factory=Gate)
    guard: Guard | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """What ``model`` may say: the names of the base, then those of the adapters."""
        return (*self.base_names, *self.adapter_names)

    @property
    def base_names(self) -> tuple[str, ...]:
        return self.settings.served_names or (self.engine.info.name,)

    def require_distinct_names(self) -> None:
        """ConfigError for an adapter with a name of the base, which no request could then reach."""
        for name in self.adapter_names:
            if name in self.base_names:
                raise ConfigError(
                    f"the model and an adapter are both called {name!r}",
                    hint="give the adapter another name, or the model one: --served-model-name NAME",
                )

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return self.engine.adapter_names if isinstance(self.engine, AdapterHost) else ()

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's ``model`` chooses."""
        return model if model in self.adapter_names else None
