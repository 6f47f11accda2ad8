"""Benchmarks scored from numbers: multiple choice by log-probability (for base models), and RewardBench.

MMLU, ARC-Challenge, HellaSwag, Winogrande: the model never writes; each choice is weighed as a continuation
of the prompt, and the likeliest one is the answer. Prompts follow lm-evaluation-harness' standard set-ups
with the report's shot counts; examples are the first rows of the examples' file. An answer is the list of the
choices' log-probabilities in nats. It needs a server that gives log-probabilities of a prompt (``echo`` of
``/v1/completions``), or a model in the process.

RewardBench: 2,985 pairs; a reward model's accuracy by section. A response row holds the two rewards.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import Content, DataFile, DataSource, hub_rows
from nemotron4.evaluation.task import Inputs, Item, Metric, Outcome, Task, accuracy, answered, finite, user
from nemotron4.evaluation.tasks import mmlu
from nemotron4.grading import judgments
from nemotron4.grading.score import Score, passed, unscored
from nemotron4.records import JsonObject

Weighed = tuple[str, str]  # prompt, continuation
# A question: its weighed choices, each choice's text (for the length-normalised score), the right position.
Question = tuple[list[Weighed], list[str], int]

MMLU_DEV = DataFile(
    path="mmlu/dev.jsonl.gz",
    sha256="6ddbd1774574ea21ac67146fc947b1c9875eb80667c00f97d5f72dcc1556b560",
    source=mmlu.SOURCE,
    licence="MIT",
    build=partial(mmlu.build_questions, "dev"),
)


def _load_mmlu(source: DataSource, num_shots: int) -> list[Item]:
    """Examples of the same subject come from the development file, under the usual first line."""
    shots: dict[str, list[str]] = defaultdict(list)
    if num_shots:
        for _, subject, question, choices, letter in mmlu.read_questions(source.read(MMLU_DEV)):
            shots[subject].append(f"{mmlu.question_prompt(question, choices)} {letter}")
    items = []
    for name, subject, question, choices, letter in mmlu.read_questions(source.main(mmlu.FILE)):
        about = subject.replace("_", " ")
        parts = [f"The following are multiple choice questions (with answers) about {about}."]
        prompt = "\n\n".join([*parts, *shots[subject][:num_shots], mmlu.question_prompt(question, choices)])
        weighed = [(prompt, f" {one}") for one in "ABCD"]
        items.append(make_item(name, (weighed, list("ABCD"), "ABCD".index(letter)), subject))
    return items


def make_item(name: str, question: Question, group: str = "") -> Item:
    weighed, texts, right = question
    fields = {"choices": weighed, "texts": texts, "right": right}
    return Item(id=name, messages=user(weighed[0][0]), group=group, fields=fields)


def _arc(row: JsonObject, shots: str) -> Question:
    texts = list(row["choices"]["text"])
    prompt = f"{shots}Question: {row['question']}\nAnswer:"
    return (
        [(prompt, f" {text}") for text in texts],
        texts,
        list(row["choices"]["label"]).index(row["answerKey"]),
    )


def _hellaswag(row: JsonObject, shots: str) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
    texts = [_without_wikihow_marks(ending) for ending in row["endings"]]
    prompt = shots + _without_wikihow_marks(context)
    return [(prompt, f" {text}") for text in texts], texts, int(row["label"])


def _without_wikihow_marks(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: JsonObject, shots: str) -> Question:
    """Each option is put into the sentence, and what follows it is weighed."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    options = [row["option1"], row["option2"]]
    weighed = [(f"{shots}{before}{option}", f" {after.strip()}") for option in options]
    return weighed, options, int(row["answer"]) - 1


Reader = Callable[[JsonObject, str], Question]


def _load_rows(
    source: DataSource, file: DataFile, examples: DataFile, reader: Reader, num_shots: int
) -> list[Item]:
    content = source.main(file)
    shots = "".join(
        f"{prompt}{continuation}\n\n"
        for prompt, continuation in _examples(source.read(examples), reader, num_shots)
    )
    questions = _questions(content, content.json_lines(), reader, shots)
    return [make_item(str(number), question) for number, question in enumerate(questions)]


