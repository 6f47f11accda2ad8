"""What answers are worth: a program's checks, the user's function, a reward model or server, a judge."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import threading
import weakref
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.client import (
    BadContentError,
    ClientError,
    OpenAIChatModel,
    RetryPolicy,
    Sampling,
    api_key,
    call_with_retries,
)
from nemotron4.client.own_code import OwnCode, needed_parameters, split_name
from nemotron4.errors import ConfigError, DataError, RequestError, TemplateError, unknown_name
from nemotron4.grading import answers as grade
from nemotron4.grading import instructions
from nemotron4.grading.judgments import rating
from nemotron4.grading.score import Score
from nemotron4.inference.reward import RewardEngine, load_reward
from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.training.recipe import Recipe
from nemotron4.training.reference import model_hash
from nemotron4.training.rollout_settings import PREVIOUS, PolicyGradientSection, RewardSource
from nemotron4.training.rollouts import Answer, Judge, RewardVerdict, RolloutBackend
from nemotron4.training.stopping import StopSwitch

# -- a program's checks

Check = Callable[[Answer], Score | float]


class Verifier:
    """A judge that looks at one answer at a time. Equal answers get equal rewards."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.identity = ""  # what it checks is in the recipe and in the rows

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return [self._judge(answer) for answer in answers]

    def _judge(self, answer: Answer) -> RewardVerdict:
        try:
            found = self._check(answer)
        except DataError as error:  # the row's own arguments are wrong: no other answer would fare better
            return RewardVerdict(None, error.message)
        if isinstance(found, Score):
            return RewardVerdict(found.value, found.reason or "")
        return RewardVerdict(found)


def verifier(source: RewardSource) -> Verifier:
    """The verifier of the recipe's kind; ConfigError for a pattern that is none."""
    if source.kind == "gsm8k":
        return Verifier(lambda answer: grade.gsm8k(answer.text, _reference(answer, source.answer_field)))
    if source.kind == "boxed":
        return Verifier(lambda answer: grade.boxed(answer.text, _reference(answer, source.answer_field)))
    if source.kind == "instructions":
        return Verifier(_share_followed)
    assert source.pattern is not None, "the recipe has checked it"
    try:
        pattern = re.compile(source.pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward pattern {source.pattern!r}: {error}") from error
    return Verifier(lambda answer: float(pattern.fullmatch(answer.text) is not None))


def _reference(answer: Answer, name: str) -> str:
    value = answer.fields[name]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"field {name!r} is {value!r}; expected a text or a number")


def _share_followed(answer: Answer) -> float:
    """The share of the row's instructions that the answer follows, strictly read."""
    names, arguments = answer.fields["instruction_id_list"], answer.fields["kwargs"]
    if not isinstance(names, list) or not names or not isinstance(arguments, list):
        raise DataError("instruction_id_list and kwargs are not two lists of one length, with an entry")
    given = [{k: v for k, v in (each or {}).items() if v is not None} for each in arguments]
    followed = instructions.follows(answer.text, names, given)
    return sum(followed) / len(followed)


# -- reward models

MAX_IN_FLIGHT = 32
RETRIES = RetryPolicy(max_attempts=5, max_wait_s=10.0)


def conversation(answer: Answer) -> tuple[Message, ...]:
    assert not isinstance(answer.prompt, str), "rows of rendered text are refused when they are read"
    return (*answer.prompt, Message("assistant", answer.text))


def _checked_attribute(source: RewardSource) -> str:
    known = ("scalar", *ATTRIBUTES)
    if source.attribute not in known:
        message, hint = unknown_name("attribute", source.attribute, known)
        raise ConfigError(message, hint=hint)
    return source.attribute


class ModelJudge:
    """A reward model in this process, on the policy's device. An answer that does not fit is not judged."""

    def __init__(self, source: RewardSource, device: str) -> None:
        if source.model == PREVIOUS:
            raise ConfigError(
                "reward model 'previous' is the reward stage before this one in a chain",
                hint="name a checkpoint, or put the stage into a chain behind one of kind reward",
            )
        assert source.model is not None, "the recipe has checked it"
        self._attribute = _checked_attribute(source)
        self._engine: RewardEngine = load_reward(source.model, device=device)
        self.identity = model_hash(self._engine.model)

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        verdicts: list[RewardVerdict | None] = [None] * len(answers)
        rows: dict[int, list[int]] = {}
        for place, answer in enumerate(answers):
            try:
                rows[place] = self._engine.encode(conversation(answer))
            except (RequestError, TemplateError) as error:
                verdicts[place] = RewardVerdict(None, error.message)
        rewards = self._engine.score_ids(list(rows.values()))
        for place, reward in zip(rows, rewards, strict=True):
            value = reward.scalar if self._attribute == "scalar" else reward.attributes[self._attribute]
            verdicts[place] = RewardVerdict(value)
        return [verdict for verdict in verdicts if verdict is not None]


