"""What a recipe trains on: its shape, and its rows as samples, read and checked before anything trains."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.cache import resolve
from nemotron4.checkpoint.derived import ExtendedCheckpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.errors import ConfigError, DataError, TemplateError, unknown_name
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import PRESETS
from nemotron4.text.prompt import chosen_format
from nemotron4.training.cache import StoredSamples, cache_key, stored
from nemotron4.training.corpus import CorpusWindows, Packing
from nemotron4.training.dataset import ConcatDataset, EpochOrder, TextWindows
from nemotron4.training.encoding import Encoder, Problem, ReadRow, RowError, RowKind, fitting
from nemotron4.training.indexed import IndexedCorpus, is_corpus
from nemotron4.training.reading import Ignored, TrainingSource, read_rows, refuse_too_many
from nemotron4.training.recipe import Recipe
from nemotron4.training.rows import ALL_ATTRIBUTES
from nemotron4.training.samples import Sample

RECORD_FILE = "run.json"
DATE = "date in the prompt"  # what the record calls it


@dataclass(frozen=True)
class Data:
    """What the recipe's files hold, read and checked before anything trains.

    ``fingerprint`` is of everything that trains: tokens, masks and labels, in order.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    problems: Sequence[Problem]
    source_sizes: tuple[int, ...] = ()
    share_left_out: float = 0.0  # of the training rows
    fingerprint: str = ""
    orders: Mapping[int, Callable[[int], EpochOrder]] = field(
        default_factory=dict
    )  # of sources with their own
    ignored: Sequence[str] = ()  # a line for each file with columns that nothing reads, or rows that were cut


def open_start(recipe: Recipe) -> Checkpoint:
    """What the run starts from, with an adapter in its weights where the recipe names one."""
    base = open_checkpoint(recipe.model.start or recipe.model.tokenizer or "")
    if recipe.model.adapter is not None:
        base = MergedCheckpoint(base, resolve(recipe.model.adapter))
    if recipe.model.new_tokens:
        base = ExtendedCheckpoint(base, recipe.model.new_tokens)
    choose_format(recipe, base)
    return base


def choose_format(recipe: Recipe, base: Checkpoint) -> None:
    """Use the format that the recipe names; a template that writes the date gets that of the run's start."""
    if recipe.model.prompt_format is not None:
        base.chosen_format = chosen_format(recipe.model.prompt_format, base.tokenizer())
    found = base.prompt_format()
    if found is not None and found.writes_date:
        record = recipe.run.directory / RECORD_FILE
        facts = json.loads(record.read_text("utf-8")).get("facts", {}) if record.is_file() else {}
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        base.chosen_format = found.of_day(facts.get(DATE) or today)


def model_config(recipe: Recipe, base: Checkpoint) -> ModelConfig:
    """The shape to train: the checkpoint's, or the preset's with the tokenizer's vocabulary."""
    if recipe.model.preset is None:
        config = base.config
    else:
        config = preset_config(recipe.model.preset)
        needed = base.tokenizer().vocab_size
        if config.vocab_size < needed:
            config = replace(config, vocab_size=-(-needed // 64) * 64)
    if recipe.kind.has_reward_head:
        return replace(config, num_reward_attributes=len(ALL_ATTRIBUTES))
    return config


def shape_config(recipe: Recipe) -> ModelConfig:
    """The shape that the recipe says its start has, for when the start is not here."""
    config = preset_config(recipe.model.shape or recipe.model.preset or "")
    num_outputs = len(ALL_ATTRIBUTES) if recipe.kind.has_reward_head else 0
    return replace(config, num_reward_attributes=num_outputs)


def preset_config(name: str) -> ModelConfig:
    if name not in PRESETS:
        message, hint = unknown_name("preset", name, PRESETS)
        raise ConfigError(message, hint=hint)
    return PRESETS[name]()


def build_encoder(recipe: Recipe, base: Checkpoint, config: ModelConfig) -> Encoder:
    if recipe.data.max_length > config.context_length:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}; the model's context is {config.context_length}",
            hint=f"data.max_length={config.context_length}",
        )
    virtual: tuple[int, ...] = ()
    if recipe.adapter is not None and recipe.adapter.kind == "p_tuning":
        virtual = tuple(range(config.vocab_size, config.vocab_size + recipe.adapter.num_virtual_tokens))
    return Encoder(
        base.tokenizer(),
        base.prompt_format(),
        recipe.data.max_length,
        recipe.data.over_long,
        base.bos_token_id if base.adds_bos else None,
        virtual,
        recipe.batch.row_tokens,
    )


