"""The prompts of this recipe and what a program can say about an answer to each.

A task is {"kind", "question", "check"}. ``tasks`` are trained on; what is held out has other topics,
functions, sums and texts. ``value`` is what every stage uses: to select, to pair, to reward and to measure.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.grading import answers, code, instructions
from nemotron4.grading.sandbox import Sandbox, open_sandbox
from nemotron4.runs import read_rows
from nemotron4.synth.constraints import draw_constraints
from nemotron4.synth.stages.instructions import SINGLE
from nemotron4.text.prompt import CARD_QUESTION

Task = dict[str, Any]
CLEAN = 0.3  # the reward of an answer that ends and does not repeat itself
HERE = Path(__file__).parent
TOPICS, HELD_OUT = (
    part.strip().splitlines() for part in (HERE / "card_topics.txt").read_text().split("# held out")
)
WRITING_FORMS = (HERE / "writing_forms.txt").read_text(encoding="utf-8").splitlines()
NAMES = [
    "IBM", "Toyota", "Sony", "Intel", "Lego", "Boeing", "Nokia", "Siemens", "Adobe", "Paris", "Rome", "Mars",
    "Canada", "Honda", "Tokyo", "Linux", "Wikipedia", "Everest", "Amazon", "Samsung", "Philips", "Ferrari",
    "Iceland", "Jupiter",
]  # fmt: skip
# What the first recipe asked of every topic; the 33 held-out prompts are these with two held-out topics.
FORMS = {
    "Write a short poem about {}.": "verse",
    "Write a poem on {} in the style of Shakespeare.": "verse",
    "Write a four-line rhyme about {}.": "rhyme",
    "Explain {} to a child in three sentences.": "prose",
    "Explain {} in one short paragraph.": "prose",
    "What is interesting about {}?": "prose",
    "Give me three facts about {}.": "list 3",
    "Give me five tips about {}.": "list 5",
    "List four words that go with {}.": "list 4",
    "Write two sentences about {}.": "prose",
    "Write a short e-mail to a friend about {}.": "letter",
    "Tell a very short story about {}.": "prose",
    "Why do people care about {}?": "prose",
    "Describe {} without using its name.": "riddle",
    "What should a beginner know about {}?": "prose",
    "Ask me three questions about {}.": "asks",
}
Spec = tuple[str, str, str, Callable[..., Any], Sequence[tuple[Any, ...]]]
FUNCTIONS: tuple[Spec, ...] = (
    ("add", "a, b", "returns the sum of two numbers", lambda a, b: a + b, [(1, 2), (-4, 9)]),
    ("square", "x", "returns the square of a number", lambda x: x * x, [(3,), (-5,)]),
    ("is_even", "n", "returns True if n is even and False otherwise", lambda n: n % 2 == 0, [(4,), (7,)]),
    ("largest", "numbers", "returns the largest number of a list", max, [([3, 9, 2],), ([-4, -1],)]),
    ("smallest", "numbers", "returns the smallest number of a list", min, [([3, 9, 2],), ([-4, -1],)]),
    ("total", "numbers", "returns the sum of a list of numbers", sum, [([1, 2, 3],), ([],)]),
    ("reverse", "text", "returns the text backwards", lambda t: t[::-1], [("abc",), ("",)]),
    ("shout", "text", "returns the text in capital letters", str.upper, [("abc",), ("Hi",)]),
    ("whisper", "text", "returns the text in small letters", str.lower, [("ABC",), ("Hi",)]),
    ("first", "items", "returns the first item of a list", lambda i: i[0], [([4, 5],), (["x"],)]),
    ("last", "items", "returns the last item of a list", lambda i: i[-1], [([4, 5],), (["x"],)]),
    ("count_items", "items", "returns how many items a list has", len, [([4, 5],), ([],)]),
    ("double", "x", "returns two times x", lambda x: 2 * x, [(4,), (0,)]),
    ("absolute", "x", "returns the absolute value of x", abs, [(-4,), (6,)]),
    ("mean", "numbers", "returns the average of a list", lambda n: sum(n) / len(n), [([2, 4],), ([5],)]),
    ("area", "width, height", "returns the area of a rectangle", lambda a, b: a * b, [(2, 3), (5, 5)]),
    (
        "perimeter",
        "width, height",
        "returns the perimeter of a rectangle",
        lambda a, b: 2 * (a + b),
        [(2, 3)],
    ),
    ("is_positive", "x", "returns True if x is above zero", lambda x: x > 0, [(3,), (-3,)]),
    ("factorial", "n", "returns the factorial of n", math.factorial, [(4,), (1,)]),
    ("cube", "x", "returns the third power of x", lambda x: x**3, [(2,), (-3,)]),
    ("subtract", "a, b", "returns a minus b", lambda a, b: a - b, [(5, 2), (1, 4)]),
    ("multiply", "a, b", "returns the product of a and b", lambda a, b: a * b, [(5, 2), (1, 4)]),
    ("divide", "a, b", "returns a divided by b", lambda a, b: a / b, [(6, 2), (1, 4)]),
    ("remainder", "a, b", "returns the remainder of a divided by b", lambda a, b: a % b, [(7, 2), (9, 3)]),
    ("join_words", "words", "joins a list of words with spaces", " ".join, [(["a", "b"],), (["x"],)]),
    ("split_words", "text", "returns the list of words of a text", str.split, [("a b c",), ("x",)]),
    ("word_count", "text", "returns the number of words in a text", lambda t: len(t.split()), [("a b c",)]),
    ("sort_numbers", "numbers", "returns the numbers in ascending order", sorted, [([3, 1, 2],)]),
    (
        "sort_down",
        "numbers",
        "returns the numbers in descending order",
        lambda n: sorted(n)[::-1],
        [([3, 1, 2],)],
    ),
    ("unique", "items", "returns a sorted list without duplicates", lambda i: sorted(set(i)), [([3, 1, 3],)]),
    ("greet", "name", "returns the text 'Hello, ' followed by the name", lambda n: f"Hello, {n}", [("Ann",)]),
    ("is_empty", "items", "returns True if a list has no items", lambda i: not i, [([],), ([1],)]),
    (
        "contains",
        "items, x",
        "returns True if x is in the list",
        lambda i, x: x in i,
        [([1, 2], 2), ([1], 5)],
    ),
    ("to_text", "n", "returns the number as a string", str, [(5,), (12,)]),
    ("to_number", "text", "returns the text as an integer", int, [("5",), ("12",)]),
    ("minutes", "hours", "returns how many minutes so many hours have", lambda h: 60 * h, [(2,), (5,)]),
    ("fahrenheit", "c", "turns degrees Celsius into Fahrenheit", lambda c: c * 9 / 5 + 32, [(0,), (100,)]),
    ("bigger", "a, b", "returns the bigger of two numbers", max, [(3, 9), (4, 1)]),
    (
        "squares",
        "numbers",
        "returns a list with the square of each number",
        lambda n: [x * x for x in n],
        [([1, 3],)],
    ),
    (
        "evens",
        "numbers",
        "returns the even numbers of a list",
        lambda n: [x for x in n if x % 2 == 0],
        [([1, 2, 4],)],
    ),
    (
        "odds",
        "numbers",
        "returns the odd numbers of a list",
        lambda n: [x for x in n if x % 2],
        [([1, 2, 3],)],
    ),
    ("length", "text", "returns the length of a string", len, [("abc",), ("",)]),
    ("first_letter", "word", "returns the first letter of a word", lambda w: w[0], [("abc",), ("x",)]),
    ("last_letter", "word", "returns the last letter of a word", lambda w: w[-1], [("abc",), ("x",)]),
    ("repeat", "text, n", "returns the text repeated n times", lambda t, n: t * n, [("ab", 2), ("x", 3)]),
    ("power", "x, n", "returns x to the power of n", lambda x, n: x**n, [(2, 3), (5, 0)]),
    ("half", "x", "returns half of x", lambda x: x / 2, [(4,), (5,)]),
    ("is_odd", "n", "returns True if n is odd and False otherwise", lambda n: n % 2 == 1, [(4,), (7,)]),
    ("increase", "numbers", "adds one to each number of a list", lambda n: [x + 1 for x in n], [([1, 3],)]),
    (
        "starts_with",
        "text, letter",
        "returns True if the text begins with the letter",
        str.startswith,
        [("ab", "a")],
    ),
    ("replace_spaces", "text", "replaces each space by a dash", lambda t: t.replace(" ", "-"), [("a b c",)]),
    ("price_with_tax", "price", "returns the price plus ten percent", lambda p: p + p / 10, [(100,), (50,)]),
    ("keys", "table", "returns the sorted keys of a dictionary", sorted, [({"b": 1, "a": 2},)]),
    (
        "count_letter",
        "text, letter",
        "returns how often a letter is in the text",
        str.count,
        [("banana", "a")],
    ),
    (
        "distance",
        "a, b",
        "returns the absolute difference of a and b",
        lambda a, b: abs(a - b),
        [(3, 9), (9, 3)],
    ),
    ("seconds", "minutes", "returns how many seconds so many minutes have", lambda m: 60 * m, [(2,), (5,)]),
    ("combine", "a, b", "returns list a followed by list b", lambda a, b: a + b, [([1], [2, 3])]),
    (
        "is_longer",
        "a, b",
        "returns True if text a is longer than text b",
        lambda a, b: len(a) > len(b),
        [("ab", "c")],
    ),
    ("negate", "x", "returns x with the other sign", lambda x: -x, [(3,), (-3,)]),
    (
        "title",
        "text",
        "returns the text with each word's first letter in capitals",
        str.title,
        [("a nice day",)],
    ),
    ("rectangle", "w, h", "returns True if a rectangle is a square", lambda w, h: w == h, [(2, 2), (2, 3)]),
    ("circle_area", "r", "returns 3.14 times the square of r", lambda r: 3.14 * r * r, [(1,), (2,)]),
    (
        "range_list",
        "n",
        "returns the list of the numbers from 1 to n",
        lambda n: list(range(1, n + 1)),
        [(3,), (1,)],
    ),
    ("trim", "text", "removes spaces at both ends of the text", str.strip, [("  ab ",), ("x",)]),
)
CODE_FORMS = (
    "Write a Python function {name}({parameters}) that {what}.",
    "Write a Python function named {name} that {what}.",
    "Can you write {name}({parameters}) in Python? It {what}.",
)
HEAD_FORMS = (
    'Complete this function:\n\n```python\ndef {name}({parameters}):\n    """It {what}."""\n```',
    'def {name}({parameters}):\n    """It {what}.\n    """\n\nWrite the whole Python function.',
    "Write the body of {name}({parameters}) in Python.\n\ndef {name}({parameters}):\n    # {what}",
)
PEOPLE = ["Anna", "Omar", "Lucy", "Peter", "Mina", "Carlos", "Ruth", "Ivan", "Grace", "Tom"]
THINGS = ["apples", "chairs", "books", "lamps", "tickets", "plates", "pens", "shirts"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ASKS = {
    "Who made the order?": "person",
    "What was ordered?": "thing",
    "On which day was the order made?": "day",
    "How much was paid?": "price",
}
ORDER = "{person} ordered {count} {thing} on {day} and paid {price} dollars."
READ = (
    "Read this: {text}\n\n{ask} Answer in a few words.",
    "{ask}\n\n{text}",
    "Text: {text}\nQuestion: {ask}",
)
# The types of the held-out instructions: a model of this size keeps them sometimes.
KEPT_SOMETIMES = (
    "keywords:existence", "keywords:frequency", "keywords:forbidden_words", "keywords:letter_frequency",
    "length_constraints:number_sentences", "length_constraints:number_words", "punctuation:no_comma",
    "detectable_format:number_bullet_lists", "detectable_format:number_highlighted_sections",
    "startend:end_checker",
)  # fmt: skip


def form_task(form: str, topic: str) -> Task:
    return {"kind": FORMS.get(form, "verse"), "question": form.format(topic), "check": {"topic": topic}}


def card_task() -> Task:
    return {"kind": "verse", "question": CARD_QUESTION, "check": {"topic": "NVIDIA"}}


def forms(held_out: bool, topics: int) -> list[Task]:
    """Every form with some topics; the subject of a poem is also asked for as the card's question does."""
    if held_out:
        return [card_task(), *(form_task(f, t) for t, f in itertools.product(HELD_OUT[:topics], FORMS))]
    draw = random.Random(1)
    chosen = draw.sample(TOPICS, min(2 * topics, len(TOPICS)))
    asked = [
        form_task("Write a poem on {} in the style of Shakespeare", n)
        for n in [*NAMES, *chosen][: 3 * topics]
    ]
    asked += [form_task("Write a short poem about {}.", topic) for topic in chosen]
    others = [form for form, kind in FORMS.items() if kind != "verse"]
    return asked + [form_task(form, topic) for topic, form in itertools.product(chosen[:topics], others)]


