"""``nemotron4 convert``: a checkpoint into another form, streamed, resumable, verified."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption, ModelArgument

if TYPE_CHECKING:
    from nemotron4.checkpoint.convert_files import Finished, Progress


def convert(
    source: ModelArgument,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")],
    to: Annotated[Literal["hf", "nemo", "gguf"], typer.Option(help="The form to write.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Type of the weights; the source's if absent."),
    ] = None,
    quantize: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Eight-bit linear layers in the compressed-tensors layout (hf only)."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A LoRA or (IA)3 adapter of PEFT, or a LoRA of NeMo, to merge."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Chunks per tensor (nemo only).")] = 1,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Re-read what was written and compare it with the source, converting first if needed.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL in another form into the folder DST. Repeat the command to go on after an interruption."""
    from nemotron4.checkpoint.convert import ConvertOptions
    from nemotron4.checkpoint.convert import convert as write
    from nemotron4.checkpoint.convert import verify as compare
    from nemotron4.checkpoint.opening import open_checkpoint

    options = ConvertOptions(
        to=to, dtype=dtype, quantize=quantize, adapter=adapter, tensor_parallel=tensor_parallel
    )
    checkpoint = open_checkpoint(source)
    for text in checkpoint.notes:
        note(f"note: {text}")
    line = _Line()
    finished = write(checkpoint, destination, options, line.show)
    line.end()
    verified = None
    if verify:
        note("verifying: reading every written byte and the source once more")
        verified = compare(checkpoint, destination, options)
    _print_result(destination, finished, verified, as_json=as_json)


def _print_result(
    destination: Path, finished: list[Finished], verified: int | None, *, as_json: bool
) -> None:
    errors = {
        name: value for row in finished for name, value in row.facts.items() if "relative_error" in value
    }
    result: dict[str, Any] = {
        "destination": str(destination),
        "files": len(finished),
        "bytes": sum(row.size for row in finished),
        "verified_bytes": verified,
        "quantization_error": errors,
    }
    if as_json:
        print_json(result)
        return
    print(f"{destination}: {result['files']} files, {result['bytes'] / 1e9:.3f} GB")
    if errors:
        worst = max(errors, key=lambda name: errors[name]["relative_error"])
        print(f"largest relative error of a weight: {errors[worst]['relative_error']:.2%} ({worst})")
        print("every weight's error is in manifest.json")
    if verified is not None:
        print(f"verified: {verified / 1e9:.3f} GB equal to the source")


class _Line:
    """One line that is rewritten on a terminal, and repeated every ten seconds in a log."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._is_open = False

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if not self._is_terminal and now - self._shown < 10:
            return
        self._shown = now
        done = progress.skipped_bytes + progress.written_bytes
        left = progress.remaining_s
        seconds = "?" if left is None else f"{left:.0f}"
        text = (
            f"{done / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB, "
            f"{progress.bytes_per_s / 1e9:.2f} GB/s, {seconds} s left, {progress.file}"
        )
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        else:
            note(text)

    def end(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
