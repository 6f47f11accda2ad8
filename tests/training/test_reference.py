"""Reference log-probabilities beside the data: kept while they are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemotron4.errors import TrainingError
from nemotron4.training import reference
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.metrics import Part
from nemotron4.training.reference import with_reference
from tests.training import tiny


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ROWS", 2)
    samples, engine = tiny.pairs(7, with_reference=False), TrainingEngine(tiny.logprob_scorer())
    whole = with_reference(samples, engine, cache=tmp_path / "whole", row_tokens=40)

    def stop_at_the_third_block(part: Part) -> None:
        assert (part.name, part.total) == ("reference log-probabilities", 7)
        if part.done == 4:
            raise KeyboardInterrupt

    cache = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        with_reference(samples, engine, cache=cache, row_tokens=40, on_part=stop_at_the_third_block)
    # A kill may leave half a line; it is computed again.
    cache.write_text(cache.read_text()[:-9])
    notes: list[str] = []
    again = with_reference(samples, engine, cache=cache, row_tokens=40, note=notes.append)
    assert notes == [f"reference log-probabilities: 4 rows to compute, 3 in {cache}"]
    with_reference(samples, engine, cache=cache, row_tokens=40, note=notes.append)
    assert len(notes) == 1
    for one, other in zip(whole, again, strict=True):
        assert other.reference == pytest.approx(one.reference, abs=1e-5)


def test_what_16_bits_round_otherwise_is_no_other_model(tmp_path: Path) -> None:
    samples, cache = tiny.pairs(7, with_reference=False), tmp_path / "cache"
    narrow = TrainingEngine(tiny.logprob_scorer(), compute=torch.bfloat16)
    found = with_reference(samples, narrow, cache=cache, row_tokens=40)
    reading = cache.read_text()
    for sample in found:
        for value, segment in zip(sample.reference, sample.segments, strict=True):
            reading = reading.replace(str(value), str(value - 0.02 * segment.num_trained))
    cache.write_text(reading)
    with_reference(samples, narrow, cache=cache, row_tokens=40)
    with pytest.raises(TrainingError, match="made by other weights or other code"):
        with_reference(samples, TrainingEngine(tiny.logprob_scorer()), cache=cache, row_tokens=40)
