"""Code instructions by evolution (the Genetic-Instruct method): colonies that grow from seeds.

Each root is a colony and works by itself. A step makes new instructions by crossover (from several of the
population) or by mutation (of one), has each solved, and lets a model judge whether the pair is fit; the fit
ones join the population until the colony has its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron4.client import BadContentError, Sampling
from nemotron4.records import JsonObject, Message
from nemotron4.synth.parsing import normalise
from nemotron4.synth.rows import Dialogue, Root, Row
from nemotron4.synth.stage import Context, Kind
from nemotron4.synth.stages.asking import LIST_PROMPTS, ask_list

SEEDS = (
    "Write a function that returns the n-th number of the Fibonacci sequence.",
    "Given a list of words, group those that are anagrams of each other.",
    "Read a text file and print its five most frequent words with their counts.",
    "Implement a stack with push, pop and a constant-time minimum.",
    "Check whether brackets of three kinds are balanced in a string.",
    "Convert a Roman numeral to an integer and refuse malformed ones.",
    "Merge two sorted lists into one sorted list without using sort.",
    "Given intervals as pairs of integers, merge those that overlap.",
)
MUTATIONS = (
    "Add one more constraint or requirement, in about ten words.",
    "Replace a common requirement by a rarer and more specific one.",
    "If it is solved in a few steps, demand more steps of reasoning.",
    "Give a wrong piece of code as a misleading reference.",
    "Demand a better time or space complexity.",
)


@dataclass(frozen=True)
class GeneticKnobs:
    """``size`` new members for each colony; ``max_steps`` bounds what a barren colony may cost."""

    colonies: int = 4
    size: int = 20
    crossover_share: float = 0.5
    children_per_crossover: int = 5
    max_steps: int = 100
    seeds: tuple[str, ...] = SEEDS

    def __post_init__(self) -> None:
        if len(self.seeds) < 3:
            raise ValueError(f"{len(self.seeds)} seeds are given; crossover needs at least 3")
        if self.colonies < 1 or self.size < 1:
            raise ValueError("colonies and size must be 1 or more")


def colony_roots(knobs: GeneticKnobs) -> Iterator[JsonObject]:
    yield from ({} for _ in range(knobs.colonies))


async def evolve(root: Root, context: Context, knobs: GeneticKnobs) -> Sequence[Row]:
    """Root -> the members of one colony, each an instruction with its solution."""
    draw = context.random("evolution")
    population = list(knobs.seeds)
    seen = {normalise(text) for text in population}
    members: list[Row] = []
    for step in range(knobs.max_steps):
        if len(members) >= knobs.size:
            break
        is_crossover = draw.random() < knobs.crossover_share
        if is_crossover:
            parents = draw.sample(population, 3)
            examples = "\n".join(f"- {parent}" for parent in parents)
            n = knobs.children_per_crossover
            question = context.prompt("genetic_crossover", examples=examples, n=n)
            children = await ask_list(context, question, n)
        else:
            parent, mutation = draw.choice(population), draw.choice(MUTATIONS)
            question = context.prompt("genetic_mutation", instruction=parent, change=mutation)
            reply = await context.chat((Message("user", question),), sample=10_000 + step)
            children = [reply.text.strip()]
        for child in children:
            key = normalise(child)
            if not key or key in seen or len(members) >= knobs.size:
                continue
            seen.add(key)
            solution = await _solve_and_judge(child, context, sample=20_000 + len(seen))
            if solution is None:
                context.count("children_unfit")
                continue
            population.append(child)
            members.append(
                Dialogue(
                    messages=(Message("user", child), Message("assistant", solution)),
                    task="code",
                    meta={"colony": root.index, "made_by": "crossover" if is_crossover else "mutation"},
                )
            )
    if not members:
        raise BadContentError(f"no fit child in {knobs.max_steps} steps", kind="barren")
    return members


async def _solve_and_judge(instruction: str, context: Context, *, sample: int) -> str | None:
    """The solution if it holds code and the judge finds the pair fit."""
    request = context.prompt("genetic_solution", instruction=instruction)
    reply = await context.chat((Message("user", request),), sample=sample)
    solution = reply.text.strip()
    if reply.finish_reason == "length" or not re.search(r"```\w*\n.+?```", solution, re.DOTALL):
        return None
    question = context.prompt("genetic_fitness", instruction=instruction, solution=solution)
    verdict = await context.chat((Message("user", question),), sample=sample, temperature=0.0, max_tokens=8)
    return solution if re.match(r"\W*yes\b", verdict.text, re.IGNORECASE) else None


KINDS = {
    "genetic_code": Kind(
        summary="code instructions with solutions, evolved in colonies",
        takes=(), makes=Dialogue, knobs=GeneticKnobs, roots=colony_roots, run=evolve,
        prompts=(
            "genetic_crossover", "genetic_mutation", "genetic_solution", "genetic_fitness", *LIST_PROMPTS,
        ),
        sampling=Sampling(temperature=0.8, max_tokens=1024),
        calls=lambda knobs: 3.5 * knobs.size, fan_out=lambda knobs: knobs.size,
    ),
}  # fmt: skip
