"""Arena-Hard v0.1: 500 questions, two games each against gpt-4-0314, judged by gpt-4-1106-preview.

The score is the weighted win rate without style control. Decoding of the card is unpublished; greedy with at
most 4,096 new tokens is this project's definition; ``arena_hard_sampled`` draws at temperature 0.7.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, JudgeRequest, Metric, Outcome, Task, finite, user
from nemotron4.grading import judgments
from nemotron4.grading.score import Score
from nemotron4.grading.statistics import Interval, bootstrap_ratio
from nemotron4.records import Message

_SOURCE = "lmarena/arena-hard-auto @ddef8ef, "
_URL = "https://raw.githubusercontent.com/lmarena/arena-hard-auto/ddef8ef196211f3a3503c94f44e402dd20f262a4/"
QUESTIONS = DataFile(
    path="arena_hard_v0.1/question.jsonl.gz",
    sha256="4daad38811161c3ba5c248f26b90c3cef89634f4c772002ed9138c1e13f63e9f",
    source=_SOURCE + "data/arena-hard-v0.1/question.jsonl",
    licence="Apache-2.0",
    url=_URL + "data/arena-hard-v0.1/question.jsonl",
)
BASELINE = DataFile(
    path="arena_hard_v0.1/baseline_gpt-4-0314.jsonl.gz",
    sha256="245109b8fe7c3bef0304f1c559d29da377f97f61535ad1170b46a61a08eb9ac7",
    source=_SOURCE + "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
    licence="Apache-2.0 (GPT-4 text)",
    url=_URL + "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
)
JUDGE_CONFIG = DataFile(
    path="arena_hard_v0.1/judge_config.yaml",
    sha256="6e001736bacacdb1591ffca7eec953a7089f8f5604872d1ca4f9a6f9de1ee451",
    source=_SOURCE + "config/judge_config.yaml",
    licence="Apache-2.0",
    url=_URL + "config/judge_config.yaml",
)
RETRY = "continue your judgment and finish by outputting a final verdict label"


def load(source: DataSource) -> list[Item]:
    content = source.main(QUESTIONS)
    items = []
    for number, row in content.json_lines():
        try:
            text = row["turns"][0]["content"]
            items.append(Item(id=str(row["question_id"]), messages=user(text), group=row.get("cluster", "")))
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{content.path}:{number}: expected question_id and turns[0].content") from error
    return items


def judge_requests(
    items: Sequence[Item], responses: Mapping[str, Sequence[str]], source: DataSource
) -> list[JudgeRequest]:
    """Game 1 shows the baseline first, game 2 the model."""
    import yaml

    config: dict[str, Any] = yaml.safe_load(source.read(JUDGE_CONFIG).text())
    baseline = {
        str(row["question_id"]): row["choices"][0]["turns"][0]["content"]
        for row in source.read(BASELINE).rows()
    }
    sampling = Sampling(max_tokens=config["max_tokens"], temperature=config["temperature"])
    requests = []
    for item in items:
        if item.id not in responses:
            continue
        if item.id not in baseline:
            raise DataError(f"question {item.id} has no baseline answer")
        shown = (baseline[item.id], responses[item.id][0])
        for game, (first, second) in ((1, shown), (2, shown[::-1])):
            text = config["prompt_template"][0].format(
                question_1=item.messages[0].content, answer_1=first, answer_2=second
            )
            requests.append(
                JudgeRequest(
                    id=item.id,
                    part=game,
                    messages=(Message("system", config["system_prompt"]), Message("user", text)),
                    sampling=sampling,
                    is_usable=lambda reply: bool(judgments.verdict_labels(reply)),
                    retry=RETRY,
                )
            )
    return requests


def score(inputs: Inputs) -> Outcome:
    unscored: Counter[str] = Counter()
    games: dict[str, dict[int, judgments.Verdict]] = defaultdict(dict)
    for judgment in inputs.judgments:
        found = judgments.verdict(judgment.text, 1 if judgment.part == 1 else 2)
        if isinstance(found, Score):
            unscored[str(found.reason)] += 1
        else:
            games[judgment.id][judgment.part] = found
    if missing := 2 * len(inputs.items) - len(inputs.judgments):
        unscored["no judgment"] = missing
    # Questions in the order of the judgments, as the official interval depends on the order of battles.
    battles_of = {
        name: judgments.battles([verdicts[game] for game in sorted(verdicts)])
        for name, verdicts in games.items()
    }
    outcomes = [
        outcome
        for name in dict.fromkeys(j.id for j in inputs.judgments)
        for outcome in battles_of.get(name, [])
    ]
    official = judgments.battle_interval(outcomes)
    found_again = bootstrap_ratio(
        [sum(b) for b in battles_of.values()], [float(len(b)) for b in battles_of.values()], seed=inputs.seed
    )
    by_question = Interval(100 * found_again.lower, 100 * found_again.upper, found_again.method)
    metrics = {
        "score": Metric(
            finite(judgments.win_rate(outcomes)),
            sum(outcomes),
            len(outcomes),
            by_question if outcomes else None,
        ),
        "lower": Metric(finite(official.lower)),
        "upper": Metric(finite(official.upper)),
    }
    return Outcome(
        metrics=metrics,
        unscored=unscored,
        items={
            item.id: {"score": 100 * sum(b) / len(b) if (b := battles_of.get(item.id)) else None}
            for item in inputs.items
        },
        notes=(f"lower and upper: {official.method}",),
    )


ARENA_HARD = Task(
    name="arena_hard",
    title="Arena-Hard v0.1",
    files=(QUESTIONS, BASELINE, JUDGE_CONFIG),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=4096),
    prompt="{question}",
    card={"score": 54.2},
    on_failure="wrong",  # arena-hard-auto judges what it writes in place of a failed answer
    judge=judge_requests,
    card_judge="gpt-4-1106-preview",
    verdicts=judgments.LABELS,
    needs_responses=False,
)
ARENA_HARD_SAMPLED = replace(
    ARENA_HARD,
    name="arena_hard_sampled",
    title="Arena-Hard v0.1, sampled answers",
    sampling=Sampling(max_tokens=4096, temperature=0.7, seed=0),
    card={},
)
