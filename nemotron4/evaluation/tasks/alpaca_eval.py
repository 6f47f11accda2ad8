"""AlpacaEval 2: 805 instructions against gpt-4-1106-preview, which is also the judge, length-controlled.

The judge answers one token, m (the output shown first) or M, and its log-probabilities are the preference: a
judge without log-probabilities cannot give this number. The model is shown first or second by a seeded draw
per instruction. Decoding of the card is unpublished; greedy with at most 4,096 new tokens is the definition
here, and ``alpaca_eval_sampled`` draws at temperature 0.7, at most 2,048 tokens. The baseline answers are
CC BY-NC 4.0 and are read from the user's copy.
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, JudgeRequest, Judgment, Metric, Outcome, Task, user
from nemotron4.grading import judgments
from nemotron4.grading.length_control import GamedRow, length_controlled
from nemotron4.grading.score import Score, unscored
from nemotron4.grading.statistics import Interval, standard_error
from nemotron4.records import Message

_SOURCE = "tatsu-lab/alpaca_eval @cd543a1"
_URL = "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/"
REFERENCE = DataFile(
    path="alpaca_eval_2/reference_gpt4_1106_preview.json.gz",
    sha256="b048c206996e29220fb417101e69219b6ca6ad40e17c3b889f1314394df09e24",
    source=_SOURCE + ", results/gpt4_1106_preview/model_outputs.json",
    licence="CC BY-NC 4.0",
    url=_URL + "results/gpt4_1106_preview/model_outputs.json",
    same_rows=("83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",),
)
JUDGE_PROMPT = DataFile(
    path="alpaca_eval_2/judge_prompt_alpaca_eval_clf.txt",
    sha256="784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62",
    source=_SOURCE + ", src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
    licence="Apache-2.0",
    url=_URL + "src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
)
DIFFICULTY = DataFile(
    path="alpaca_eval_2/instruction_difficulty.csv",
    sha256="cc8c530bfecf6270afacf32a15d08f95374e04e275a5b0c6861b4949a8b80640",
    source="tatsu-lab/alpaca_eval on the hub (stand-in derived from the repository's published weights)",
    licence="CC BY-NC 4.0",
)
GAMED = DataFile(
    path="alpaca_eval_2/df_gamed_equivalent.csv.gz",
    sha256="675c3f593324f15babfab3b66c6b60973a2210a65fee004ca17e13b03d028f1f",
    source="tatsu-lab/alpaca_eval on the hub, df_gamed.csv (stand-in derived from the repository)",
    licence="CC BY-NC 4.0",
)
Shown = Literal["m", "M"]


def load(source: DataSource) -> list[Item]:
    content = source.main(REFERENCE)
    items = []
    for position, row in enumerate(content.rows()):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise DataError(f"{content.path}: row {position}: expected instruction and output")
        fields = {"baseline": row["output"]}
        items.append(
            Item(
                id=str(position),
                messages=user(row["instruction"]),
                group=row.get("dataset", ""),
                fields=fields,
            )
        )
    return items


def model_is_shown_as(instruction: str, seed: int = 0) -> Shown:
    """The draw of the order: m if the model's output comes first."""
    return random.Random(f"{seed} {instruction}").choice(("m", "M"))


def judge_requests(
    items: Sequence[Item], responses: Mapping[str, Sequence[str]], source: DataSource
) -> list[JudgeRequest]:
    template = source.read(JUDGE_PROMPT).text()
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n<\|im_end\|>", template, re.DOTALL)
    requests = []
    for item in items:
        if item.id not in responses:
            continue
        shown = model_is_shown_as(item.messages[0].content)
        outputs = (responses[item.id][0], item.fields["baseline"])
        first, second = outputs if shown == "m" else outputs[::-1]
        values = {"{instruction}": item.messages[0].content, "{output_1}": first, "{output_2}": second}
        filled = [Message(role, _fill(text, values)) for role, text in turns]
        sampling = Sampling(max_tokens=1, temperature=1.0, top_logprobs=5)
        fields = {"model_shown": shown}
        requests.append(
            JudgeRequest(id=item.id, part=1, messages=tuple(filled), sampling=sampling, fields=fields)
        )
    return requests