def programs(held_out: bool, asked: Sequence[str] = CODE_FORMS) -> list[Task]:
    made = []
    for number, (name, parameters, what, function, calls) in enumerate(FUNCTIONS):
        if (number % 4 == 3) == held_out:
            tests = [f"assert {name}({', '.join(map(repr, c))}) == {function(*c)!r}" for c in calls]
            question = asked[number % 3].format(name=name, parameters=parameters, what=what)
            made.append({"kind": "code", "question": question, "check": {"function": name, "tests": tests}})
    return made


def sums(held_out: bool, number: int) -> list[Task]:
    rows = read_rows(HERE / "sums.jsonl")
    chosen = rows[-number:] if held_out else rows[:number]
    return [{"kind": "sum", "question": r["prompt"], "check": {"answer": r["answer"]}} for r in chosen]


def readings(held_out: bool, number: int) -> list[Task]:
    draw = random.Random(7)
    people = PEOPLE[7:] if held_out else PEOPLE[:7]
    made = []
    for at in range(number):
        fact = {"person": draw.choice(people), "thing": draw.choice(THINGS), "day": draw.choice(DAYS),
                "count": str(draw.randint(2, 30)), "price": str(draw.randint(31, 400))}  # fmt: skip
        ask, wanted = draw.choice(list(ASKS.items()))
        question = READ[at % 3].format(ask=ask, text=ORDER.format(**fact))
        made.append({"kind": "reading", "question": question, "check": {"answer": fact[wanted]}})
    return made


