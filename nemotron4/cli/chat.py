"""``nemotron4 chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nemotron4.cli.console import note, show_notes
from nemotron4.cli.options import AdapterOption, DeviceOption, DtypeOption, ModelArgument, QuantizeOption


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(min=0, help="Equal seeds draw equal answers.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Chat with a model: answers stream to the terminal, /help lists what else there is.

    Lines may also come from a pipe; then each is answered on stdout and the program ends with
    the input.
    """
    from nemotron4.cli.conversation import Chat
    from nemotron4.engine import SamplingParams
    from nemotron4.inference.load import load

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        note(f"loading {model} ...")
    engine = load(model, dtype=dtype, device=device, quantize=quantize, adapter=adapter)
    show_notes(engine.info)
    try:
        if is_interactive:
            note(f"{engine.info.name} is ready. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        Chat(engine, params, system=system).run(
            _ask_person if is_interactive else _next_line, is_interactive=is_interactive
        )
    finally:
        engine.close()


def _ask_person() -> str:
    import readline  # noqa: F401 - gives input() line editing and history

    try:
        return input("\n> ")
    except EOFError:
        note()
        raise


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
