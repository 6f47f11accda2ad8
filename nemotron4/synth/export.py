"""From the ledger to files: chat and preference rows in several forms, Parquet, and a data card.

Rows are in the order of their ids, which are hashes: the order is fixed and mixed. The folder appears under
its name only when it is whole, and holds nothing that depends on when or how often the run was started.
What people reviewed counts: rejected rows are left out and counted, answers they rewrote are as rewritten,
and their preferences and ratings are files of their own.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, DataError, import_optional
from nemotron4.records import Conversation, JsonObject, Message, PreferencePair, write
from nemotron4.runs import publish, write_json
from nemotron4.synth.accounting import read_accounting
from nemotron4.synth.card import write_card
from nemotron4.synth.columns import columns_of
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.review import Labels, open_reviews
from nemotron4.synth.rows import Dialogue, JudgedPair, Prompt, decode
from nemotron4.text import prompt as prompt_text

EXPORT = "export"


@dataclass(frozen=True)
class Exported:
    """What an export wrote: rows per file, and what it could not write."""

    folder: Path
    counts: dict[str, int]
    notes: tuple[str, ...] = ()


def export(folder: Path, recipe: SynthRecipe, *, is_partial_allowed: bool = False) -> Exported:
    """Write ``folder/export``. A run that is not finished is refused unless a partial export is asked for."""
    target = folder / EXPORT
    partial = folder / f".{EXPORT}.partial-{os.getpid()}"
    _remove_leftovers(folder)
    with Reader(folder / "ledger.sqlite") as ledger:
        accounting = read_accounting(ledger, recipe)
        is_enough = bool(recipe.target) and all(
            accounting.stage(name).rows_made >= number for name, number in recipe.target.items()
        )
        if accounting.num_pending and not is_partial_allowed and not is_enough:
            raise DataError(
                f"{folder}: {accounting.num_pending} pieces of work are pending",
                hint="finish the run, or export what is there with --partial",
            )
        if not accounting.is_balanced:
            raise DataError(f"{folder}: the accounting does not balance", hint="see `synth status`")
        try:
            partial.mkdir(parents=True)
            labels = _labels(folder)
            counts = _write_files(ledger, recipe, partial, labels)
            notes = _write_parquet(partial, counts)
            exported = set(recipe.export.stages)
            reviews = labels.counts(ledger, exported)
            write_card(partial, recipe, accounting, counts, ledger, reviews)
            stages = [stage.to_json() for stage in accounting.stages]
            counted = {"balanced": accounting.is_balanced, "stages": stages, "reviews": reviews}
            write_json(partial / "accounting.json", counted)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    old = folder / f".{EXPORT}.old"
    if target.exists():
        target.rename(old)
    publish(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    return Exported(target, counts, notes)


def _labels(folder: Path) -> Labels:
    reviews = open_reviews(folder, create=False)
    if reviews is None:
        return Labels({})
    with reviews:
        return Labels(reviews.by_item())


def _remove_leftovers(folder: Path) -> None:
    """What a killed export left; an old export whose replacement never came is put back."""
    old = folder / f".{EXPORT}.old"
    if old.exists():
        if (folder / EXPORT).exists():
            shutil.rmtree(old)
        else:
            old.rename(folder / EXPORT)
    for leftover in folder.glob(f".{EXPORT}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def rows_of(
    ledger: Reader, stages: Sequence[str], labels: Labels, limits: Mapping[str, int]
) -> Iterator[tuple[str, str, Any]]:
    """(record id, stage, row) of some stages in the order of ids, as people left and corrected them."""
    streams = [zip(islice(ledger.records_of(stage), limits.get(stage)), repeat(stage)) for stage in stages]
    for record, stage in heapq.merge(*streams):
        if not labels.is_rejected(record):
            yield record.hex(), stage, labels.corrected(record, decode(ledger.payload(record)))


Form = Callable[[str, str, Any], Conversation | PreferencePair | JsonObject]


def _write_files(ledger: Reader, recipe: SynthRecipe, folder: Path, labels: Labels) -> dict[str, int]:
    wanted: list[tuple[str, tuple[str, ...], Form]] = [
        ("sft.jsonl", recipe.export.sft, _conversation),
        ("preference.jsonl", recipe.export.preference, _preference),
        ("preference.trl.jsonl", recipe.export.preference, _trl),
        ("preference.nemo_aligner.jsonl", recipe.export.preference, _nemo_aligner),
        ("prompts.jsonl", recipe.export.prompts, _prompt),
        ("records.jsonl", recipe.export.records, _record),
    ]
    counts: dict[str, int] = {}
    for name, stages, form in wanted:
        if stages:
            counts[name] = write(
                folder / name, (form(*entry) for entry in rows_of(ledger, stages, labels, recipe.target))
            )
    for name, rows in (
        ("human_preference.jsonl", labels.preferences(ledger)),
        ("human_reward.jsonl", labels.ratings(ledger)),
    ):
        if num_written := write(folder / name, rows):
            counts[name] = num_written
        else:
            (folder / name).unlink()
    return counts


def _meta(stage: str, prompt: Prompt | Dialogue) -> JsonObject:
    meta: JsonObject = {"stage": stage, "task": prompt.task, "topic": prompt.topic, "tags": list(prompt.tags)}
    if isinstance(prompt, Prompt):
        meta |= {"form": prompt.form, "constraints": [c.type for c in prompt.constraints]}
        meta |= {"document_id": prompt.document_id}
    return {name: value for name, value in meta.items() if value}


def _conversation(record: str, stage: str, row: Any) -> Conversation:
    """A dialogue; of a pair the prompt with the chosen answer."""
    if isinstance(row, Dialogue):
        return Conversation(id=record, messages=row.messages, meta=_meta(stage, row) | row.meta)
    if isinstance(row, JudgedPair):
        answer = Message("assistant", row.chosen.text)
        return Conversation(id=record, messages=(*row.prompt.messages, answer), meta=_meta(stage, row.prompt))
    raise DataError(f"stage {stage!r} makes {type(row).__name__} rows; sft needs dialogues or judged pairs")


def _judged(stage: str, row: Any) -> JudgedPair:
    if not isinstance(row, JudgedPair):
        raise DataError(f"stage {stage!r} makes {type(row).__name__} rows; preference needs judged pairs")
    return row


def _preference(record: str, stage: str, row: Any) -> PreferencePair:
    row = _judged(stage, row)
    meta = _meta(stage, row.prompt) | {"judge": row.judge, "scores": row.scores}
    meta |= {"chosen_model": row.chosen.model, "rejected_model": row.rejected.model}
    return PreferencePair(
        id=record,
        prompt=row.prompt.messages,
        chosen=row.chosen.text,
        rejected=row.rejected.text,
        chosen_reward=row.chosen_reward,
        rejected_reward=row.rejected_reward,
        meta=meta,
    )


def _trl(record: str, stage: str, row: Any) -> JsonObject:
    """TRL's conversational preference form with an explicit prompt."""
    row = _judged(stage, row)
    return {
        "prompt": [message.to_json() for message in row.prompt.messages],
        "chosen": [{"role": "assistant", "content": row.chosen.text}],
        "rejected": [{"role": "assistant", "content": row.rejected.text}],
        "score_chosen": row.chosen_reward,
        "score_rejected": row.rejected_reward,
    }