def _examples(content: Content, reader: Reader, num_shots: int) -> list[Weighed]:
    """The first rows, each with its right choice."""
    found = _questions(content, content.json_lines(), reader, "")[:num_shots]
    if len(found) < num_shots:
        raise DataError(f"{content.path}: {len(found)} examples; {num_shots} are needed")
    return [weighed[right] for weighed, _, right in found]


def _questions(
    content: Content, rows: Iterable[tuple[int, JsonObject]], reader: Reader, shots: str
) -> list[Question]:
    questions = []
    for number, row in rows:
        try:
            question = reader(row, shots)
            question[0][question[2]]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{content.path}:{number}: not a row of this benchmark: {error!r}") from error
        questions.append(question)
    return questions


def _weights(item: Item, response: str) -> list[float]:
    try:
        values = [float(value) for value in json.loads(response)]
    except (ValueError, TypeError) as error:
        raise DataError(f"response {item.id}: expected a list of log-probabilities: {error}") from error
    if len(values) != len(item.fields["choices"]):
        raise DataError(
            f"response {item.id}: {len(values)} numbers for {len(item.fields['choices'])} choices"
        )
    return values


def _chosen(values: Sequence[float], right: int) -> Score:
    """Right if the likeliest choice is; equal values of all choices carry no answer."""
    if any(math.isnan(value) for value in values):
        return unscored("log-probability is not a number")
    if len(set(values)) == 1:
        return unscored("all choices have the same log-probability")
    return passed(max(range(len(values)), key=values.__getitem__) == right)


def _score_choices(inputs: Inputs) -> Outcome:
    """``accuracy`` by total log-probability; ``accuracy_norm`` per character if choices differ in length."""
    items, reasons = answered(inputs)
    plain: dict[str, Score] = {}
    normed: dict[str, Score] = {}
    for item in items:
        values = _weights(item, inputs.responses[item.id][0])
        lengths = [max(1, len(text)) for text in item.fields["texts"]]
        plain[item.id] = _chosen(values, item.fields["right"])
        per_character = [value / length for value, length in zip(values, lengths, strict=True)]
        normed[item.id] = _chosen(per_character, item.fields["right"])
    reasons.update(str(found.reason) for found in plain.values() if not found.is_scored)
    metrics: dict[str, Metric] = {"accuracy": accuracy(list(plain.values()))}
    by_item: dict[str, Mapping[str, float | None]] = {
        name: {"accuracy": found.value, "accuracy_norm": normed[name].value} for name, found in plain.items()
    }
    if any(len({len(text) for text in item.fields["texts"]}) > 1 for item in items):
        metrics["accuracy_norm"] = accuracy(list(normed.values()))
    return Outcome(metrics=metrics, unscored=reasons, items=by_item)


def _task(
    name: str,
    title: str,
    files: tuple[DataFile, ...],
    load: Callable[[DataSource, int], list[Item]],
    num_shots: int,
    prompt: str,
    note: str = "",
) -> Task:
    """``load`` takes the number of worked examples, which ``--num-fewshot`` may change."""
    return Task(
        name=name,
        title=title.format(num_shots=num_shots),
        files=files,
        load=lambda source: load(source, num_shots),
        score=_score_choices,
        sampling=Sampling(max_tokens=1),
        is_generative=False,
        options={"num_fewshot": num_shots},
        with_options=lambda options: _task(name, title, files, load, options["num_fewshot"], prompt, note),
        prompt=prompt,
        note=note,
    )


def _file(path: str, repository: str, table: str, licence: str) -> DataFile:
    return DataFile(
        path=path,
        sha256=None,
        source=f"{repository} on the hub, {table}, as JSON lines with its fields",
        licence=licence,
        build=hub_rows(repository, f"{table}-00000-of-00001.parquet"),
    )


def _shots_task(
    name: str,
    title: str,
    num_shots: int,
    reader: Reader,
    repository: str,
    tables: tuple[str, str],
    licence: str,
    prompt: str,
) -> Task:
    """``tables`` are the questions and the examples."""
    test = _file(f"{name}/test.jsonl", repository, tables[0], licence)
    train = _file(f"{name}/train.jsonl", repository, tables[1], licence)
    return _task(
        name,
        f"{title}, {{num_shots}}-shot, log-probability",
        (test, train),
        lambda where, shots: _load_rows(where, test, train, reader, shots),
        num_shots,
        prompt,
    )