def _fill(template: str, values: Mapping[str, str]) -> str:
    """All placeholders in one pass: the texts contain braces, and may contain a placeholder's name."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], template)


def _read(judgment: Judgment) -> Score:
    try:
        return _preference(judgment)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"judgment {judgment.id}: not log-probabilities of m and M: {error!r}") from error


def _preference(judgment: Judgment) -> Score:
    """From log-probabilities (with the order, else the baseline was first) or the package's stored number."""
    fields = judgment.fields
    if isinstance(fields.get("preference"), int | float):
        return judgments.stored_preference(fields["preference"])
    logprobs = fields.get("logprobs", fields.get("top_logprobs"))
    if logprobs is None and ("m" in fields or "M" in fields):
        logprobs = {token: fields[token] for token in ("m", "M") if token in fields}
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
        logprobs = (logprobs["content"] or [{}])[0].get("top_logprobs")
    if isinstance(logprobs, list):
        logprobs = judgments.top_logprobs(logprobs)
    if not isinstance(logprobs, Mapping):
        return unscored("no log-probabilities")
    shown = fields.get("model_shown", "M")
    if shown not in ("m", "M"):
        raise DataError(f"judgment {judgment.id}: model_shown is {shown!r}; expected 'm' or 'M'")
    return judgments.preference(logprobs, shown)


def score(inputs: Inputs) -> Outcome:
    reasons: Counter[str] = Counter()
    found = {judgment.id: _read(judgment) for judgment in inputs.judgments}
    reasons.update(str(one.reason) for one in found.values() if not one.is_scored)
    if found and reasons["no log-probabilities"] == len(found):
        raise DataError(
            "no judgment has log-probabilities, without which AlpacaEval 2 is undefined",
            hint='judgments need {"id", "logprobs": {"m": x, "M": y}, "model_shown": "m" or "M"}',
        )
    if missing := len(inputs.items) - len(found):
        reasons["no judgment"] = missing
    values = [one.value for one in found.values() if one.value is not None]
    error = 100 * standard_error(values)
    rate = 100 * sum(values) / len(values) if values else None
    raw = Metric(rate, sum(values), len(values), _normal(rate, error))
    controlled, note = _length_controlled(inputs, found)
    return Outcome(
        metrics={"win_rate": raw, "lc_win_rate": controlled},
        unscored=reasons,
        items={
            item.id: {
                "win_rate": 100 * one.value if (one := found.get(item.id)) and one.value is not None else None
            }
            for item in inputs.items
        },
        notes=note,
    )


def _normal(value: float | None, error: float) -> Interval | None:
    if value is None or math.isnan(error):
        return None
    return Interval(
        value - 1.96 * error, value + 1.96 * error, "1.96 standard errors, as the package reports"
    )


def _length_controlled(inputs: Inputs, found: Mapping[str, Score]) -> tuple[Metric, tuple[str, ...]]:
    """Difficulties belong to row positions, so the fit needs the whole set."""
    preferences = [found[item.id].value for item in inputs.items if item.id in found]
    if len(preferences) != len(inputs.items) or None in preferences or not preferences:
        return Metric(None), ("lc_win_rate needs every instruction judged with log-probabilities",)
    if missing := [item.id for item in inputs.items if item.id not in inputs.responses]:
        return Metric(None), (f"lc_win_rate needs every response: {len(missing)} are missing",)
    difficulty = [float(row["instruction_difficulty"]) for row in _csv(inputs.source, DIFFICULTY)]
    gamed = [
        GamedRow(float(row["preference"]), float(row["std_delta_len"]), float(row["instruction_difficulty"]))
        for row in _csv(inputs.source, GAMED)
    ]
    if len(difficulty) != len(inputs.items):
        return Metric(None), (f"lc_win_rate has difficulties for {len(difficulty)} instructions only",)
    fit = length_controlled(
        [value for value in preferences if value is not None],
        [len(item.fields["baseline"]) for item in inputs.items],
        [len(inputs.responses[item.id][0]) for item in inputs.items],
        difficulty,
        gamed,
    )
    metric = Metric(fit.win_rate, None, len(inputs.items), _normal(fit.win_rate, fit.standard_error))
    weights = ", ".join(f"{weight:.4f}" for weight in fit.weights)
    return metric, (
        f"length control: weights (length, difficulty, model) {weights}; C {fit.inverse_penalty:.4g}",
    )


def _csv(source: DataSource, file: DataFile) -> list[dict[str, str]]:
    return list(csv.DictReader(source.read(file).text().splitlines()))


ALPACA_EVAL = Task(
    name="alpaca_eval",
    title="AlpacaEval 2 LC",
    files=(REFERENCE, JUDGE_PROMPT, DIFFICULTY, GAMED),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=4096),
    prompt="{instruction}",
    card={"lc_win_rate": 41.5},
    on_failure="wrong",  # alpaca_eval judges a refused answer as an empty one
    judge=judge_requests,
    card_judge="gpt-4-1106-preview",
)
ALPACA_EVAL_SAMPLED = replace(
    ALPACA_EVAL,
    name="alpaca_eval_sampled",
    title="AlpacaEval 2 LC, sampled answers",
    sampling=Sampling(max_tokens=2048, temperature=0.7, seed=0),
    card={},
)
