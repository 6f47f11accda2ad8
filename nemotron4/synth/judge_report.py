"""How far to trust the judges of a run: position bias, agreement, length bias, solve rate."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from nemotron4.synth.effects import DONE, FILTERED
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import Recipe, StageConfig
from nemotron4.synth.rows import Judged, decode

_VERDICTS = re.compile(r"verdicts ([ABC]) and, swapped, ([ABC])(?:;|$)")


def judge_report(ledger: Reader, recipe: Recipe) -> list[str]:
    """One sentence per finding; read from the ledger's rows, so it is the same after any number of starts."""
    lines = []
    for stage in recipe.stage:
        if stage.kind == "judge_llm":
            lines += _position(ledger, stage)
        if stage.kind == "judge_truth":
            lines += _solve_rate(ledger, stage)
        if stage.kind.startswith("judge_"):
            lines += _length(ledger, stage)
    return lines


def _made(ledger: Reader, stage: str) -> Iterator[Judged]:
    for record in ledger.records_of(stage):
        row = decode(ledger.payload(record))
        assert isinstance(row, Judged)
        yield row


def _position(ledger: Reader, stage: StageConfig) -> list[str]:
    pairs: Counter[tuple[str, str]] = Counter()
    for record, state, _ in ledger.inputs(stage.name):
        if state == FILTERED:
            reason = next(reason for name, _, _, reason in ledger.work_of(record) if name == stage.name)
            if found := _VERDICTS.search(reason or ""):
                pairs[found[1], found[2]] += 1
    for row in _made(ledger, stage.name):
        first, second = row.scores["verdicts"]
        pairs[first, second] += 1
    total = pairs.total()
    if not total:
        return []
    agreed = sum(pairs[pair] for pair in (("A", "B"), ("B", "A"), ("C", "C")))
    said = Counter(verdict for pair, number in pairs.items() for verdict in pair for _ in range(number))
    decided = said["A"] + said["B"]
    position = f"{said['A'] / decided:.1%} of the decided verdicts" if decided else "no verdict"
    return [
        f"`{stage.name}`: of {total} pairs shown in both orders, {agreed / total:.1%} got agreeing verdicts; "
        f"the answer shown first was preferred in {position} (50 % is no position bias)."
    ]


def _solve_rate(ledger: Reader, stage: StageConfig) -> list[str]:
    """From the outcomes of whole prompts; answers of one prompt are right, wrong or mixed."""
    outcomes: Counter[str] = Counter()
    for _, state, rule in ledger.inputs(stage.name):
        if state == DONE:
            outcomes["mixed"] += 1
        elif state == FILTERED and rule in ("all right", "all wrong"):
            outcomes[rule] += 1
    total = outcomes.total()
    if not total:
        return []
    return [
        f"`{stage.name}`: of {total} graded prompts {outcomes['all right']} had only right answers, "
        f"{outcomes['all wrong']} only wrong ones, {outcomes['mixed']} both and so gave a pair."
    ]


def _length(ledger: Reader, stage: StageConfig) -> list[str]:
    number = longer = chosen = rejected = 0
    for row in _made(ledger, stage.name):
        number += 1
        longer += len(row.chosen.text) > len(row.rejected.text)
        chosen += len(row.chosen.text)
        rejected += len(row.rejected.text)
    if not number:
        return []
    return [
        f"`{stage.name}`: the chosen answer is the longer one in {longer / number:.1%} of {number} pairs; "
        f"mean lengths {chosen / number:.0f} and {rejected / number:.0f} characters (chosen, rejected)."
    ]
