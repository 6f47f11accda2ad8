"""``nemotron4 models``: what is in the caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import group, note, present, print_json
from nemotron4.cli.options import JsonOption, ModelArgument, RevisionOption
from nemotron4.report import Table

if TYPE_CHECKING:
    from nemotron4.checkpoint.description import CheckpointDescription

app = group("List, describe and delete the models that have been fetched.")


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """Show the models of our cache and of Hugging Face's own."""
    from nemotron4.checkpoint.cache import DEMO_NAME, list_cache
    from nemotron4.config import cache_dir

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
    present(found.to_json(), [description(found)], as_json=as_json)


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


def pull(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="smollm2, or ORG/NAME[:FILE.gguf].")
    ] = None,
    revision: RevisionOption = None,
    show_list: Annotated[bool, typer.Option("--list", help="The same as `nemotron4 models list`.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the cache and print its path.

    smollm2 is the demo model (98 MB, Apache-2.0). ORG/NAME is fetched from the Hugging Face hub, without
    pickles; ORG/NAME:Q4_K_M is one of several GGUF files. The cache is $NEMOTRON4_CACHE, else
    $XDG_CACHE_HOME/nemotron4, else ~/.cache/nemotron4.
    """
    from nemotron4.checkpoint.cache import DEMO_NAME
    from nemotron4.checkpoint.hub import pull_hub, pull_smollm2

    if show_list == (model is not None):
        raise typer.BadParameter("give either a MODEL or --list")
    if model is None:
        list_models(as_json)
        return
    path = pull_smollm2(note) if model == DEMO_NAME else pull_hub(model, note, revision=revision)
    if as_json:
        print_json({"name": model, "path": str(path)})
    else:
        print(path)
