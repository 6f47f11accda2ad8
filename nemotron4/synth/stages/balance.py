"""Stages that look at all rows and keep some, so that no source, cluster or length outweighs the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron4.synth.columns import columns_of
from nemotron4.synth.duplicates import cluster, unpack_vectors
from nemotron4.synth.rows import JudgedPair
from nemotron4.synth.stage import Drop
from nemotron4.synth.stages.filtering import COMPARED_ROWS, passing


@dataclass(frozen=True)
class ClusterKnobs:
    """At most ``n`` rows of each of so many clusters of vectors."""

    clusters: int = 50
    n: int = 20

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.n < 1:
            raise ValueError("clusters and n must be 1 or more")


@dataclass(frozen=True)
class SampleKnobs:
    """At most ``n`` rows of each task, so that no source outweighs the others."""

    n: int = 1000


@dataclass(frozen=True)
class BlendKnobs:
    """Shares of the tasks, in any unit: {math = 2, open_qa = 1}. A task that is not named is left out.

    As many rows are kept as the scarcest task allows, or ``n`` of them if that is fewer.
    """

    weights: dict[str, float] = field(default_factory=dict)
    n: int = 0

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) <= 0:
            raise ValueError("weights is empty or has a weight that is not positive")


@dataclass(frozen=True)
class LengthBalanceKnobs:
    """The most pairs whose chosen answer is the longer one, as a share of all."""

    max_longer: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.max_longer <= 1:
            raise ValueError(f"max_longer is {self.max_longer}; expected in (0, 1]")


def cap_per_cluster(rows: Iterable[tuple[bytes, Any, bytes]], knobs: ClusterKnobs) -> Mapping[bytes, Drop]:
    """The first ``n`` of each cluster in the order of ids, which is a random order."""
    held = [(record, vector) for record, _, vector in rows]
    if not held:
        return {}
    labels, _ = cluster(unpack_vectors([vector for _, vector in held]), knobs.clusters)
    counts: Counter[int] = Counter()
    drops: dict[bytes, Drop] = {}
    for (record, _), label in zip(held, labels.tolist(), strict=True):
        counts[label] += 1
        if counts[label] > knobs.n:
            drops[record] = ("cluster", f"more than {knobs.n} rows of cluster {label + 1}")
    return drops


def cap_per_task(rows: Iterable[tuple[bytes, Any]], knobs: SampleKnobs) -> Mapping[bytes, Drop]:
    """The first ``n`` of each task in the order of ids, which is a random order."""
    counts: Counter[str] = Counter()
    drops: dict[bytes, Drop] = {}
    for record, row in rows:
        task = str(columns_of(row).get("task", ""))
        counts[task] += 1
        if counts[task] > knobs.n:
            drops[record] = ("sample", f"more than {knobs.n} rows of the task {task!r}")
    return drops


def blend(rows: Iterable[tuple[bytes, Any]], knobs: BlendKnobs) -> Mapping[bytes, Drop]:
    """The first rows of each task in the order of ids, which is a random order."""
    tasks = [(record, str(columns_of(row).get("task", ""))) for record, row in rows]
    counts = Counter(task for _, task in tasks)
    unit = min(counts[task] / weight for task, weight in knobs.weights.items())
    if knobs.n:
        unit = min(unit, knobs.n / sum(knobs.weights.values()))
    # Not an error: a shard may have none of a task, and the whole be complete.
    missing = ", ".join(repr(task) for task in knobs.weights if not counts[task])
    rule = f"blend: no row of the task {missing}" if missing else "blend"
    limits = {task: round(weight * unit) for task, weight in knobs.weights.items()}
    kept: Counter[str] = Counter()
    drops: dict[bytes, Drop] = {}
    for record, task in tasks:
        kept[task] += 1
        if kept[task] > limits.get(task, 0):
            reason = f"more than {limits[task]} rows" if task in limits else "no weight"
            drops[record] = (rule, f"{reason} of the task {task!r}")
    return drops


def balance_lengths(rows: Iterable[tuple[bytes, Any]], knobs: LengthBalanceKnobs) -> Mapping[bytes, Drop]:
    """Drops pairs with the longer answer chosen, the largest difference first, until their share is small."""
    longer: list[tuple[int, bytes]] = []
    num_others = 0
    for record, pair in rows:
        difference = len(pair.chosen.text) - len(pair.rejected.text)
        if difference > 0:
            longer.append((difference, record))
        else:
            num_others += 1
    share = knobs.max_longer
    limit = len(longer) if share == 1 else int(num_others * share / (1 - share) + 1e-9)
    surplus = sorted(longer, reverse=True)[: max(0, len(longer) - limit)]
    return {
        record: ("length balance", f"the chosen answer is {difference} characters longer")
        for difference, record in surplus
    }


KINDS = {
    "cluster_sample": passing(
        "at most n rows of each cluster of meanings", ClusterKnobs, COMPARED_ROWS,
        decide_by_vector=cap_per_cluster,
    ),
    "sample": passing("at most n rows of each task", SampleKnobs, decide=cap_per_task),
    "blend": passing("tasks in given shares", BlendKnobs, decide=blend),
    "length_balance": passing(
        "pairs whose chosen answer is not mostly the longer one", LengthBalanceKnobs, (JudgedPair,),
        decide=balance_lengths,
    ),
}  # fmt: skip
