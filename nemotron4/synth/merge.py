"""Shards into one ledger. The result does not depend on the order of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemotron4.errors import DataError
from nemotron4.synth.ledger import Ledger
from nemotron4.synth.prepare import Prepared
from nemotron4.synth.project import LEDGER, load_saved_recipe, save_recipe
from nemotron4.synth.runner import reconcile_graph, run_barrier


def merge(shards: Sequence[Path], target: Path, prepared: Prepared) -> int:
    """Copy all shards into ``target`` and decide anew what spans them; returns the decisions that changed.

    Stages that see all rows at once (duplicates, samples) saw only their shard's; what they decide now may
    remove rows, or free some, which then are ready work in the merged run.
    """
    for shard in shards:
        if not (shard / LEDGER).exists():
            raise DataError(f"{shard}: there is no ledger here", hint="name the folders of finished shards")
        if load_saved_recipe(shard) != prepared.recipe:
            raise DataError(f"{shard}: made with another recipe than {shards[0]}")
    save_recipe(target, prepared.recipe)
    ledger = Ledger(target / LEDGER)
    try:
        reconcile_graph(ledger, prepared.stages)
        for shard in sorted(shards):
            _copy(ledger, shard / LEDGER)
        return sum(run_barrier(ledger, stage) for stage in prepared.stages if stage.is_barrier)
    finally:
        ledger.close()


def _copy(ledger: Ledger, source: Path) -> None:
    """One transaction per shard; a shard that is in already changes nothing."""
    name = f"merged:{source.parent.resolve()}"
    if ledger.meta(name) is not None:
        return
    with ledger.attached(source) as db:
        for table in ("record", "work", "call", "note"):
            db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM shard.{table}")
        db.execute(
            "INSERT INTO tally SELECT * FROM shard.tally WHERE true "
            "ON CONFLICT DO UPDATE SET value = value + excluded.value"
        )
        db.execute("INSERT INTO meta VALUES (?, 'done')", (name,))
