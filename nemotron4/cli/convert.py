"""``nemotron4 convert``: a checkpoint into another form, streamed, resumable, verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import ForceAdapterOption, JsonOption, ModelArgument

if TYPE_CHECKING:
    from nemotron4.checkpoint.convert_files import Finished


def convert(
    source: ModelArgument,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")],
    to: Annotated[Literal["hf", "nemo", "gguf"], typer.Option(help="The form to write.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Default the source's.")
    ] = None,
    quantize: Annotated[
        Literal["int8", "fp8", "fp8-static", "int4", "nvfp4", "q8_0", "q4_0", "q4_k_m", "q6_k"] | None,
        typer.Option(help="The first five with --to hf, the others with gguf."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to measure on, for fp8-static, int4 and nvfp4.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Merge a LoRA or (IA)3 of PEFT, or a LoRA of NeMo.")
    ] = None,
    force_adapter: ForceAdapterOption = False,
    tensor_parallel: Annotated[int | None, typer.Option(help="Chunks per tensor, with --to nemo.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Re-read the result and compare it with the source.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL in another form into the folder DST. Repeat the command to go on after an interruption."""
    from nemotron4.checkpoint.convert import ConvertOptions
    from nemotron4.checkpoint.convert import convert as write
    from nemotron4.checkpoint.convert import verify as compare
    from nemotron4.checkpoint.description import describe_checkpoint
    from nemotron4.checkpoint.opening import open_checkpoint

    split = {} if tensor_parallel is None else {"tensor_parallel": tensor_parallel}
    options = ConvertOptions(
        to=to,
        dtype=dtype,
        quantize=quantize,
        calibration=calibration,
        adapter=adapter,
        force_adapter=force_adapter,
        **split,
    )
    checkpoint = open_checkpoint(source)
    note(f"{source}: {describe_checkpoint(checkpoint).summary}")
    for text in checkpoint.notes:
        note(f"note: {text}")
    finished = write(checkpoint, destination, options, is_shown=True)
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
