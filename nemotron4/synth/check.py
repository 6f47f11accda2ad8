"""The whole recipe checked before the first call: what `plan` refuses, `run` refuses too.

Beyond the form of the recipe (``recipe.py``) and of its stages (``graph.py``): how many answers a judge gets,
what endpoints can do, exports that no stage makes, files, licences.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Set
from itertools import islice

from nemotron4.client import ChatModel
from nemotron4.errors import ConfigError, DataError, unknown_name
from nemotron4.synth.columns import PLACEHOLDER, known_columns
from nemotron4.synth.endpoint import connect
from nemotron4.synth.graph import Pipeline, PreparedStage, build_graph
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.rows import Answered, ColumnRow, Dialogue, Document, JudgedPair, Prompt, Topic
from nemotron4.synth.stage import load_prompts
from nemotron4.synth.stages import KINDS
from nemotron4.synth.stages.own import PromptKnobs

EXPORTED: Mapping[str, tuple[type, ...]] = {
    "sft": (Dialogue, JudgedPair),
    "preference": (JudgedPair,),
    "prompts": (Prompt, Answered, JudgedPair),
    "records": (Topic, Document, Prompt, Answered, JudgedPair, Dialogue, ColumnRow),
}
# What the data card may say: the identifiers of the Hugging Face hub that data usually has.
LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc", "odbl", "odc-by", "pddl", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "cdla-sharing-1.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
    "wtfpl", "gfdl", "openrail", "bigscience-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "gemma", "other", "unknown", "unspecified",
)  # fmt: skip


SEEN_ROWS = 1000  # of a file whose columns are looked at


def check(recipe: SynthRecipe, *, is_run: bool = True) -> Pipeline:
    """The recipe's stages; everything that is wrong with it is a ConfigError or DataError.

    ``is_run``: its sources will be read, so they must be there and make rows; a merge needs none.
    """
    prompts = load_prompts(recipe.prompts)
    stages = build_graph(recipe, KINDS, prompts)
    numbers = _check_answers(stages)
    _check_columns(stages, numbers, _source_columns(stages) if is_run else {})
    _check_vectors(stages)
    for stage in stages:
        _check_endpoints(recipe, stage)
        if stage.kind.check is not None:
            with _named(stage):
                stage.kind.check(stage.knobs)
    _check_exports(recipe, stages)
    _check_budget(recipe, {name for stage in stages for name in stage.endpoints})
    for stage in stages:
        if stage.is_barrier and stage.name in recipe.target:
            raise ConfigError(
                f"target: stage {stage.name!r} ({stage.config.kind}) decides when all rows are there",
                hint="name a stage below it",
            )
    return Pipeline(recipe, stages, prompts, tuple(_notes(recipe, stages)))


@contextlib.contextmanager
def _named(stage: PreparedStage) -> Iterator[None]:
    """Says of an error of a stage's own which stage it is."""
    try:
        yield
    except (ConfigError, DataError) as error:
        message = f"stage {stage.name!r} ({stage.config.kind}): {error.message}"
        raise type(error)(message, hint=error.hint) from error


def prepare(
    recipe: SynthRecipe, models: Mapping[str, ChatModel] | None = None
) -> tuple[Pipeline, dict[str, ChatModel]]:
    """Check the recipe and make its chat models; ``models`` replaces some of them."""
    pipeline = check(recipe)
    given = models or {}
    return pipeline, {
        name: given.get(name) or connect(name, endpoint) for name, endpoint in recipe.endpoint.items()
    }


def check_keys(recipe: SynthRecipe) -> None:
    """The API keys that the run will need; for a plan, which connects to nothing."""
    for name, endpoint in recipe.endpoint.items():
        if endpoint.api_key_env is not None and not os.environ.get(endpoint.api_key_env):
            connect(name, endpoint)  # says what is missing


def _source_columns(stages: tuple[PreparedStage, ...]) -> dict[str, Set[str]]:
    """The columns of files by stage; a ConfigError names a source that makes nothing."""
    found: dict[str, Set[str]] = {}
    for stage in stages:
        if stage.kind.roots is None:
            continue
        with _named(stage):
            first = list(islice(stage.kind.roots(stage.knobs), SEEN_ROWS if stage.makes is ColumnRow else 1))
        if not first:
            raise ConfigError(f"stage {stage.name!r} ({stage.config.kind}) makes no row of what it reads")
        if stage.makes is ColumnRow:
            found[stage.name] = {name for row in first for name in row}
    return found


def _check_answers(stages: tuple[PreparedStage, ...]) -> dict[str, set[int]]:
    """Judges get as many answers as they compare; the numbers by stage. Filters take some away, add none."""
    numbers: dict[str, set[int]] = {}
    for stage in stages:
        above = set[int]().union(*(numbers.get(name, set()) for name in stage.config.takes))
        if stage.kind.answers is not None:
            numbers[stage.name] = {stage.kind.answers(stage.knobs)}
        elif stage.makes is Answered:
            numbers[stage.name] = above
        wanted = stage.kind.compares
        for number in sorted(above) if wanted else ():
            low, high = wanted or (0, 0)
            if not low <= number <= high:
                expected = f"exactly {low}" if low == high else f"{low} or more"
                raise ConfigError(
                    f"stage {stage.name!r} ({stage.config.kind}) compares {expected} answers to a prompt, "
                    f"but gets {number}",
                    hint=f"set k = {low} in the stage that answers, or take another judge",
                )
    return numbers


