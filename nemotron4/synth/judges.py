"""Judges behind one interface, and how far to trust them: bias, agreement, solve rate.

Ground truth decides what is right; an LLM judge compares two answers in both orders; a reward model scores
each answer alone.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nemotron4.client import BadContentError, Reward
from nemotron4.errors import DataError
from nemotron4.grading import answers, instructions, judgments
from nemotron4.grading.code import called_function, find_program, mbpp_program, run_program
from nemotron4.grading.sandbox import Sandbox, open_sandbox
from nemotron4.records import ATTRIBUTES, JsonObject, Message
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import StageConfig, SynthRecipe
from nemotron4.synth.rows import Answered, JudgedPair, Prompt, Response, decode
from nemotron4.synth.stage import Context, Filtered
from nemotron4.synth.tables import DONE, FILTERED

# The scalar of the 340B reward model (model card of Nemotron-4-340B-Reward).
CARD_WEIGHTS: Mapping[str, float] = {
    "helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33,
}  # fmt: skip


@dataclass(frozen=True)
class Ruling:
    """One number per answer (higher is better), and what the judge saw."""

    values: tuple[float, ...]
    scores: JsonObject = field(default_factory=dict)


class PairJudge(Protocol):
    """Raises Filtered when the answers cannot be told apart, BadContentError when it cannot decide."""

    name: str

    async def rule(self, answered: Answered, context: Context) -> Ruling: ...


class TruthJudge:
    """1 for an answer that is right, 0 for a wrong one: constraints, tests, or the known answer."""

    name = "truth"

    async def rule(self, answered: Answered, context: Context) -> Ruling:
        # Tests run in processes of their own: not on the event loop's thread.
        values = tuple(
            [await asyncio.to_thread(self._check, answered.prompt, answer) for answer in answered.responses]
        )
        return Ruling(values, {"correct": list(values)})

    def _check(self, prompt: Prompt, response: Response) -> float:
        if prompt.constraints:
            score = instructions.score(
                response.text,
                [constraint.type for constraint in prompt.constraints],
                [constraint.arguments for constraint in prompt.constraints],
            )
        elif prompt.tests is not None:
            tests = prompt.tests.splitlines()
            program = find_program(response.text, called_function(tests))
            score = run_program(mbpp_program(program, tests, ""), _sandbox())
        elif prompt.answer is not None:
            numeric = re.fullmatch(r"-?[\d,]+(?:\.\d+)?", prompt.answer.strip())
            score = (
                answers.gsm8k(response.text, prompt.answer, "value")
                if numeric
                else answers.boxed(response.text, prompt.answer)
            )
        else:
            raise Filtered("no ground truth", "the prompt has neither constraints, tests nor an answer")
        if score.value is None:
            raise BadContentError(f"not gradable: {score.reason}", kind="ungradable")
        return score.value


@functools.cache
def _sandbox() -> Sandbox:
    return open_sandbox()


_FORMS = ("[[A]]", "[[B]]", "[[C]]")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_RIVALS = 20  # the most that OpenAI's API gives of the likeliest tokens


@dataclass(frozen=True)
class _Verdict:
    """What one order gave. ``log_odds`` is ln P(A) - ln P(B), where the judge was read by log-probability."""

    letter: str
    log_odds: float | None = None


class LlmJudge:
    """Compares two answers twice, in both orders; only an agreement counts.

    text: the verdict is read from what the judge wrote. choice: the judge can write nothing but a verdict, so
    that there is always one; the endpoint must follow a choice. logprob: one token is asked for, and the
    likelier of the letters A and B is the verdict, also of a model which would rather write an essay.
    """

    name = "llm"

    def __init__(self, verdict: Literal["text", "choice", "logprob"] = "text") -> None:
        self._verdict = self._likelier if verdict == "logprob" else self._written
        self._choice = _FORMS if verdict == "choice" else ()

    async def rule(self, answered: Answered, context: Context) -> Ruling:
        if len(answered.responses) != 2:
            raise DataError(f"the LLM judge compares two answers, not {len(answered.responses)}; set k = 2")
        first, second = (response.text for response in answered.responses)
        forward = await self._verdict(answered.prompt, first, second, context, 0)
        backward = await self._verdict(answered.prompt, second, first, context, 500)
        seen = f"verdicts {forward.letter} and, swapped, {backward.letter}"
        scores: JsonObject = {"verdicts": [forward.letter, backward.letter]}
        if forward.log_odds is not None and backward.log_odds is not None:
            seen += f"; log-odds {forward.log_odds:.3f} and {backward.log_odds:.3f}"
            scores["log_odds"] = [round(forward.log_odds, 4), round(backward.log_odds, 4)]
        if forward.letter != {"A": "B", "B": "A", "C": "C"}[backward.letter]:
            raise Filtered("judge disagrees with itself", seen)
        if forward.letter == "C":
            raise Filtered("judge sees a tie", seen)
        return Ruling((1.0, 0.0) if forward.letter == "A" else (0.0, 1.0), scores)

    async def _written(
        self, prompt: Prompt, first: str, second: str, context: Context, base: int
    ) -> _Verdict:
        request = context.prompt("judge_pair", prompt=shown(prompt.messages), first=first, second=second)
        reply = None
        for repair in range(context.max_repairs + 1):
            reply = await context.chat((Message("user", request),), sample=base + repair, choice=self._choice)
            found = set(_VERDICT.findall(reply.text))
            if len(found) == 1:
                return _Verdict(str(found.pop()))
        raise BadContentError(
            f"no single verdict in {reply.text[-120:] if reply else ''!r}", kind="no_verdict"
        )

    async def _likelier(
        self, prompt: Prompt, first: str, second: str, context: Context, base: int
    ) -> _Verdict:
        request = context.prompt(
            "judge_pair_letter", prompt=shown(prompt.messages), first=first, second=second
        )
        reply = await context.chat(
            (Message("user", request),), sample=base, temperature=0.0, max_tokens=1, top_logprobs=_RIVALS
        )
        if not reply.logprobs:
            raise BadContentError("the endpoint sent no log-probabilities", kind="no_logprobs")
        score = judgments.letter_log_odds(dict(reply.logprobs[0].top))
        if score.value is None:
            raise BadContentError(f"{score.reason} in the first token", kind="no_verdict")
        return _Verdict("A" if score.value > 0 else "B" if score.value < 0 else "C", score.value)


class RankJudge:
    """Ranks two answers or more: every two are compared in both orders, and the log-odds are added up."""

    name = "rank"

    async def rule(self, answered: Answered, context: Context) -> Ruling:
        judge = LlmJudge("logprob")
        texts = [response.text for response in answered.responses]
        values = [0.0] * len(texts)
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                if i != j:
                    base = 1000 * i + j
                    verdict = await judge._likelier(answered.prompt, first, second, context, base)
                    odds = verdict.log_odds or 0.0
                    values[i] += odds
                    values[j] -= odds
        return Ruling(tuple(round(value, 4) for value in values))


class RewardJudge:
    """The weighted sum of the five attributes that a reward model gives each answer."""

    name = "reward"

    def __init__(self, weights: Mapping[str, float] = CARD_WEIGHTS) -> None:
        self._weights = weights

    async def rule(self, answered: Answered, context: Context) -> Ruling:
        rewards = [
            await context.score((*answered.prompt.messages, Message("assistant", response.text)))
            for response in answered.responses
        ]
        values = tuple(self.scalar(reward) for reward in rewards)
        attributes = [[reward.attributes[name] for name in ATTRIBUTES] for reward in rewards]
        return Ruling(values, {"attributes": attributes})

    def scalar(self, reward: Reward) -> float:
        return sum(weight * reward.attributes[name] for name, weight in self._weights.items())


def shown(messages: Sequence[Message]) -> str:
    """A conversation for a reader: one labelled turn after the other; a lone turn without label."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


