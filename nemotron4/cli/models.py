"""``nemotron4 models``: what is in the caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.options import JsonOption, ModelArgument
from nemotron4.report import Table, print_report

if TYPE_CHECKING:
    from nemotron4.checkpoint.description import CheckpointDescription

app = group("List, describe and delete the models that have been fetched.")


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """Show the models of our cache and of Hugging Face's own."""
    from nemotron4.checkpoint.cache import DEMO_NAME, cache_dir, list_cache

    models = list_cache()
    if as_json:
        rows = [{"name": m.name, "path": str(m.path), "size_bytes": m.size_bytes} for m in models]
        print_json({"cache": str(cache_dir()), "models": rows})
        return
    for entry in models:
        print(f"{entry.name}\t{entry.size_bytes / 1e6:,.1f} MB\t{entry.path}")
    if not models:
        note(f"no model in {cache_dir()}; `nemotron4 pull {DEMO_NAME}` fetches the embedded one")


@app.command("show")
def show(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Describe a model from its headers."""
    from nemotron4.checkpoint.description import describe_checkpoint

    found = describe_checkpoint(model)
    if as_json:
        print_json(found.to_json())
    else:
        print_report([description(found)])


@app.command("rm")
def remove_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `models list` shows.")],
    as_json: JsonOption = False,
) -> None:
    """Delete a fetched model from our cache."""
    from nemotron4.checkpoint.cache import remove

    freed = remove(name)
    if as_json:
        print_json({"removed": name, "freed_bytes": freed})
    else:
        print(f"removed {name}: {freed / 1e6:,.1f} MB freed")


def description(found: CheckpointDescription, *more: tuple[str, str]) -> Table:
    """What a checkpoint is, and ``more`` of it."""
    values = found.to_json()
    names = ("format", "family", "num_parameters", "context_length", "rope_scaling")
    rows = [
        *((name.replace("_", " "), str(values[name])) for name in names),
        ("stored", found.stored_text),
        ("quantisation", values["quantization"] or "none"),
        ("chat template", "yes" if found.has_template else "no"),
        ("stop ids", ", ".join(map(str, found.stop_ids)) or "none"),
        *(("note", text) for text in found.checkpoint.notes),
        *(("problem", text) for text in found.problems),
        *more,
    ]
    return Table(("checkpoint", values["path"]), rows)
