"""A recipe made ready to run: its graph checked, its models made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from nemotron4.client import ChatModel
from nemotron4.synth.endpoint import Endpoint, connect
from nemotron4.synth.graph import Stage, build_graph
from nemotron4.synth.prompts import PromptBook, load_prompts
from nemotron4.synth.recipe import Recipe
from nemotron4.synth.stages import KINDS


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe with everything made that a runner needs."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    models: Mapping[str, ChatModel]
    prompts: PromptBook

    async def close(self) -> None:
        for model in self.models.values():
            await model.close()


def prepare(recipe: Recipe, models: Mapping[str, ChatModel] | None = None) -> Prepared:
    """Check the recipe's graph and make its chat models; ``models`` replaces some of them."""
    prompts = load_prompts(recipe.prompts)
    made = {
        name: (models or {}).get(name) or connect(name, endpoint)
        for name, endpoint in recipe.endpoint.items()
    }
    identities = {
        name: Endpoint(name, endpoint, made[name], recipe.retry).identity
        for name, endpoint in recipe.endpoint.items()
    }
    return Prepared(recipe, build_graph(recipe, KINDS, prompts, identities), made, prompts)