_VERDICTS = re.compile(r"verdicts ([ABC]) and, swapped, ([ABC])(?:;|$)")


def judge_report(ledger: Reader, recipe: SynthRecipe) -> list[str]:
    """One sentence per finding; read from the ledger's rows, so it is the same after any number of starts."""
    lines = []
    for stage in recipe.stage:
        if stage.kind == "judge_llm":
            lines += _position(ledger, stage)
        if stage.kind == "judge_truth":
            lines += _solve_rate(ledger, stage)
        if stage.kind.startswith("judge_"):
            lines += _length(ledger, stage)
    return lines


def _made(ledger: Reader, stage: str) -> Iterator[JudgedPair]:
    for record in ledger.records_of(stage):
        row = decode(ledger.payload(record))
        assert isinstance(row, JudgedPair)
        yield row


def _position(ledger: Reader, stage: StageConfig) -> list[str]:
    pairs: Counter[tuple[str, str]] = Counter()
    for record, state, _ in ledger.inputs(stage.name):
        if state == FILTERED:
            reason = next(reason for name, _, _, reason in ledger.work_of(record) if name == stage.name)
            if found := _VERDICTS.search(reason or ""):
                pairs[found[1], found[2]] += 1
    for row in _made(ledger, stage.name):
        first, second = row.scores["verdicts"]
        pairs[first, second] += 1
    total = pairs.total()
    if not total:
        return []
    agreed = sum(pairs[pair] for pair in (("A", "B"), ("B", "A"), ("C", "C")))
    said = Counter(verdict for pair, number in pairs.items() for verdict in pair for _ in range(number))
    decided = said["A"] + said["B"]
    position = f"{said['A'] / decided:.1%} of the decided verdicts" if decided else "no verdict"
    return [
        f"`{stage.name}`: of {total} pairs shown in both orders, {agreed / total:.1%} got agreeing verdicts; "
        f"the answer shown first was preferred in {position} (50 % is no position bias)."
    ]


def _solve_rate(ledger: Reader, stage: StageConfig) -> list[str]:
    """From the outcomes of whole prompts; answers of one prompt are right, wrong or mixed."""
    outcomes: Counter[str] = Counter()
    for _, state, rule in ledger.inputs(stage.name):
        if state == DONE:
            outcomes["mixed"] += 1
        elif state == FILTERED and rule in ("all right", "all wrong"):
            outcomes[rule] += 1
    total = outcomes.total()
    if not total:
        return []
    return [
        f"`{stage.name}`: of {total} graded prompts {outcomes['all right']} had only right answers, "
        f"{outcomes['all wrong']} only wrong ones, {outcomes['mixed']} both and so gave a pair."
    ]


def _length(ledger: Reader, stage: StageConfig) -> list[str]:
    number = longer = chosen = rejected = 0
    for row in _made(ledger, stage.name):
        number += 1
        longer += len(row.chosen.text) > len(row.rejected.text)
        chosen += len(row.chosen.text)
        rejected += len(row.rejected.text)
    if not number:
        return []
    return [
        f"`{stage.name}`: the chosen answer is the longer one in {longer / number:.1%} of {number} pairs; "
        f"mean lengths {chosen / number:.0f} and {rejected / number:.0f} characters (chosen, rejected)."
    ]