def _nemo_aligner(record: str, stage: str, row: Any) -> JsonObject:
    """NeMo-Aligner's DPO and RPO form: rendered prompt, answers that end with the next turn's marker."""
    row = _judged(stage, row)
    return {
        "prompt": prompt_text.render(row.prompt.messages),
        "chosen_response": f"{row.chosen.text}\n<extra_id_1>",
        "rejected_response": f"{row.rejected.text}\n<extra_id_1>",
        "chosen_reward": row.chosen_reward,
        "rejected_reward": row.rejected_reward,
    }


def _record(record: str, stage: str, row: Any) -> JsonObject:
    return {"id": record, **columns_of(row)}


def _prompt(record: str, stage: str, row: Any) -> JsonObject:
    prompt: Prompt = row if isinstance(row, Prompt) else row.prompt
    return {
        "id": record,
        "messages": [message.to_json() for message in prompt.messages],
        "meta": _meta(stage, prompt) | ({"answer": prompt.answer} if prompt.answer else {}),
    }


def _table(source: Path, arrow: Any) -> Any:
    """The rows of JSON lines. Texts that look like dates stay texts."""
    with source.open("rb") as lines:
        block = max(1 << 20, 2 * max(len(line) for line in lines))
    options = arrow.json.ReadOptions(block_size=block)
    table = arrow.json.read_json(source, read_options=options)
    schema = arrow.schema([field.with_type(_undated(field.type, arrow)) for field in table.schema])
    if schema == table.schema:
        return table
    as_text = arrow.json.ParseOptions(explicit_schema=schema)
    return arrow.json.read_json(source, read_options=options, parse_options=as_text)


def _undated(kind: Any, arrow: Any) -> Any:
    if arrow.types.is_timestamp(kind):
        return arrow.string()
    if arrow.types.is_list(kind):
        return arrow.list_(_undated(kind.value_type, arrow))
    if arrow.types.is_struct(kind):
        return arrow.struct([field.with_type(_undated(field.type, arrow)) for field in kind])
    return kind


def _write_parquet(folder: Path, counts: dict[str, int]) -> tuple[str, ...]:
    """The rows to train on as Parquet too, counted; what is missing for it is said."""
    try:
        pyarrow = import_optional("pyarrow", "Parquet")
    except ConfigError as error:
        return (f"no Parquet was written: {error.message}; {error.hint}",)
    for module in ("pyarrow.json", "pyarrow.parquet"):
        import_optional(module, "Parquet")
    for name in ("sft", "preference", "prompts"):
        source = folder / f"{name}.jsonl"
        if not counts.get(source.name):
            continue
        pyarrow.parquet.write_table(
            _table(source, pyarrow), source.with_suffix(".parquet"), compression="zstd"
        )
        counts[f"{name}.parquet"] = counts[source.name]
    return ()
