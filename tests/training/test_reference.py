"""Reference log-probabilities beside the data: kept while they are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

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
