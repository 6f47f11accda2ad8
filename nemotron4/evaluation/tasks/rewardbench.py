"""RewardBench: 2,985 pairs; a reward model's accuracy by section. A response row holds the two rewards."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.hub import hub_rows
from nemotron4.evaluation.task import Inputs, Item, Metric, Outcome, Task, answered, finite, user
from nemotron4.grading import judgments

FILE = DataFile(
    path="rewardbench/filtered.jsonl",
    sha256=None,
    source="allenai/reward-bench on the hub, split filtered, as JSON lines"
    " {id, subset, prompt, chosen, rejected}",
    licence="ODC-BY",
    build=hub_rows("allenai/reward-bench", "data/filtered-00000-of-00001.parquet"),
)


def load(source: DataSource) -> list[Item]:
    content = source.main(FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {"chosen": row["chosen"], "rejected": row["rejected"]}
            items.append(
                Item(id=str(row["id"]), messages=user(row["prompt"]), group=row["subset"], fields=fields)
            )
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
    return items


def score(inputs: Inputs) -> Outcome:
    """Each response is ``[chosen reward, rejected reward]`` as JSON text."""
    items, unscored = answered(inputs)
    right: dict[str, list[float]] = defaultdict(list)
    by_item: dict[str, dict[str, float | None]] = {}
    reasons: Counter[str] = Counter(unscored)
    for item in items:
        try:
            chosen, rejected = (float(value) for value in json.loads(inputs.responses[item.id][0]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"response {item.id}: expected [chosen reward, rejected reward]: {error}"
            ) from error
        found = judgments.prefers_chosen(chosen, rejected)
        by_item[item.id] = {"accuracy": found.value}
        if found.value is None:
            reasons[str(found.reason)] += 1
        else:
            right[item.group].append(found.value)
    sections = judgments.section_scores({subset: sum(v) / len(v) for subset, v in right.items()})
    metrics = {name: Metric(finite(value)) for name, value in sections.items()}
    return Outcome(metrics=metrics, unscored=reasons, items=by_item)


REWARDBENCH = Task(
    name="rewardbench",
    title="RewardBench",
    files=(FILE,),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=1),
    prompt="{prompt} {chosen | rejected}",
    card={
        "overall": 92.0,
        "chat": 95.8,
        "chat_hard": 87.1,
        "safety": 91.5,
        "reasoning": 93.7,
        "prior_sets": 67.4,
    },
    note="measures a reward model: nemotron4 eval run rewardbench --model URL asks its /score",
)
