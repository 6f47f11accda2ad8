"""``nemotron4 data``: corpora for pre-training."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.options import JsonOption, Latin1Option, RowFilesArgument

app = group("Make and look at corpora for pre-training.")


@app.command("tokenize")
def tokenize(
    files: RowFilesArgument,
    model: Annotated[str, typer.Option(help="Its tokenizer is used.")],
    out: Annotated[str, typer.Option(help="PREFIX of PREFIX.bin and PREFIX.idx.")],
    column: Annotated[str, typer.Option(help="The column with the texts.")] = "text",
    ignore: Annotated[
        list[str] | None, typer.Option(help="A column with meaning elsewhere, unused here.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Default one for each processor.")] = None,
    latin_1: Latin1Option = False,
    max_bad_rows: Annotated[
        int | None, typer.Option(help="More bad rows end with status 1; default 0.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokenize texts into Megatron's indexed format, which stage pretrain, NeMo and Megatron-LM read.

    Documents keep their order and end with the end of text. Repeat the command to go on after an
    interruption.
    """
    from nemotron4.json_form import to_json
    from nemotron4.training.reading import TrainingSource
    from nemotron4.training.tokenizing import tokenize as write

    renamed = {} if column == "text" else {"text": column}
    sources = [
        TrainingSource(
            path=path, map=renamed, ignore=tuple(ignore or ()), encoding="latin-1" if latin_1 else "utf-8"
        )
        for path in files
    ]
    num_workers = workers or len(os.sched_getaffinity(0))
    found = write(sources, model, out, num_workers=num_workers, max_bad_rows=max_bad_rows or 0)
    if as_json:
        print_json(to_json(found))
        return
    for problem in found.problems:
        note(f"left out {problem}")
    for line in found.ignored:
        note(line)
    print(f"{found.prefix}: {found.documents:,} documents, {found.tokens:,} tokens")


@app.command("show")
def show(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx.")],
    model: Annotated[str | None, typer.Option(help="Print the first document with its tokenizer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe an indexed corpus and its first document."""
    from nemotron4.training.indexed import IndexedCorpus

    corpus = IndexedCorpus(prefix)
    values: dict[str, object] = {
        "prefix": corpus.prefix,
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "type": corpus.dtype.name,
        "mean_length": corpus.num_tokens / max(1, corpus.num_documents),
    }
    if model is not None and corpus.num_documents:
        from nemotron4.checkpoint import open_checkpoint
        from nemotron4.training.preview import marked
        from nemotron4.training.samples import Segment

        ids = tuple(corpus.tokens(0, 0, 200).tolist())
        segment = Segment(ids, (True,) * len(ids))
        values["first"] = (
            marked(segment, open_checkpoint(model).tokenizer()).removeprefix("[[").removesuffix("]]")
        )
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        shown = (
            f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
        print(f"{name.replace('_', ' '):<14}{shown}")