def worked(question: str, answer: str) -> str:
    """A sum's answer with its steps, as a person would write them."""
    first, second = (int(number) for number in re.findall(r"\d+", question))
    if int(answer) == first * second:
        return f"{', '.join(str(first * n) for n in range(1, second + 1))}. The answer is {answer}."
    sign = "+" if int(answer) == first + second else "-"
    tens = second // 10 * 10
    if not tens or tens == second:
        return f"{first} {sign} {second} = {answer}. The answer is {answer}."
    between = first + tens if sign == "+" else first - tens
    steps = f"{first} {sign} {tens} = {between}, {between} {sign} {second - tens} = {answer}"
    return f"{steps}. The answer is {answer}."


def writings(number: int, *, seed: int = 0, kind: str = "prose") -> list[Task]:
    """Things to write about topics: what instructions are put to."""
    draw = random.Random(f"{kind} {seed}")
    chosen = draw.sample(list(itertools.product(WRITING_FORMS, TOPICS)), number)
    return [{**form_task(form, topic), "kind": kind} for form, topic in chosen]


def constrained(each: int) -> list[Task]:
    """``each`` held-out prompts of every type."""
    draw = random.Random(12)
    plain = [form for form, kind in FORMS.items() if kind == "prose"]
    made = []
    for name in KEPT_SOMETIMES * each:
        question = draw.choice(plain).format(draw.choice(HELD_OUT))
        [constraint] = draw_constraints(question, 1, draw, [name])
        text = draw.choice(SINGLE).format(prompt=question, constraints=constraint.text)
        check = {"ids": [name], "kwargs": [dict(constraint.arguments)]}
        made.append({"kind": "instruction", "question": text, "check": check})
    return made


