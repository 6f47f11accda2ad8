"""The prompt format of a checkpoint: its own chat template, or the model card's for Nemotron models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemotron4.checkpoint.turns import template_ends

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


def prompt_format(template: str | None, *, is_nemotron: bool) -> PromptFormat | None:
    """None for a model that is neither Nemotron nor ships a template."""
    from nemotron4.text import prompt

    if template is not None:
        name = "chatml" if "<|im_start|>" in template else "nemotron4" if is_nemotron else "checkpoint"
        return prompt.PromptFormat(name=name, template=template, stop_strings=template_ends(template))
    return prompt.NEMOTRON4 if is_nemotron else None


def missing_template_note(path: Path, template: str | None, *, is_nemotron: bool) -> tuple[str, ...]:
    if template is not None or not is_nemotron:
        return ()
    return (f"{path} has no chat template: conversations use the prompt format of the Nemotron-4 model card",)