class HttpJudge:
    """``POST /score`` of a server. A call that fails is repeated; one that keeps failing gives no reward."""

    def __init__(self, source: RewardSource, stop: StopSwitch | None = None) -> None:
        assert source.url is not None, "the recipe has checked it"
        self._url = source.url.rstrip("/").removesuffix("/v1")
        self._model = source.model or "reward"
        self._attribute = _checked_attribute(source)
        self._api_key = api_key(source.api_key_env, f"reward of kind {source.kind!r}")
        self.identity = ""  # the server may change at any time; the recipe names it
        self._stop = stop or StopSwitch()

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return asyncio.run(self._stop.wait(self._judge_all(answers)))

    async def _judge_all(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        model = OpenAIChatModel(self._url, self._model, api_key=self._api_key)
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def judge(place: int, answer: Answer) -> RewardVerdict:
            async with room:
                try:
                    return await self._judge(model, place, answer)
                except ClientError as error:
                    return RewardVerdict(None, error.message)

        try:
            return list(await asyncio.gather(*(judge(i, answer) for i, answer in enumerate(answers))))
        finally:
            await model.close()

    async def _judge(self, model: OpenAIChatModel, place: int, answer: Answer) -> RewardVerdict:
        messages = conversation(answer)
        reward = await call_with_retries(lambda: model.score(messages), policy=RETRIES, seed=place)
        if self._attribute != "scalar":
            if self._attribute not in reward.attributes:
                raise BadContentError(f"{self._url}: no attribute {self._attribute!r}", kind="no_reward")
            return RewardVerdict(reward.attributes[self._attribute])
        if reward.scalar is None:
            raise BadContentError(
                f"{self._url}: attributes without a reward; name one of them as attribute", kind="no_reward"
            )
        return RewardVerdict(reward.scalar)


RATING_PROMPT = """Rate how well the answer serves the request, from 1 to 10. Weigh helpfulness, \
correctness and clarity; a longer answer is not a better one. First give your reasons in one or two \
sentences, then the rating in this form: [[5]].

[request]
{prompt}
[end of the request]

[answer]
{answer}
[end of the answer]"""


class GenerativeJudge(HttpJudge):
    """A chat model behind an OpenAI route that writes a judgment with a rating from 1 to 10: ``[[7]]``."""

    def __init__(self, source: RewardSource, stop: StopSwitch | None = None) -> None:
        super().__init__(source, stop)
        self._prompt = RATING_PROMPT
        if source.prompt is not None:
            try:
                self._prompt = Path(source.prompt).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"reward of kind 'genrm': {source.prompt}: {error}") from error
        if "{answer}" not in self._prompt:
            raise ConfigError("reward of kind 'genrm': its prompt has no {answer}")
        self._sampling = Sampling(max_tokens=source.max_tokens)
        self.identity = hashlib.sha256(self._prompt.encode()).hexdigest()

    async def _judge(self, model: OpenAIChatModel, place: int, answer: Answer) -> RewardVerdict:
        said = conversation(answer)[:-1]
        shown = "\n\n".join(f"{message.role}: {message.content}" for message in said)
        if len(said) == 1:
            shown = said[0].content
        values = {**answer.fields, "prompt": shown, "answer": answer.text}
        # One pass: what an answer contains is not filled in again.
        text = re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), self._prompt)
        messages = [Message("user", text)]
        reply = await call_with_retries(
            lambda: model.chat(messages, self._sampling), policy=RETRIES, seed=place
        )
        found = rating(reply.text)
        return RewardVerdict(found.value, found.reason or "")


# -- the user's function


JUDGED = ("prompt", "answer", "completion", "row")  # TRL calls an answer completion


def _check_parameters(path: str, names: Sequence[str]) -> None:
    """ConfigError before anything is generated, if the function asks for what no answer has."""
    one, many = set(JUDGED), {f"{name}s" for name in JUDGED}
    if "completions" in names:  # as in TRL: the others may be columns of the rows
        return
    if not (set(names) <= one or set(names) <= many):
        raise ConfigError(
            f"{path} asks for {', '.join(names)}; expected prompt, answer and row, or lists of them: "
            "prompts, answers and rows",
            hint="give what else it needs a default",
        )


