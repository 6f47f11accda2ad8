"""How a human study asks its models. The command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """``seed`` is of every random order; the rest is for models behind a server."""

    seed: int = 0
    max_tokens: int = 1024
    temperature: float = 0.0
    concurrency: int = 8
