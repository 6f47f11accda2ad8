"""GSM8K: 1,319 word problems, zero-shot, with the instruction of NVIDIA's packaged harness."""

from __future__ import annotations

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Outcome, Task, accuracy, answered, user
from nemotron4.grading import answers

FILE = DataFile(
    path="gsm8k/test.jsonl.gz",
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    source="openai/grade-school-math @3101c7d, grade_school_math/data/test.jsonl",
    licence="MIT",
    url="https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/test.jsonl",
)
PROMPT = (
    "Below is a math question. I want you to first reason through the steps required to reach the answer,"
    ' then end your response with "#### " followed by the answer. For instance, if the answer is 42 then your'
    ' response must end with "#### 42" (without the quotes).\n\n{question}'
)


def load(source: DataSource) -> list[Item]:
    content = source.main(FILE)
    items: list[Item] = []
    for number, row in content.json_lines():
        if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
            raise DataError(f"{content.path}:{number}: expected question and answer (with ####)")
        prompt = PROMPT.format(question=row["question"])
        items.append(Item(id=str(len(items)), messages=user(prompt), fields={"answer": row["answer"]}))
    return items


def score(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)
    methods: tuple[answers.Gsm8kMethod, ...] = ("strict", "flexible")
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
    )


GSM8K = Task(
    name="gsm8k",
    title="GSM8K, 0-shot",
    files=(FILE,),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=1536),
    prompt=PROMPT,
    card={"strict": 92.3},
    note="the card does not say which extraction it used; strict is the score, flexible stands beside it",
)
