"""``nemotron4 pull``: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.models import list_models
from nemotron4.cli.options import JsonOption, RevisionOption


def pull(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="smollm2, or ORG/NAME[:FILE.gguf]."),
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