def tasks(size: int) -> list[Task]:
    """What is trained on. ``size`` is the number of topics; the other kinds grow with it."""
    return [
        *forms(False, size),
        *programs(False)[: 4 * size],
        *sums(False, 20 * size),
        *readings(False, 4 * size),
    ]


def repeats(text: str) -> bool:
    """Whether four words, or a line, come a second time."""
    words = re.findall(r"[\w']+", text.lower())
    fours = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    lines = [line.strip().lower() for line in text.splitlines() if line.strip()]
    return len(set(fours)) < len(fours) or len(set(lines)) < len(lines)


def _verse(text: str, least: int, most: int) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return least <= len(lines) <= most and all(ln[0].isalnum() and len(ln.split()) <= 16 for ln in lines)


def _names(text: str, topic: str) -> bool:
    stem = topic.lower().removeprefix("the ")
    return (stem[:-1] if len(stem) > 4 else stem) in text.lower()


@functools.cache
def _sandbox() -> Sandbox:
    return open_sandbox()


def _passes(text: str, check: Mapping[str, Any]) -> bool:
    program = code.find_program(text, check["function"])
    if f"def {check['function']}" not in program:
        return False
    return code.run_program(code.mbpp_program(program, check["tests"], ()), _sandbox()).value == 1.0