def read_data(recipe: Recipe, encoder: Encoder) -> Data:
    """Every row read and encoded; DataError if more rows are bad than the recipe allows."""
    groups = [
        [
            _corpus(recipe, source, encoder) if is_corpus(source.path) else _read(recipe, source, encoder)
            for source in sources
        ]
        for sources in recipe.data.sources
    ]
    problems: list[Problem] = []
    stored = [[part for part in group if isinstance(part, StoredSamples)] for group in groups]
    for parts in stored:
        bad = [problem for part in parts for problem in part.problems]
        refuse_too_many(bad, sum(map(len, parts)) + len(bad), recipe.data.max_bad_rows)
        problems += bad
    train, validation = (
        [_windows(recipe, part, encoder) if isinstance(part, StoredSamples) else part for part in group]
        for group in groups
    )
    orders = {place: part.order for place, part in enumerate(train) if isinstance(part, CorpusWindows)}
    if orders and len(train) > 1 and not recipe.data.shares:
        raise ConfigError("data.train has an indexed corpus and more sources; give each a weight")
    for source, share, part in zip(recipe.data.sources[0], recipe.data.shares, train, strict=False):
        if share and not len(part):
            raise DataError(
                f"{source.path}: no row of it can train, and its weight is {share:g}",
                hint="see nemotron4 doctor data, or leave the source out",
            )
    total = sum(len(part) + len(part.problems) for part in stored[0])
    hashes = [
        [part.facts["hash"] if isinstance(part, StoredSamples) else part.fingerprint for part in group]
        for group in groups
    ]
    return Data(
        ConcatDataset(train),
        ConcatDataset(validation),
        problems,
        tuple(len(part) for part in train),
        share_left_out=sum(len(part.problems) for part in stored[0]) / total if total else 0.0,
        fingerprint=hashlib.sha256(repr(hashes).encode()).hexdigest(),
        orders=orders,
        ignored=list(
            dict.fromkeys(line for parts in stored for part in parts for line in part.facts["ignored"])
        ),
    )


def _corpus(recipe: Recipe, source: TrainingSource, encoder: Encoder) -> CorpusWindows:
    if not recipe.kind.reads_documents:
        raise ConfigError(f"{source.path}: an indexed corpus, which stage {recipe.stage} does not read")
    given = [name for name in ("kind", "map", "ignore") if getattr(source, name)]
    if given or source.encoding != "utf-8":
        raise ConfigError(
            f"{source.path}: an indexed corpus has tokens and no {given[0] if given else 'text'}"
        )
    if encoder.virtual_ids:
        raise ConfigError(f"{source.path}: an indexed corpus; P-tuning trains on text here")
    packing = Packing(
        recipe.data.max_length, encoder.separator, encoder.tokenizer.vocab_size, recipe.data.cross_documents
    )
    return CorpusWindows(IndexedCorpus(source.path), packing, seed=recipe.run.seed, limit=source.limit)


def _read(recipe: Recipe, source: TrainingSource, encoder: Encoder) -> StoredSamples:
    kind = source_kind(recipe, source)
    if recipe.kind.reads_documents:
        encoder.separator  # noqa: B018 -- a tokenizer without one is refused before any row is read
        encoder = replace(encoder, virtual_ids=(), max_length=2**31, row_tokens=None)
    return encoded(source, kind, encoder)


def source_kind(recipe: Recipe, source: TrainingSource) -> RowKind:
    """What the rows of a source are: the stage's usual kind, or another that it reads."""
    if source.kind is None:
        return recipe.kind.kind(recipe.settings)
    known = {kind.name: kind for kind in recipe.kind.kinds}
    if source.kind not in known:
        message, hint = unknown_name(f"kind of rows in stage {recipe.stage}", source.kind, known)
        raise ConfigError(f"{source.path}: {message}", hint=hint)
    return known[source.kind]


def encoded(source: TrainingSource, kind: RowKind, encoder: Encoder) -> StoredSamples:
    """The samples of a source, from the cache if they are there."""
    ignored = Ignored()
    cut: Counter[str] = Counter()

    def on_row(read: ReadRow, sample: Sample) -> None:
        cut[read.where.rpartition(":")[0]] += sample.was_cut

    def lines() -> list[str]:
        told = f"cut to data.max_length, {encoder.max_length} tokens"
        return [*ignored.lines(), *(f"{file}: {num:,} rows {told}" for file, num in cut.items() if num)]

    return stored(
        cache_key([source], kind, encoder),
        lambda: encode_rows(read_rows(source, kind, ignored), kind, encoder, on_row),
        lines,
    )


def encode_rows(
    rows: Iterator[ReadRow | Problem],
    kind: RowKind,
    encoder: Encoder,
    on_row: Callable[[ReadRow, Sample], None] = lambda row, sample: None,
) -> Iterator[Sample | Problem]:
    """Samples of the rows that can train, and the problem of each that cannot."""
    problems: list[Problem] = []

    def good() -> Iterator[ReadRow]:
        for read in rows:
            if isinstance(read, Problem):
                problems.append(read)
            else:
                yield read

    for read, row in kind.related(good()):
        yield from problems
        problems.clear()
        try:
            if isinstance(row, RowError):
                raise row
            sample = fitting(kind.sample(row, encoder), encoder, trains_text=kind.trains_text)
            sample = replace(sample, where=read.where)
        except (TemplateError, RowError) as error:
            yield Problem(read.where, str(error).replace("\nhint: ", "; "))
            continue
        on_row(read, sample)
        yield sample
    yield from problems


def _windows(recipe: Recipe, part: StoredSamples, encoder: Encoder) -> Sequence[Sample]:
    if not recipe.kind.reads_documents:
        return part
    starts = [0, *part.arrays["segments"].tolist()]
    if recipe.data.cross_documents:
        starts = [0, starts[-1]]
    return TextWindows(part.arrays["tokens"], starts, recipe.data.max_length, encoder.virtual_ids)
