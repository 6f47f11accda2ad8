"""Prompts from topics and documents: open and closed questions, writing, mathematics, Python, revisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron4.client import BadContentError, Sampling
from nemotron4.records import JsonObject, Message
from nemotron4.synth.rows import Document, Prompt, Root, Row, Topic
from nemotron4.synth.stage import Context, Filtered, Kind, MapFunction
from nemotron4.synth.stages.asking import LIST_PROMPTS, MAX_ITEMS_PER_CALL, ask_list

MATERIALS = (
    "newsletter", "essay", "poem", "blog post", "e-mail", "short story", "speech", "product description",
    "news report", "letter", "review", "dialogue",
)  # fmt: skip
AUDIENCES = {
    "beginner": "beginners who know loops, conditions and functions",
    "intermediate": "people with some experience who know the common data structures and modules",
    "advanced": "advanced programmers who care about design, efficiency and edge cases",
}
# Ways to put a text and a request about it into one prompt.
JOINERS = (
    "{document}\n\n{request}",
    "{request}\n\n{document}",
    "Text:\n{document}\n\nTask: {request}",
    "{request}\n\n---\n{document}\n---",
    'Here is a text.\n\n"""\n{document}\n"""\n\nUse it for the following: {request}',
)


@dataclass(frozen=True)
class OpenKnobs:
    n: int = 10


@dataclass(frozen=True)
class WritingKnobs:
    """``materials_per_topic`` kinds of text are drawn for each topic; 0 takes all."""

    n: int = 5
    materials: tuple[str, ...] = MATERIALS
    materials_per_topic: int = 2

    def __post_init__(self) -> None:
        if not self.materials:
            raise ValueError("materials is empty; expected at least one kind of text")


@dataclass(frozen=True)
class RevisionKnobs:
    """``keep_draft``: the short prompt stays with its revisions."""

    n: int = 5
    keep_draft: bool = True


@dataclass(frozen=True)
class ClosedKnobs:
    n: int = 5


@dataclass(frozen=True)
class MathKnobs:
    n: int = 10
    form: str = "general"

    def __post_init__(self) -> None:
        if self.form not in ("general", "beginner"):
            raise ValueError(f"form is {self.form!r}; expected 'general' or 'beginner'")


@dataclass(frozen=True)
class PythonKnobs:
    """Problems of each level for every topic."""

    n: int = 5
    levels: tuple[str, ...] = ("beginner", "intermediate", "advanced")

    def __post_init__(self) -> None:
        unknown = set(self.levels) - set(AUDIENCES)
        if unknown or not self.levels:
            raise ValueError(f"levels is {list(self.levels)}; expected some of {', '.join(AUDIENCES)}")


def _prompt(text: str, task: str, topic: str | None, **fields: object) -> Prompt:
    return Prompt(messages=(Message("user", text),), task=task, topic=topic, **fields)  # type: ignore[arg-type]


async def open_questions(topic: Topic, context: Context, knobs: OpenKnobs) -> Sequence[Row]:
    """Topic -> n questions or requests."""
    question = context.prompt("open_questions", n=knobs.n, topic=topic.topic)
    return [_prompt(text, "open_qa", topic.topic) for text in await ask_list(context, question, knobs.n)]


async def writing_tasks(topic: Topic, context: Context, knobs: WritingKnobs) -> Sequence[Row]:
    """Topic -> n writing tasks for each drawn material."""
    number = min(knobs.materials_per_topic or len(knobs.materials), len(knobs.materials))
    made: list[Row] = []
    for material in context.random("materials").sample(knobs.materials, number):
        question = context.prompt("writing_tasks", n=knobs.n, material=material, topic=topic.topic)
        for text in await ask_list(context, question, knobs.n):
            made.append(_prompt(text, "writing", topic.topic, meta={"material": material}))
    return made


async def revise(prompt: Prompt, context: Context, knobs: RevisionKnobs) -> Sequence[Row | None]:
    """Prompt -> n longer forms of it, and with ``keep_draft`` the prompt itself."""
    name = "revise_task" if prompt.task == "writing" else "revise_question"
    question = context.prompt(name, n=knobs.n, prompt=prompt.text)
    made: list[Row | None] = [None] if knobs.keep_draft else []
    for text in await ask_list(context, question, knobs.n):
        made.append(_prompt(text, prompt.task, prompt.topic, form="revision", meta=prompt.meta))
    return made


async def closed_questions(document: Document, context: Context, knobs: ClosedKnobs) -> Sequence[Row]:
    """Document -> n requests about it, each joined with the document by a drawn template."""
    question = context.prompt("closed_questions", n=knobs.n, document=document.text)
    draw = context.random("joiner")
    made = []
    for text in await ask_list(context, question, knobs.n):
        pieces = {"document": document.text, "request": text}
        joined = draw.choice(JOINERS)
        for name, piece in pieces.items():
            joined = joined.replace(f"{{{name}}}", piece, 1)
        made.append(
            _prompt(joined, "closed_qa", None, document_id=document.document_id, meta={"request": text})
        )
    return made


async def math_problems(topic: Topic, context: Context, knobs: MathKnobs) -> Sequence[Row]:
    """Topic -> n mathematics problems."""
    name = "math_problems" if knobs.form == "general" else "math_problems_beginner"
    question = context.prompt(name, n=knobs.n, topic=topic.topic)
    return [_prompt(text, "math", topic.topic) for text in await ask_list(context, question, knobs.n)]


async def python_problems(topic: Topic, context: Context, knobs: PythonKnobs) -> Sequence[Row]:
    """Topic -> n programming problems for each level."""
    made: list[Row] = []
    for level in knobs.levels:
        question = context.prompt("python_problems", n=knobs.n, topic=topic.topic, audience=AUDIENCES[level])
        for text in await ask_list(context, question, knobs.n):
            made.append(_prompt(text, "python", topic.topic, meta={"level": level}))
    return made


@dataclass(frozen=True)
class MagpieKnobs:
    """``n`` prompts that an aligned model writes when it is given the opening of a user's turn alone (Xu et
    al. 2024, "Magpie"). ``opening`` is that of the model's own template; ``stop`` ends the turn.
    """

    n: int = 100
    opening: str = "<extra_id_0>System\n\n<extra_id_1>User\n"
    stop: tuple[str, ...] = ("<extra_id_1>", "<extra_id_0>")
    task: str = "magpie"

    def __post_init__(self) -> None:
        if self.n < 1 or not self.opening:
            raise ValueError("n must be 1 or more, and opening a text")


def magpie_roots(knobs: MagpieKnobs) -> Iterator[JsonObject]:
    yield from ({} for _ in range(knobs.n))


async def magpie(root: Root, context: Context, knobs: MagpieKnobs) -> Sequence[Row]:
    """Root -> a prompt in the model's own words; a blank or cut one is drawn again."""
    is_cut = False
    for sample in range(context.max_repairs + 1):
        reply = await context.complete(knobs.opening, sample=sample, stop=knobs.stop)
        text = reply.text
        for mark in knobs.stop:
            text = text.partition(mark)[0]
        is_cut = reply.finish_reason == "length"
        if text.strip() and not is_cut:
            return [_prompt(text.strip(), knobs.task, None)]
    if is_cut:
        raise Filtered("truncated", "the token limit cut the turn")
    raise BadContentError("a blank turn", kind="no_user_turn")


_SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=1024)


def _listed(
    summary: str,
    takes: type,
    run: MapFunction,
    knobs: type,
    *prompts: str,
    each: Callable[[Any], int] = lambda _: 1,
    kept: Callable[[Any], int] = lambda _: 0,
) -> Kind:
    """A kind that asks for a list of ``n`` prompts: ``each`` so many lists a row, ``kept`` more rows."""
    return Kind(
        summary=summary, takes=(takes,), makes=Prompt, knobs=knobs, run=run,
        prompts=(*prompts, *LIST_PROMPTS), sampling=_SAMPLING,
        calls=lambda knobs: -(-knobs.n // MAX_ITEMS_PER_CALL) * each(knobs),
        fan_out=lambda knobs: knobs.n * each(knobs) + kept(knobs),
    )  # fmt: skip


KINDS = {
    "magpie": Kind(
        summary="prompts that the model writes from the opening of a user's turn alone",
        takes=(), makes=Prompt, knobs=MagpieKnobs, roots=magpie_roots, run=magpie,
        sampling=Sampling(temperature=1.0, max_tokens=256), calls=lambda _: 1, fan_out=lambda _: 1,
    ),
    "open_questions": _listed(
        "questions and requests about a topic", Topic, open_questions, OpenKnobs, "open_questions"
    ),
    "writing_tasks": _listed(
        "writing assignments about a topic", Topic, writing_tasks, WritingKnobs, "writing_tasks",
        each=lambda knobs: knobs.materials_per_topic or len(knobs.materials),
    ),
    "revise": _listed(
        "longer, more demanding forms of a prompt", Prompt, revise, RevisionKnobs,
        "revise_question", "revise_task", kept=lambda knobs: knobs.keep_draft,
    ),
    "closed_questions": _listed(
        "requests about a document", Document, closed_questions, ClosedKnobs, "closed_questions"
    ),
    "math_problems": _listed(
        "mathematics problems about a topic", Topic, math_problems, MathKnobs,
        "math_problems", "math_problems_beginner",
    ),
    "python_problems": _listed(
        "programming problems about a topic", Topic, python_problems, PythonKnobs, "python_problems",
        each=lambda knobs: len(knobs.levels),
    ),
}  # fmt: skip
