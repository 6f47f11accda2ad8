"""The prompt format of a checkpoint: its own chat template, or the model card's for Nemotron models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


def prompt_format(
    template: str | None, tokenizer: Callable[[], Tokenizer], *, is_nemotron: bool
) -> PromptFormat | None:
    """None for a model that ships no template and whose vocabulary has no turn markers."""
    from nemotron4.text import prompt

    if template is None and is_nemotron:
        return prompt.nemotron4()
    return prompt.find_format(tokenizer(), template)


def missing_template_note(path: Path, template: str | None, *, is_nemotron: bool) -> tuple[str, ...]:
    if template is not None or not is_nemotron:
        return ()
    return (f"{path} has no chat template: conversations use the prompt format of the Nemotron-4 model card",)