def _check_columns(
    stages: tuple[PreparedStage, ...], numbers: Mapping[str, set[int]], sources: Mapping[str, Set[str]]
) -> None:
    """Templates name columns that the rows above have; what files and functions give, only the rows tell."""
    columns: dict[str, Set[str] | None] = {}
    for stage in stages:
        above = [columns[name] for name in stage.config.takes]
        known = None if not above or None in above else set.intersection(*map(set, filter(None, above)))
        if stage.kind.reads is not None and known is not None:
            wanted = stage.kind.reads(stage.knobs)
            missing = wanted - known
            if missing:
                raise ConfigError(
                    f"stage {stage.name!r} ({stage.config.kind}): no column {', '.join(sorted(missing))}",
                    hint=f"the rows have {', '.join(sorted(known))}",
                )
        if stage.makes is Answered:
            number = max(numbers[stage.name], default=0)
            answers = {f"response_{place}" for place in range(1, number + 1)}
            columns[stage.name] = (known_columns(Answered) or set()) | answers
        elif stage.makes is not ColumnRow:
            columns[stage.name] = known_columns(stage.makes)
        elif stage.name in sources:
            columns[stage.name] = sources[stage.name]
        elif stage.kind.adds is not None and known is not None:
            columns[stage.name] = known | set(stage.kind.adds(stage.knobs))
        else:
            columns[stage.name] = known if stage.kind.makes is None else None


def _check_vectors(stages: tuple[PreparedStage, ...]) -> None:
    has_vectors: dict[str, bool] = {}
    for stage in stages:
        above = [has_vectors[name] for name in stage.config.takes]
        has_vectors[stage.name] = stage.config.kind == "embed" or (bool(above) and all(above))
        if stage.kind.decide_by_vector is not None and not all(above):
            raise ConfigError(
                f"stage {stage.name!r} ({stage.config.kind}) compares vectors, which no stage above it makes",
                hint="put a stage `embed` above it",
            )


def _check_endpoints(recipe: SynthRecipe, stage: PreparedStage) -> None:
    needed = stage.kind.needs(stage.knobs) if stage.kind.needs is not None else ""
    for name in stage.endpoints if needed else ():
        if recipe.endpoint[name].form == "generate":
            raise ConfigError(
                f"stage {stage.name!r} ({stage.config.kind}) needs {needed}, "
                f"which endpoint {name!r} (PUT /generate) does not give",
                hint="take an endpoint of the form openai",
            )


def _check_budget(recipe: SynthRecipe, used: Set[str]) -> None:
    """ConfigError for a limit that nothing would count towards."""
    endpoints = {name: recipe.endpoint[name] for name in sorted(used)}
    if recipe.budget.money and not any(each.price_in or each.price_out for each in endpoints.values()):
        raise ConfigError(
            f"budget.money is {recipe.budget.money:g}, but no endpoint has a price",
            hint="give price_in and price_out (per million tokens)",
        )
    for name, each in endpoints.items():
        if each.form == "generate" and (recipe.budget.tokens or recipe.budget.money):
            raise ConfigError(
                f"budget: endpoint {name!r} (PUT /generate) does not tell tokens", hint="limit calls instead"
            )


def _check_exports(recipe: SynthRecipe, stages: tuple[PreparedStage, ...]) -> None:
    made = {stage.name: stage for stage in stages}
    for file, types in EXPORTED.items():
        names: tuple[str, ...] = getattr(recipe.export, file)
        for name in names:
            if made[name].makes not in types:
                wanted = " or ".join(kind.__name__ for kind in types)
                is_answered = file == "sft" and made[name].makes is Answered
                raise ConfigError(
                    f"export: {file} takes {wanted} rows, but stage {name!r} ({made[name].config.kind}) "
                    f"makes {made[name].makes.__name__} rows",
                    hint="a stage `single_answer` makes dialogues of them" if is_answered else None,
                )
        if len(set(names)) < len(names):
            raise ConfigError(f"export: {file} names a stage twice")
    if recipe.export.licence not in LICENCES:
        message, hint = unknown_name("licence", recipe.export.licence, LICENCES)
        raise ConfigError(f"export: {message}", hint=f"{hint}; or 'other', with its name among the sources")


def _notes(recipe: SynthRecipe, stages: tuple[PreparedStage, ...]) -> list[str]:
    """What is no mistake, but perhaps not meant."""
    used = {name for stage in stages for name in stage.endpoints}
    exported = set(recipe.export.stages)
    notes = [f"endpoint {name!r} is used by no stage" for name in recipe.endpoint if name not in used]
    notes += [
        f"stage {stage.name!r}: its template names no column, so every row asks the same"
        for stage in stages
        if isinstance(stage.knobs, PromptKnobs) and not PLACEHOLDER.search(stage.knobs.template)
    ]
    notes += [
        f"stage {stage.name!r}: its rows are neither exported nor taken by another stage"
        for stage in stages
        if not stage.consumers and stage.name not in exported
    ]
    return notes
