"""``nemotron4 generate``: a file of prompts in, a file of answers out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.checkpoint.shipped import AUTO
from nemotron4.cli.console import note, print_json, show_notes
from nemotron4.cli.options import (
    AdapterOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    ForceAdapterOption,
    JsonOption,
    JsonSchemaOption,
    ModelArgument,
    QuantizeOption,
)
from nemotron4.records import read_json_lines

if TYPE_CHECKING:
    from nemotron4.engine import InferenceEngine


def generate(
    model: ModelArgument,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON lines: one prompt each.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the answers go.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens with this much probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0 is all.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer here; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds draw equal answers.")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write each token's log-probability.")] = False,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Rows that are answered at the same time.")] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    adapter: AdapterOption = AUTO,
    force_adapter: ForceAdapterOption = False,
    chat_template: ChatTemplateOption = None,
    json_schema: JsonSchemaOption = None,
    json_: JsonOption = False,
) -> int:
    """Answer a file of prompts, in continuous batches.

    A row of INPUT is {"prompt": TEXT}, {"prompt": [TOKEN IDS]} or {"messages": [{"role":
    ..., "content": ...}]}. Its "id" and "meta" are copied; sampling settings in it
    ("temperature": 0, ...) hold for that row alone.

    Answers are in input order. Killed at any moment, the same command continues where it
    stopped. A row that cannot be answered becomes {"line": ..., "error": ...} in its place,
    and the exit status is then 1.
    """
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.checkpoint.shipped import chosen_adapter
    from nemotron4.cli import batch
    from nemotron4.cli.identity import file_digest, model_digest
    from nemotron4.cli.rows import read_schema
    from nemotron4.engine import SamplingParams

    chosen = chosen_adapter(model, adapter)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_strings=tuple(stop or ()),
        seed=seed,
        logprobs=0 if logprobs else None,
        grammar=read_schema(json_schema),
    )
    run = {
        "input_sha256": file_digest(source),
        "model": model,
        "model_sha256": model_digest(resolve(model)),
        "dtype": dtype,
        "quantize": quantize,
        "adapter_sha256": model_digest(chosen) if chosen else None,
        "sampling": batch.as_json(params),
    }
    if chat_template is not None:
        path = Path(chat_template)
        run["chat_template"] = file_digest(path) if path.is_file() else chat_template

    def load_engine() -> InferenceEngine:
        from nemotron4.inference.load import load

        note(f"loading {model} ...")
        engine: InferenceEngine = load(
            model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            adapter=adapter,
            chat_template=chat_template,
            force_adapter=force_adapter,
        )
        show_notes(engine.info)
        return engine

    with batch.Output(output, run) as answers:
        if answers.log is None:
            note(f"{output} is complete already")
        else:
            batch.answer_file(load_engine, source, answers, params, max_in_flight=max_in_flight)
    return _report(output, is_json=json_)


def _report(output: Path, *, is_json: bool) -> int:
    """Say what the finished file holds; the exit status."""
    num_rows = num_failed = num_new_tokens = 0
    for _, row in read_json_lines(output):
        num_rows += 1
        num_failed += "error" in row
        num_new_tokens += len(row.get("token_ids", ()))
    if is_json:
        print_json(
            {"output": str(output), "rows": num_rows, "failed": num_failed, "new_tokens": num_new_tokens}
        )
    else:
        note(f"{output}: {num_rows} rows, {num_failed} failed, {num_new_tokens} new tokens")
    return 1 if num_failed else 0
