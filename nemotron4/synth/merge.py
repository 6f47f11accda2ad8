"""What concerns all rows of a ledger at once: barriers, a changed recipe, shards that become one run.

The result of a merge does not depend on the order of the shards.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from nemotron4.errors import DataError
from nemotron4.synth import tables
from nemotron4.synth.graph import Pipeline, PreparedStage
from nemotron4.synth.recipe import LEDGER, load_saved_recipe, save_recipe
from nemotron4.synth.review import open_reviews
from nemotron4.synth.rows import decode, digest
from nemotron4.synth.tables import DONE, FILTERED, Effects, children_of
from nemotron4.synth.work import SPENDING_COUNTERS
from nemotron4.synth.writer import Ledger

PAGE = 1024  # decisions in one transaction


def merge(shards: Sequence[Path], target: Path, pipeline: Pipeline) -> int:
    """Copy all shards into ``target`` and decide anew what spans them; returns the decisions that changed.

    Stages that see all rows at once (duplicates, samples) saw only their shard's; what they decide now may
    remove rows, or free some, which then are ready work in the merged run.
    """
    for shard in shards:
        if not (shard / LEDGER).exists():
            raise DataError(f"{shard}: there is no ledger here", hint="name the folders of finished shards")
        if load_saved_recipe(shard) != pipeline.recipe:
            raise DataError(f"{shard}: made with another recipe than {shards[0]}")
    save_recipe(target, pipeline.recipe)
    ledger = Ledger(target / LEDGER)
    try:
        reconcile_graph(ledger, pipeline.stages)
        for shard in sorted(shards):
            _copy(ledger, shard / LEDGER)
            _copy_reviews(shard, target)
        return sum(run_barrier(ledger, stage) for stage in pipeline.stages if stage.is_barrier)
    finally:
        ledger.close()


def _copy(ledger: Ledger, source: Path) -> None:
    """One transaction per shard. Of a shard that is in already its new replies are taken, and what they cost.

    Its work is then done again here, answered by them.
    """
    name = f"merged:{source.parent.resolve()}"
    earlier = ledger.meta(name)
    with ledger.attached(source) as db:
        spent = {
            (stage, counter): value
            for stage, counter, value in db.execute("SELECT * FROM shard.tally").fetchall()
            if counter in SPENDING_COUNTERS
        }
        db.execute("INSERT OR IGNORE INTO call SELECT * FROM shard.call")
        if earlier is None:
            for table in ("record", "work"):
                db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM shard.{table}")
            added = db.execute("SELECT * FROM shard.tally").fetchall()
        elif earlier == "done":  # by a version that did not note what had been spent
            added = []
        else:
            before = {(stage, counter): value for stage, counter, value in json.loads(earlier)}
            added = [(*key, value - before.get(key, 0.0)) for key, value in spent.items()]
        db.executemany(
            "INSERT INTO tally VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
            added,
        )
        noted = json.dumps([[*key, value] for key, value in spent.items()])
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, noted))


def _vector(ledger: Ledger, stage: str, record: bytes) -> bytes:
    """The vector that a stage above got for a row, or for what the row was made of."""
    current: bytes | None = record
    while current is not None:
        for reply in ledger.replies_of(current):
            if "vector" in reply.reply:
                return base64.b64decode(reply.reply["vector"])
        _, current, _ = ledger.parent(current)
    raise DataError(f"stage {stage!r}: a row has no vector", hint="put a stage `embed` above it")


def run_barrier(ledger: Ledger, stage: PreparedStage) -> int:
    """Decide over all rows of a stage at once and make the ledger agree; returns how many decisions changed.

    The decision depends on the set of rows only, so a kill in the middle is repaired by running it again, and
    rows that arrive later (a retry, a merge of shards) may change what was decided before.
    """
    # Only ids and states are held; the rows stream through the decision.
    before = list(ledger.inputs(stage.name))
    rows = ((record, decode(ledger.payload(record))) for record, _, _ in before)
    if stage.kind.decide_by_vector is not None:
        with_vectors = ((record, row, _vector(ledger, stage.name, record)) for record, row in rows)
        drops = stage.kind.decide_by_vector(with_vectors, stage.knobs)
    else:
        assert stage.kind.decide is not None
        drops = stage.kind.decide(rows, stage.knobs)
    changed = 0
    for start in range(0, len(before), PAGE):
        with ledger.transaction() as db:
            batch: list[Effects] = []
            for record, state, rule in before[start : start + PAGE]:
                drop = drops.get(record)
                if (state, rule) == ((DONE, None) if drop is None else (FILTERED, drop[0])):
                    continue
                changed += 1
                if state == DONE:
                    tables.delete_outputs(db, stage.name, record)
                effects = Effects(stage=stage.name, record=record, cfg=stage.cfg, consumers=stage.consumers)
                if drop is None:
                    effects.state, effects.children = DONE, children_of(stage.name, record, [None])
                else:
                    effects.state, effects.failure_class, effects.reason = FILTERED, *drop
                batch.append(effects)
            tables.apply(db, batch)
    return changed


def reconcile_graph(ledger: Ledger, stages: Sequence[PreparedStage]) -> None:
    """Make an existing ledger fit the recipe: new stages get their work, changed ones are done again.

    What depends on a changed stage goes with its rows; everything else stays.
    """
    shape = digest([[stage.name, sorted(stage.config.takes)] for stage in stages]).hex()
    if ledger.meta("graph") != shape:
        ledger.fit_graph(
            {stage.name: stage.config.takes or (f"root:{stage.name}",) for stage in stages}, shape
        )
    configurations = digest([[stage.name, stage.cfg.hex()] for stage in stages]).hex()
    if ledger.meta("configurations") == configurations:
        return
    for stage in stages:
        ledger.invalidate(stage.name, stage.cfg)
    ledger.drop_idle_counters()
    ledger.set_meta("configurations", configurations)


def _copy_reviews(shard: Path, target: Path) -> None:
    """What people said of the shard's rows; what its ledger holds of older versions is in there."""
    reviews = open_reviews(shard, create=False)
    if reviews is None:
        return
    with reviews:
        merged = open_reviews(target)
        assert merged is not None
        with merged:
            merged.take(reviews, str(shard.resolve()))