_MMLU_PROMPT = "The following are multiple choice questions (with answers) about {subject}.\n\n{question}"
MMLU_LOGPROB = _task(
    "mmlu_logprob",
    "MMLU, {num_shots}-shot, log-probability",
    (mmlu.FILE,),
    _load_mmlu,
    0,
    _MMLU_PROMPT,
    "not the card's definition, which is a generated letter",
)
MMLU_5SHOT = _task(
    "mmlu_5shot",
    "MMLU, {num_shots}-shot, log-probability",
    (mmlu.FILE, MMLU_DEV),
    _load_mmlu,
    5,
    "5 examples; " + _MMLU_PROMPT,
)
ARC_CHALLENGE = _shots_task(
    "arc_challenge",
    "ARC-Challenge",
    25,
    _arc,
    "allenai/ai2_arc",
    ("ARC-Challenge/test", "ARC-Challenge/train"),
    "CC BY-SA 4.0",
    "Question: {question}\nAnswer: {choice}",
)
HELLASWAG = _shots_task(
    "hellaswag",
    "HellaSwag",
    10,
    _hellaswag,
    "Rowan/hellaswag",
    ("data/validation", "data/train"),
    "MIT",
    "{activity_label}: {ctx} {ending}",
)
WINOGRANDE = _shots_task(
    "winogrande",
    "Winogrande",
    5,
    _winogrande,
    "allenai/winogrande",
    ("winogrande_xl/validation", "winogrande_xl/train"),
    "Apache-2.0",
    "{sentence with the option}",
)


REWARDBENCH_FILE = DataFile(
    path="rewardbench/filtered.jsonl",
    sha256=None,
    source="allenai/reward-bench on the hub, split filtered, as JSON lines"
    " {id, subset, prompt, chosen, rejected}",
    licence="ODC-BY",
    build=hub_rows("allenai/reward-bench", "data/filtered-00000-of-00001.parquet"),
)


def _load_rewardbench(source: DataSource) -> list[Item]:
    content = source.main(REWARDBENCH_FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {"chosen": row["chosen"], "rejected": row["rejected"]}
            items.append(
                Item(id=str(row["id"]), messages=user(row["prompt"]), group=row["subset"], fields=fields)
            )
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
    return items


def _score_rewardbench(inputs: Inputs) -> Outcome:
    """Each response is ``[chosen reward, rejected reward]`` as JSON text."""
    items, unscored = answered(inputs)
    right: dict[str, list[float]] = defaultdict(list)
    by_item: dict[str, dict[str, float | None]] = {}
    reasons: Counter[str] = Counter(unscored)
    for item in items:
        try:
            chosen, rejected = (float(value) for value in json.loads(inputs.responses[item.id][0]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"response {item.id}: expected [chosen reward, rejected reward]: {error}"
            ) from error
        found = judgments.prefers_chosen(chosen, rejected)
        by_item[item.id] = {"accuracy": found.value}
        if found.value is None:
            reasons[str(found.reason)] += 1
        else:
            right[item.group].append(found.value)
    sections = judgments.section_scores({subset: sum(v) / len(v) for subset, v in right.items()})
    metrics = {name: Metric(finite(value)) for name, value in sections.items()}
    return Outcome(metrics=metrics, unscored=reasons, items=by_item)


REWARDBENCH = Task(
    name="rewardbench",
    title="RewardBench",
    files=(REWARDBENCH_FILE,),
    load=_load_rewardbench,
    score=_score_rewardbench,
    sampling=Sampling(max_tokens=1),
    is_generative=False,
    prompt="{prompt} {chosen | rejected}",
    card={
        "overall": 92.0,
        "chat": 95.8,
        "chat_hard": 87.1,
        "safety": 91.5,
        "reasoning": 93.7,
        "prior_sets": 67.4,
    },
    note="measures a reward model: nemotron4 eval run rewardbench --model URL asks its /score",
)
