"""``nemotron4 chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.checkpoint.shipped import AUTO
from nemotron4.cli.console import note, read_line, show_notes
from nemotron4.cli.options import (
    AdapterOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    ForceAdapterOption,
    JsonSchemaOption,
    MaxTokensOption,
    ModelArgument,
    QuantizeOption,
    TemperatureOption,
    TopPOption,
)
from nemotron4.engine import SamplingParams

if TYPE_CHECKING:
    from nemotron4.engine import InferenceEngine

DEFAULTS = SamplingParams(max_new_tokens=512, temperature=0.7, top_p=0.95)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: MaxTokensOption = DEFAULTS.max_new_tokens,
    temperature: TemperatureOption = DEFAULTS.temperature,
    top_p: TopPOption = DEFAULTS.top_p,
    seed: Annotated[int | None, typer.Option(min=0, help="Equal seeds draw the same.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = AUTO,
    chat_template: ChatTemplateOption = None,
    json_schema: JsonSchemaOption = None,
    keep: Annotated[bool, typer.Option(help="Keep the conversation in a file for /resume.")] = True,
    force_adapter: ForceAdapterOption = False,
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    The conversation is kept after each turn in a file of yours that /resume reads; --no-keep keeps none.
    Lines may also come from a pipe; then each is answered on stdout and the program ends with
    the input.
    """
    from nemotron4.cli.rows import read_schema
    from nemotron4.inference.load import load

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        grammar=read_schema(json_schema),
    )
    open_model = partial(
        load,
        dtype=dtype,
        device=device,
        quantize=quantize,
        adapter=adapter,
        chat_template=chat_template,
        force_adapter=force_adapter,
    )
    _talk(model, open_model, params, system=system, keep=keep)


def _talk(
    model: str,
    open_model: Callable[[str], InferenceEngine],
    params: SamplingParams,
    *,
    system: str | None,
    keep: bool,
) -> None:
    from nemotron4.cli.conversation import Chat

    def opened(name: str) -> InferenceEngine:
        engine = open_model(name)
        show_notes(engine.info)
        return engine

    is_interactive = sys.stdin.isatty()
    if is_interactive:
        note(f"loading {model} ...")
    kept = _state_file() if is_interactive and keep else None
    talk = Chat(opened(model), params, system=system, kept=kept, open_model=opened)
    try:
        if is_interactive:
            note(f"{talk.engine.info.name} is ready. Ctrl-C stops an answer, /exit leaves, /help tells more.")
            if kept is not None and kept.exists():
                note("/resume continues the last conversation.")
        talk.run(_ask_person if is_interactive else partial(read_line, ""), is_interactive=is_interactive)
    finally:
        talk.engine.close()


def _state_file() -> Path:
    """Where the last conversation is kept, readable by its owner alone."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nemotron4"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "chat.jsonl"


def _ask_person() -> str:
    import readline  # noqa: F401 - gives input() line editing and history

    try:
        return input("\n> ")
    except EOFError:
        note()
        raise
