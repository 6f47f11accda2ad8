"""Instruction-following prompts: a prompt joined with verifiable constraints, in three forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron4.records import Message
from nemotron4.synth.constraints import DRAWERS, draw_constraints
from nemotron4.synth.rows import Answered, Constraint, Prompt, Row
from nemotron4.synth.stage import Context, Filtered, Kind

# Written by hand; {prompt} and {constraints} are replaced once.
SINGLE = (
    "{prompt}\n\n{constraints}",
    "{prompt} {constraints}",
    "{prompt}\n\nKeep to the following:\n{constraints}",
    "{constraints}\n\n{prompt}",
)
PERSISTENT = (
    "For this and all later questions of our conversation the following holds: {constraints}\n\n{prompt}",
    "Until I say otherwise, keep to this in each answer: {constraints}\n\nMy first question: {prompt}",
)
SECOND_TURN = (
    "Please write your answer again so that it meets this: {constraints}",
    "Good, but change your answer as follows. {constraints}",
    "Revise that. {constraints}",
)


@dataclass(frozen=True)
class ConstraintKnobs:
    """``share`` of the prompts get constraints, one to ``max_constraints`` each; the others do not pass."""

    share: float = 1.0
    max_constraints: int = 2
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.types) - set(DRAWERS)
        if unknown:
            raise ValueError(f"types has the unknown {sorted(unknown)}; known: {', '.join(DRAWERS)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; expected in (0, 1]")
        if not 1 <= self.max_constraints <= 3:
            raise ValueError(f"max_constraints is {self.max_constraints}; expected 1 to 3")


def _draw(text: str, context: Context, knobs: ConstraintKnobs) -> tuple[Constraint, ...]:
    draw = context.random("constraints")
    if draw.random() >= knobs.share:
        raise Filtered("not drawn", f"outside the share of {knobs.share:g}")
    return draw_constraints(text, draw.randint(1, knobs.max_constraints), draw, knobs.types or tuple(DRAWERS))


def _join(template: str, prompt: str, constraints: Sequence[Constraint]) -> str:
    said = " ".join(constraint.text for constraint in constraints)
    before, _, after = template.partition("{prompt}")
    pieces = [piece.replace("{constraints}", said) for piece in (before, after)]
    return pieces[0] + (prompt if "{prompt}" in template else "") + pieces[1]


async def single_turn(prompt: Prompt, context: Context, knobs: ConstraintKnobs) -> Sequence[Row]:
    """Prompt -> the prompt with constraints."""
    constraints = _draw(prompt.text, context, knobs)
    # Only the first form makes clear which words are to be repeated.
    has_repeat = any(constraint.type == "combination:repeat_prompt" for constraint in constraints)
    template = SINGLE[0] if has_repeat else context.random("template").choice(SINGLE)
    return [_constrained(prompt, prompt.messages[:-1], template, constraints, "single")]


async def persistent(prompt: Prompt, context: Context, knobs: ConstraintKnobs) -> Sequence[Row]:
    """Prompt -> the prompt after constraints that hold for the whole conversation."""
    types = tuple(name for name in knobs.types or DRAWERS if name != "combination:repeat_prompt")
    constraints = _draw(prompt.text, context, ConstraintKnobs(knobs.share, knobs.max_constraints, types))
    template = context.random("template").choice(PERSISTENT)
    return [_constrained(prompt, prompt.messages[:-1], template, constraints, "persistent")]


async def second_turn(answered: Answered, context: Context, knobs: ConstraintKnobs) -> Sequence[Row]:
    """Answered prompt -> prompt, first answer, and the wish to revise it under constraints."""
    types = tuple(name for name in knobs.types or DRAWERS if name != "combination:repeat_prompt")
    prompt, answer = answered.prompt, answered.responses[0].text
    constraints = _draw(answer, context, ConstraintKnobs(knobs.share, knobs.max_constraints, types))
    template = context.random("template").choice(SECOND_TURN)
    before = (*prompt.messages, Message("assistant", answer))
    return [_constrained(prompt, before, template, constraints, "second_turn")]


def _constrained(
    prompt: Prompt, before: Sequence[Message], template: str, constraints: Sequence[Constraint], form: str
) -> Prompt:
    text = _join(template, prompt.text, constraints)
    return Prompt(
        messages=(*before, Message("user", text)),
        task="instructions",
        topic=prompt.topic,
        form=form,
        constraints=tuple(constraints),
        document_id=prompt.document_id,
        tags=prompt.tags,
        meta={**prompt.meta, "task": prompt.task},
    )


def _kind(summary: str, takes: type, run: object) -> Kind:
    return Kind(
        summary=summary, takes=(takes,), makes=Prompt, knobs=ConstraintKnobs,
        run=run,  # type: ignore[arg-type]
        calls=lambda knobs: 0, fan_out=lambda knobs: knobs.share,
    )  # fmt: skip


KINDS = {
    "if_single": _kind("verifiable constraints in the prompt", Prompt, single_turn),
    "if_persistent": _kind("verifiable constraints for a whole conversation", Prompt, persistent),
    "if_second_turn": _kind("the wish to revise an answer under constraints", Answered, second_turn),
}
