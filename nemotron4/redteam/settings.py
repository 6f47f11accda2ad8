"""What each kind of attack asks and how answers are drawn. The command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ClassifierForm = Literal["chat", "raw"]
Method = Literal["pair", "tap", "crescendo"]


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """garak. These are its own defaults, but for ``max_tokens`` (150)."""

    generations: int = 5
    max_prompts: int = 256  # of one probe; some probes take no notice
    max_tokens: int = 256
    temperature: float = 0.7
    concurrency: int = 4
    seed: int = 1
    is_online: bool = False


@dataclass(frozen=True, kw_only=True)
class AegisSettings:
    """``form``: the question as a chat message, or as the raw prompt of AEGIS' own classifiers."""

    max_tokens: int = 512
    temperature: float = 0.0
    concurrency: int = 8
    form: ClassifierForm = "chat"
    max_failures: int | None = None  # prompts without an answer that a report may have; None: all but one


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    max_tokens: int = 512
    temperature: float = 0.0
    concurrency: int = 4
    max_failures: int | None = None
