"""The table of sub-commands, each imported only when it is called."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import typer

HELP_NAMES = ("-h", "--help")


class Command(NamedTuple):
    """Where a sub-command lives (``module:attribute``, a function or a typer group) and its line of help."""

    target: str
    help: str


# One line for each sub-command, in the order of a user's journey. The help text is here and not in the
# module, so that `nemotron4 --help` imports none of them.
COMMANDS: dict[str, Command] = {
    "pull": Command("nemotron4.cli.models:pull", "Fetch a model into the cache."),
    "models": Command("nemotron4.cli.models:app", "List, describe and delete fetched models."),
    "serve": Command("nemotron4.cli.serve:serve", "Put a model on a port: PUT /generate and OpenAI routes."),
    "chat": Command("nemotron4.cli.chat:chat", "Chat with a model in the terminal."),
    "generate": Command("nemotron4.cli.generate:generate", "Answer a file of prompts."),
    "plan": Command("nemotron4.cli.plan:plan", "Say which GPUs a model needs, and why."),
    "convert": Command("nemotron4.cli.convert:convert", "Write a checkpoint in another form."),
    "train": Command("nemotron4.cli.train:train", "Train or align a model as a recipe says."),
    "recipe": Command("nemotron4.cli.recipe:app", "Run a recipe of stages: data, training, evaluation."),
    "card": Command("nemotron4.cli.card:card", "Write the model card of a folder."),
    "data": Command("nemotron4.cli.data:app", "Tokenize a corpus for pre-training."),
    "doctor": Command("nemotron4.cli.doctor:app", "Look for what would go wrong later."),
    "synth": Command("nemotron4.cli.synth:app", "Make synthetic training data."),
    "eval": Command("nemotron4.cli.eval:app", "Measure a model by the card's benchmarks."),
    "redteam": Command("nemotron4.cli.redteam:app", "Attack a model and keep what came of it."),
    "launch": Command("nemotron4.cli.launch:app", "Start jobs on a cluster, and the card's own scripts."),
    "completion": Command(
        "nemotron4.cli.completion:completion", "Print what a shell needs to complete commands."
    ),
}


def load_app(name: str, command: Command) -> typer.Typer:
    """Import a sub-command; a plain function is made into an app of one command."""
    import typer

    module, attribute = command.target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return target
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": list(HELP_NAMES)}
    app.command(name, help=target.__doc__ or command.help, context_settings=settings)(target)
    return app
