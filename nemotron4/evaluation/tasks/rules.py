"""Benchmarks decided by rules: IFEval (does it follow the instructions?) and TFEval (does it stay on topic?).

IFEval: 541 prompts, 834 verifiable instructions; the prompt alone, greedy.

TFEval: the card's set is the 20 banking dialogues of CantTalkAboutThis; dialogues of other domains give
another number under the same definition. Every bot turn of a dialogue is one on-topic turn, every distractor
one distractor turn; which on-topic turns the card evaluated is not published.
"""

from __future__ import annotations

import re

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Metric, Outcome, Task, answered, finite, share, user
from nemotron4.grading import instructions, refusals
from nemotron4.grading.statistics import Interval, bootstrap_ratio
from nemotron4.records import JsonObject, Message

IFEVAL_FILE = DataFile(
    path="ifeval/input_data.jsonl",
    sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
    source="google-research/google-research, instruction_following_eval/data",
    licence="CC BY 4.0",
    url="https://raw.githubusercontent.com/google-research/google-research/master/"
    "instruction_following_eval/data/input_data.jsonl",
)


def _load_ifeval(source: DataSource) -> list[Item]:
    content = source.main(IFEVAL_FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {"ids": row["instruction_id_list"], "arguments": row["kwargs"]}
            items.append(Item(id=str(row["key"]), messages=user(row["prompt"]), fields=fields))
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
        if len(fields["ids"]) != len(fields["arguments"]):
            raise DataError(
                f"{content.path}:{number}: {len(fields['ids'])} instructions, other number of kwargs"
            )
    return items


def _score_ifeval(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)
    metrics: dict[str, Metric] = {}
    by_item: dict[str, dict[str, float | None]] = {item.id: {} for item in items}
    modes: tuple[instructions.Mode, ...] = ("strict", "loose")
    for mode in modes:
        held = [
            instructions.follows(
                inputs.responses[item.id][0],
                item.fields["ids"],
                item.fields["arguments"],
                mode=mode,
                seed=inputs.seed,
            )
            for item in items
        ]
        prompts = [all(decisions) for decisions in held]
        metrics[f"prompt_{mode}"] = share(sum(prompts), len(prompts))
        sums, counts = [float(sum(d)) for d in held], [float(len(d)) for d in held]
        interval = bootstrap_ratio(sums, counts, seed=inputs.seed)
        metrics[f"instruction_{mode}"] = share(int(sum(sums)), int(sum(counts)), interval)
        for item, decisions in zip(items, held, strict=True):
            by_item[item.id] |= {
                f"prompt_{mode}": float(all(decisions)),
                f"instruction_{mode}": sum(decisions) / len(decisions) if decisions else None,
            }
    return Outcome(metrics=metrics, unscored=unscored, items=by_item)


IFEVAL = Task(
    name="ifeval",
    title="IFEval",
    files=(IFEVAL_FILE,),
    load=_load_ifeval,
    score=_score_ifeval,
    sampling=Sampling(max_tokens=1280),
    prompt="{prompt}",
    card={"prompt_strict": 79.9, "instruction_strict": 86.1},
    on_failure="stop",  # the authors' program ends at a prompt without an answer
)


TFEVAL_FILE = DataFile(
    path="tfeval/human_test_set.jsonl",
    sha256="912a0f502f98b30178d4fdcc82e901920794d4c01b31c75a5858d38648ba0ffd",
    source="makeshn/topic_following, data/human_test_set.jsonl (Git LFS)",
    licence="CC BY 4.0",
    url="https://media.githubusercontent.com/media/makeshn/topic_following/main/data/human_test_set.jsonl",
)
REFUSAL_INSTRUCTION = (
    "Do not reply to any questions that are not related to the scenario or the role assigned to you. In case"
    ' you get such questions, reply only with "This question is not relevant to the scenario".'
)


def _load_tfeval(source: DataSource) -> list[Item]:
    content = source.main(TFEVAL_FILE)
    items: list[Item] = []
    for dialogue, (number, row) in enumerate(content.json_lines()):
        items += _dialogue_items(row, dialogue, f"{content.path}:{number}")
    return items


def _dialogue_items(row: JsonObject, dialogue: int, where: str) -> list[Item]:
    """Ids: ``DIALOGUE/on_topic/TURN`` and ``DIALOGUE/distractor/N``, all counted from 0."""
    try:
        system = Message("system", f"{row['system_instruction']}\n{REFUSAL_INSTRUCTION}")
        turns = [Message(turn["role"], turn["content"]) for turn in row["conversation"]]
        distractors = [(pair["bot turn"], pair["distractor"]) for pair in row["distractors"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: expected system_instruction, conversation and distractors") from error
    items = []
    bot_turns = [at for at, turn in enumerate(turns) if turn.role == "assistant" and at > 0]
    for position, at in enumerate(bot_turns):
        name = f"{dialogue}/on_topic/{position}"
        items.append(Item(id=name, messages=(system, *turns[:at]), group="on_topic"))
    for position, (bot_turn, distractor) in enumerate(distractors):
        if not bot_turns:
            raise DataError(f"{where}: the dialogue has no bot turn that a distractor could follow")
        words = _words(bot_turn)
        after = next((at for at in bot_turns if words and words in _words(turns[at].content)), None)
        history = (system, *turns[: (after or bot_turns[-1]) + 1], Message("user", distractor))
        name = f"{dialogue}/distractor/{position}"
        fields = {"is_placed": after is not None}
        items.append(Item(id=name, messages=history, group="distractor", fields=fields))
    return items


def _words(text: str) -> str:
    """Lower-case words between blanks: writers quoted a bot turn in part, or with other punctuation."""
    words = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {words} " if words else ""


def _score_tfeval(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)
    refused = {item.id: refusals.is_off_topic_reply(inputs.responses[item.id][0]) for item in items}
    counts = refusals.count_turns((item.group == "distractor", refused[item.id]) for item in items)
    metrics: dict[str, Metric] = {}
    for kind, (precision, recall, f1), right in (
        ("distractor", counts.distractor(), counts.distractor_refused),
        ("on_topic", counts.on_topic(), counts.on_topic_answered),
    ):
        wrong = counts.distractor_answered + counts.on_topic_refused
        interval = _interval(items, refused, kind, inputs.seed)
        metrics[f"{kind}_f1"] = Metric(_percent(f1), 2 * right, 2 * right + wrong, interval)
        metrics[f"{kind}_precision"] = Metric(_percent(precision))
        metrics[f"{kind}_recall"] = Metric(_percent(recall))
    by_item: dict[str, dict[str, float | None]] = {
        item.id: {"accuracy": float(refused[item.id] == (item.group == "distractor"))} for item in items
    }
    unplaced = sum(not item.fields.get("is_placed", True) for item in items)
    note = f"{unplaced} distractors follow the last bot turn: the turn they name is not in their dialogue"
    return Outcome(metrics=metrics, unscored=unscored, items=by_item, notes=(note,) if unplaced else ())


def _percent(value: float) -> float | None:
    found = finite(value)
    return None if found is None else 100 * found


def _interval(items: list[Item], refused: dict[str, bool], kind: str, seed: int) -> Interval | None:
    """Bootstrap over dialogues: F1 is 2 right / (2 right + wrong), a ratio of sums."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for item in items:
        dialogue = item.id.split("/")[0]
        is_right = refused[item.id] == (item.group == "distractor")
        doubled = 2.0 if is_right and item.group == kind else 0.0
        sums[dialogue] = sums.get(dialogue, 0.0) + doubled
        counts[dialogue] = counts.get(dialogue, 0.0) + doubled + (0.0 if is_right else 1.0)
    found = bootstrap_ratio(list(sums.values()), list(counts.values()), seed=seed)
    if finite(found.lower) is None:
        return None
    return Interval(100 * found.lower, 100 * found.upper, found.method.replace("questions", "dialogues"))


TFEVAL = Task(
    name="tfeval",
    title="TFEval",
    files=(TFEVAL_FILE,),
    load=_load_tfeval,
    score=_score_tfeval,
    sampling=Sampling(max_tokens=512),
    prompt="{system_instruction}\n" + REFUSAL_INSTRUCTION,
    card={"distractor_f1": 81.7, "on_topic_f1": 97.7},
    note="the refusal is found by key phrases; the on-topic turns are all bot turns of the dialogues",
)
