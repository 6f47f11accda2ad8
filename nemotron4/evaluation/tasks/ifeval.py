"""IFEval: 541 prompts, 834 verifiable instructions; the prompt alone, greedy."""

from __future__ import annotations

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Metric, Outcome, Task, answered, share, user
from nemotron4.grading import instructions
from nemotron4.grading.statistics import bootstrap_ratio

FILE = DataFile(
    path="ifeval/input_data.jsonl",
    sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
    source="google-research/google-research, instruction_following_eval/data",
    licence="CC BY 4.0",
    url="https://raw.githubusercontent.com/google-research/google-research/master/"
    "instruction_following_eval/data/input_data.jsonl",
)


def load(source: DataSource) -> list[Item]:
    content = source.main(FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {"ids": row["instruction_id_list"], "arguments": row["kwargs"]}
            items.append(Item(id=str(row["key"]), messages=user(row["prompt"]), fields=fields))
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
        if len(fields["ids"]) != len(fields["arguments"]):
            raise DataError(
                f"{content.path}:{number}: {len(fields['ids'])} instructions, other number of kwargs"
            )
    return items


def score(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)
    metrics: dict[str, Metric] = {}
    by_item: dict[str, dict[str, float | None]] = {item.id: {} for item in items}
    modes: tuple[instructions.Mode, ...] = ("strict", "loose")
    for mode in modes:
        held = [
            instructions.follows(
                inputs.responses[item.id][0],
                item.fields["ids"],
                item.fields["arguments"],
                mode=mode,
                seed=inputs.seed,
            )
            for item in items
        ]
        prompts = [all(decisions) for decisions in held]
        metrics[f"prompt_{mode}"] = share(sum(prompts), len(prompts))
        sums, counts = [float(sum(d)) for d in held], [float(len(d)) for d in held]
        interval = bootstrap_ratio(sums, counts, seed=inputs.seed)
        metrics[f"instruction_{mode}"] = share(int(sum(sums)), int(sum(counts)), interval)
        for item, decisions in zip(items, held, strict=True):
            by_item[item.id] |= {
                f"prompt_{mode}": float(all(decisions)),
                f"instruction_{mode}": sum(decisions) / len(decisions) if decisions else None,
            }
    return Outcome(metrics=metrics, unscored=unscored, items=by_item)


IFEVAL = Task(
    name="ifeval",
    title="IFEval",
    files=(FILE,),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=1280),
    prompt="{prompt}",
    card={"prompt_strict": 79.9, "instruction_strict": 86.1},
)
