"""Benchmarks of a short final answer: GSM8K and BBH.

GSM8K: 1,319 word problems, zero-shot, with the instruction of NVIDIA's packaged harness.

BIG-Bench Hard: 6,511 questions of 27 tasks, for base models; 3 worked examples, exact match of the answer.
The set-up of lm-evaluation-harness' ``bbh``: the published chain-of-thought prompt of the task, then the
question, as a raw text that the model continues; generation ends at an empty line or at a ``Q``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import Content, DataFile, DataSource
from nemotron4.evaluation.task import (
    Inputs,
    Item,
    Outcome,
    Task,
    accuracy,
    accuracy_by_group,
    answered,
    user,
    why,
)
from nemotron4.grading import answers

GSM8K_FILE = DataFile(
    path="gsm8k/test.jsonl.gz",
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    source="openai/grade-school-math @3101c7d, grade_school_math/data/test.jsonl",
    licence="MIT",
    url="https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/test.jsonl",
)
GSM8K_PROMPT = (
    "Below is a math question. I want you to first reason through the steps required to reach the answer,"
    ' then end your response with "#### " followed by the answer. For instance, if the answer is 42 then your'
    ' response must end with "#### 42" (without the quotes).\n\n{question}'
)


def _load_gsm8k(source: DataSource) -> list[Item]:
    content = source.main(GSM8K_FILE)
    items: list[Item] = []
    for number, row in content.json_lines():
        if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
            raise DataError(f"{content.path}:{number}: expected question and answer (with ####)")
        prompt = GSM8K_PROMPT.format(question=row["question"])
        items.append(Item(id=str(len(items)), messages=user(prompt), fields={"answer": row["answer"]}))
    return items


def _score_gsm8k(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)
    methods: tuple[answers.Gsm8kMethod, ...] = ("strict", "flexible", "value")
    scores = {
        method: [answers.gsm8k(inputs.responses[item.id][0], item.fields["answer"], method) for item in items]
        for method in methods
    }
    return Outcome(
        metrics={method: accuracy(found) for method, found in scores.items()},
        unscored=unscored,
        unparsed=sum(found.is_unparsed for found in scores["strict"]),
        items={
            item.id: {method: scores[method][at].value for method in methods} for at, item in enumerate(items)
        },
        reasons=why(items, scores["strict"]),
    )


GSM8K = Task(
    name="gsm8k",
    title="GSM8K, 0-shot",
    files=(GSM8K_FILE,),
    load=_load_gsm8k,
    score=_score_gsm8k,
    sampling=Sampling(max_tokens=1536),
    prompt=GSM8K_PROMPT,
    card={"strict": 92.3},
    on_failure="wrong",  # as simple-evals; the authors' own program asks no endpoint
    note="the card does not say which extraction it used; strict is the score, flexible is next to it",
)


_REPOSITORY = "suzgunmirac/BIG-Bench-Hard @9ee07bd, "
_URL = (
    "https://raw.githubusercontent.com/suzgunmirac/BIG-Bench-Hard/9ee07bd481feebf959a6b59d61ea57bdcf30964d/"
)
TASK_NAMES = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)
NUM_SHOTS = 3
STEPS = "A: Let's think step by step."
QUESTION = f"Q: {{input}}\n{STEPS}\n"


def build_questions(download: Callable[[str], bytes]) -> bytes:
    """The repository's 27 files as one: JSON lines ``{task, input, target}``, in the order of TASK_NAMES."""
    rows = [
        {"task": name, "input": row["input"], "target": row["target"]}
        for name in TASK_NAMES
        for row in json.loads(download(f"{_URL}bbh/{name}.json"))["examples"]
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def build_prompts(download: Callable[[str], bytes]) -> bytes:
    """JSON lines ``{task, prompt}``: the published prompts as the harness has them.

    The mark that heads each file is left out, and one task's examples get the line break of the others.
    """
    rows = []
    for name in TASK_NAMES:
        text = download(f"{_URL}cot-prompts/{name}.txt").decode("utf-8")
        prompt = text.partition("-----\n")[2].strip().replace(f"{STEPS} ", f"{STEPS}\n")
        rows.append({"task": name, "prompt": prompt})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


QUESTIONS = DataFile(
    path="bbh/test.jsonl",
    sha256="c90f4b5b0a6094b6a25b643be52e6cfa80361eab7f50b2d9b31c4df3019fe4bc",
    source=_REPOSITORY + "bbh/*.json, as JSON lines {task, input, target}",
    licence="MIT",
    build=build_questions,
)
PROMPTS = DataFile(
    path="bbh/prompts.jsonl",
    sha256="06d1971d0d1ef286d81b2d8c8b5224fe8b1af3dcf5dd172fa8373c26427b7c8a",
    source=_REPOSITORY + "cot-prompts/*.txt, as JSON lines {task, prompt}",
    licence="MIT",
    build=build_prompts,
)


def _load_bbh(source: DataSource) -> list[Item]:
    prompts = {str(row["task"]): str(row["prompt"]) for row in source.read(PROMPTS).rows()}
    return make_items(source.main(QUESTIONS), prompts)


def make_items(content: Content, prompts: Mapping[str, str]) -> list[Item]:
    """Ids: ``TASK/ROW``, rows of a task counted from 0."""
    counts: Counter[str] = Counter()
    items = []
    for number, row in content.json_lines():
        where = f"{content.path}:{number}"
        try:
            name, question, target = (str(row[field]) for field in ("task", "input", "target"))
        except KeyError as error:
            raise DataError(f"{where}: field {error} is missing") from error
        if name not in prompts:
            raise DataError(f"{where}: no worked examples of the task {name!r} in {PROMPTS.path}")
        prompt = f"{prompts[name]}\n\n{QUESTION.replace('{input}', question)}"
        item = Item(
            id=f"{name}/{counts[name]}",
            messages=user(prompt),
            is_raw=True,
            group=name,
            fields={"answer": target},
        )
        items.append(item)
        counts[name] += 1
    return items


def _score_bbh(inputs: Inputs) -> Outcome:
    """Over all questions, as the harness weighs its tasks."""
    return accuracy_by_group(inputs, answers.bbh)


BBH = Task(
    name="bbh",
    title=f"BBH, {NUM_SHOTS}-shot with worked examples, exact match",
    files=(QUESTIONS, PROMPTS),
    load=_load_bbh,
    score=_score_bbh,
    sampling=Sampling(max_tokens=1024, stop=("</s>", "Q", "\n\n")),
    prompt=f"published prompt of the task, {NUM_SHOTS} examples\n\n{QUESTION}",
)