def holds(task: Mapping[str, Any], text: str) -> bool:
    """Whether the answer does what a program can check."""
    kind, check = str(task["kind"]), task["check"]
    if kind == "code":
        return _passes(text, check)
    if kind == "sum":
        found = answers.final_number(text)
        return found is not None and found == answers.final_number(check["answer"])
    if kind == "reading":
        return check["answer"].lower() in text.lower() and len(text.split()) <= 25
    if kind == "instruction":
        return all(instructions.follows(text, check["ids"], check["kwargs"]))
    topic = check["topic"]
    if kind.startswith("list"):
        return len(re.findall(r"^\s*(?:\d+\.|[-*])\s+\S", text, re.M)) == int(kind.split()[1])
    if kind == "asks":
        return text.count("?") == 3
    if kind == "riddle":
        return len(text.split()) >= 8 and not _names(text, topic)
    if not _names(text, topic):
        return False
    if kind in ("verse", "rhyme"):
        return _verse(text, 4, 4 if kind == "rhyme" else 20)
    return len(text.split()) >= 8 and (kind != "letter" or "Dear" in text or "Hi" in text)


def value(task: Mapping[str, Any], text: str, *, is_ended: bool = True) -> float:
    """0: nothing, or no end; 0.3: ends and does not repeat itself; 1: holds (all instructions) besides."""
    if not text.strip() or not is_ended:
        return 0.0
    clean = CLEAN if task["kind"] == "code" or not repeats(text) else 0.0
    if task["kind"] == "instruction":  # the share of its instructions
        followed = instructions.follows(text, task["check"]["ids"], task["check"]["kwargs"])
        return clean + 0.7 * sum(followed) / len(followed)
    return clean + 0.7 * holds(task, text)


def score(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """For `train`: the reward of kind python. Only answers that ended come here."""
    judged = zip(answers, rows, strict=True)
    return [value(row["meta"]["task"], answer.strip()) for answer, row in judged]
