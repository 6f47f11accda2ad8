"""MMLU: 14,042 questions of 57 subjects, zero-shot, answered with one generated letter."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import partial

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import Content, DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Outcome, Task, accuracy_by_group, user
from nemotron4.grading import answers

_URL = (
    "https://raw.githubusercontent.com/HaeChan0305/MLILAB-FedLLM/d92730e8bacd7b3a61e551e015e40588e10234b4/"
    "data/mmlu/"
)
SOURCE = "hendrycks/test, edition of the hub (cais/mmlu): HaeChan0305/MLILAB-FedLLM @d92730e, data/mmlu"
SUBJECTS = [
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
]


def build_questions(split: str, download: Callable[[str], bytes]) -> bytes:
    """The 57 tables as one file: JSON lines ``{subject, index, question, choices, answer}``."""
    lines = []
    for subject in SUBJECTS:
        table = download(f"{_URL}{split}/{subject}_{split}.csv").decode("utf-8")
        for index, row in enumerate(csv.DictReader(io.StringIO(table, newline=""))):
            question = {
                "subject": subject,
                "index": index,
                "question": row["question"],
                "choices": [row[f"choice{n}"] for n in range(4)],
                "answer": "ABCD"[int(row["answer"])],
            }
            lines.append(json.dumps(question, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


FILE = DataFile(
    path="mmlu/test.jsonl.gz",
    sha256="3f46fe9a66f9ed20c09452fe76b404797523dc8c51bb3edbca39ece04fa1b9d2",
    source=SOURCE,
    licence="MIT",
    build=partial(build_questions, "test"),
)
INSTRUCTION = (
    "Below is a multi-choice question. You must reply with only a single letter (either A, B, C or D)\n\n"
)


def question_prompt(question: str, choices: Sequence[str]) -> str:
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
    return f"{question.strip()}\n{lettered}Answer:"


def read_questions(content: Content) -> list[tuple[str, str, str, list[str], str]]:
    """(id, subject, question, choices, letter) of every row."""
    questions = []
    for number, row in content.json_lines():
        try:
            subject, choices, letter = row["subject"], row["choices"], row["answer"]
            name, question = f"{subject}/{row['index']}", row["question"]
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
        if isinstance(letter, int) and 0 <= letter < 4:
            letter = "ABCD"[letter]
        if not isinstance(choices, list) or len(choices) != 4 or letter not in ("A", "B", "C", "D"):
            raise DataError(f"{content.path}:{number}: expected four choices and an answer from A to D")
        questions.append((name, subject, question, [str(choice) for choice in choices], letter))
    return questions


def load(source: DataSource) -> list[Item]:
    items = []
    for name, subject, question, choices, letter in read_questions(source.main(FILE)):
        prompt = INSTRUCTION + question_prompt(question, choices)
        items.append(Item(id=name, messages=user(prompt), group=subject, fields={"answer": letter}))
    return items


def score(inputs: Inputs) -> Outcome:
    return accuracy_by_group(inputs, answers.mmlu)


MMLU = Task(
    name="mmlu",
    title="MMLU, 0-shot, generated letter",
    files=(FILE,),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=2),
    prompt=INSTRUCTION + question_prompt("{question}", ["{A}", "{B}", "{C}", "{D}"]),
    card={"accuracy": 78.7},
    on_failure="wrong",  # as simple-evals
)