class FunctionJudge:
    """A function of prompt, answer and row, or of lists of them, in a process of its own.

    It returns a number for each answer; None is no reward. A crash or a hang costs answers, not the run.
    """

    def __init__(self, source: RewardSource, stop: StopSwitch | None = None) -> None:
        assert source.path is not None, "the recipe has checked it"
        file, name = split_name(source.path)
        _check_parameters(source.path, needed_parameters(file, name))
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()
        self._path = source.path
        self._code = OwnCode(source.path, batch_size=MAX_IN_FLIGHT, timeout_s=source.timeout_s, by_name=True)
        self._runner = asyncio.Runner()
        self._stop = stop or StopSwitch()
        weakref.finalize(self, _end, self._runner, self._code)

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return self._runner.run(self._stop.wait(self._judge_all(answers)))

    async def _judge_all(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        try:
            return list(await asyncio.gather(*(self._judge(answer) for answer in answers)))
        except asyncio.CancelledError:
            await self._code.close()
            raise

    async def _judge(self, answer: Answer) -> RewardVerdict:
        prompt = answer.prompt
        plain = prompt if isinstance(prompt, str) else [message.to_json() for message in prompt]
        try:
            value = await self._code.call(
                {"prompt": plain, "answer": answer.text, "completion": answer.text}
                | {"row": dict(answer.fields)}
            )
        except BadContentError as error:
            return RewardVerdict(None, error.message)
        if value is None:
            return RewardVerdict(None, f"{self._path} gave no reward")
        if isinstance(value, bool | int | float):
            return RewardVerdict(float(value))
        return RewardVerdict(None, f"{self._path} returned {value!r}; expected a number or None")


def _end(runner: asyncio.Runner, code: OwnCode) -> None:
    """Called when the judge is collected, which may be while another loop runs in this thread."""

    def close() -> None:
        runner.run(code.close())
        runner.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        close()
    else:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()


# -- a recipe's rewards


def connect(recipe: Recipe, base: Checkpoint) -> RolloutBackend:
    """The engine for the recipe's model and the sum of its judges; see ``rollouts.Connect``."""
    rollouts = recipe.kind.rollouts(recipe.settings)
    assert rollouts is not None, "the stage draws answers"
    sources = rollouts.rewards
    stop = StopSwitch()
    judges = [_judge(source, recipe.model.device, stop) for source in sources]
    return RolloutBackend(RolloutEngine(base), WeightedJudges(sources, judges), stop)


def check_judges(recipe: Recipe, made: Container[str]) -> None:
    """An error for a judge, or a critic's start, that is not there, before anything trains.

    ``made`` are folders of models that earlier stages will leave. No model is loaded and no server asked.
    """
    rollouts = recipe.kind.rollouts(recipe.settings)
    if rollouts is None:
        return
    models = [rollouts.critic.start] if isinstance(rollouts, PolicyGradientSection) else []
    for source in rollouts.rewards:
        if source.kind == "reward_model" and source.model != PREVIOUS:
            _checked_attribute(source)
            models.append(source.model)
        elif source.kind != "reward_model":
            _judge(source, "cpu")
    for model in models:
        if model is not None and model not in made:
            open_checkpoint(model)


def _judge(source: RewardSource, device: str, stop: StopSwitch | None = None) -> Judge:
    if source.kind == "reward_model":
        return ModelJudge(source, device)
    if source.kind == "python":
        return FunctionJudge(source, stop)
    if source.kind == "genrm":
        return GenerativeJudge(source, stop)
    return HttpJudge(source, stop) if source.kind == "http" else verifier(source)


class WeightedJudges:
    """The sum of ``weight * (value - shift)``; an answer that one judge cannot judge has no reward.

    What a judge values less than its ``gate`` is not shown to the judges after it, which add nothing.
    """

    def __init__(self, sources: Sequence[RewardSource], judges: Sequence[Judge]) -> None:
        self._sources = sources
        self._judges = judges
        self.identity = " ".join(judge.identity for judge in judges)

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        totals = [RewardVerdict(0.0) for _ in answers]
        open_places = list(range(len(answers)))
        for source, judge in zip(self._sources, self._judges, strict=True):
            if not open_places:
                break
            found = judge([answers[place] for place in open_places])
            still_open = []
            for place, verdict in zip(open_places, found, strict=True):
                totals[place] = _added(totals[place], source, verdict)
                if totals[place].value is None or verdict.value is None:
                    continue
                if source.gate is None or verdict.value >= source.gate:
                    still_open.append(place)
            open_places = still_open
        return totals


def _added(total: RewardVerdict, source: RewardSource, verdict: RewardVerdict) -> RewardVerdict:
    if verdict.value is None:
        return RewardVerdict(None, verdict.reason)
    if not math.isfinite(verdict.value):
        return RewardVerdict(None, f"the reward of kind {source.kind!r} is {verdict.value}")
    assert total.value is not None, "answers without a reward are not judged further"
    return RewardVerdict(total.value + source.weight * (verdict.value - source.shift))
