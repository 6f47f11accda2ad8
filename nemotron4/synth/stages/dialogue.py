"""Conversations: second turns by personas, whole dialogues, and tasks that are to be declined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemotron4.client import BadContentError, Sampling
from nemotron4.grading.refusals import is_refusal
from nemotron4.records import Message
from nemotron4.synth.judges import CARD_WEIGHTS, RewardJudge
from nemotron4.synth.rows import Dialogue, Prompt, Row, Topic
from nemotron4.synth.stage import Context, Filtered, Kind, NoSettings
from nemotron4.synth.stages.asking import LIST_PROMPTS, answer, ask_list
from nemotron4.synth.words import count_words

PERSONAS = ("normal", "complex", "concise")
_PERSONA_PROMPTS = ("second_user_turn", *(f"persona_{name}" for name in PERSONAS))


def _check_personas(personas: Sequence[str]) -> None:
    unknown = set(personas) - set(PERSONAS)
    if unknown or not personas:
        raise ValueError(f"personas is {list(personas)}; expected some of {', '.join(PERSONAS)}")


@dataclass(frozen=True)
class TwoTurnKnobs:
    """Who speaks in the second user turn; drawn for each prompt."""

    personas: tuple[str, ...] = PERSONAS

    def __post_init__(self) -> None:
        _check_personas(self.personas)


@dataclass(frozen=True)
class DialogueKnobs:
    """``max_words``: before a call that would exceed it, the dialogue ends with its last answer."""

    user_turns: int = 3
    personas: tuple[str, ...] = PERSONAS
    strip_politeness: bool = True
    max_words: int = 2500

    def __post_init__(self) -> None:
        _check_personas(self.personas)
        if self.user_turns < 1:
            raise ValueError(f"user_turns is {self.user_turns}; expected 1 or more")


@dataclass(frozen=True)
class IncapableKnobs:
    n: int = 5


@dataclass(frozen=True)
class ThresholdKnobs:
    """The reward model's least helpfulness and, if not zero, its least weighted sum."""

    min_helpfulness: float = 0.0
    min_reward: float = float("-inf")


async def two_turn(prompt: Prompt, context: Context, knobs: TwoTurnKnobs) -> Sequence[Row]:
    """Prompt -> user, assistant, user: a prompt whose answer has a history."""
    persona = context.random("persona").choice(knobs.personas)
    reply = await answer(context, prompt.messages, sample=0)
    history = (*prompt.messages, Message("assistant", reply.text.strip()))
    following = await user_turn(context, history, persona, base=1)
    return [
        Prompt(
            messages=(*history, Message("user", following)),
            task="two_turn",
            topic=prompt.topic,
            tags=prompt.tags,
            meta={**prompt.meta, "task": prompt.task, "persona": persona},
        )
    ]


async def dialogue(prompt: Prompt, context: Context, knobs: DialogueKnobs) -> Sequence[Row]:
    """Prompt -> a dialogue of several turns; one model plays both sides."""
    persona = context.random("persona").choice(knobs.personas)
    messages = prompt.messages
    for turn in range(knobs.user_turns):
        if turn:
            following = await user_turn(context, messages, persona, base=10 * turn + 5)
            following = strip_politeness(following) if knobs.strip_politeness else following
            if not following:
                raise Filtered("only politeness", f"user turn {turn + 1} says nothing else")
            messages = (*messages, Message("user", following))
        if sum(count_words(message.content) for message in messages) > knobs.max_words:
            if not turn:
                raise Filtered("too long", f"the prompt alone has over {knobs.max_words} words")
            messages = messages[:-1]
            context.count("dialogues_cut")
            break
        reply = await answer(context, messages, sample=10 * turn)
        if reply.finish_reason == "length":
            raise Filtered("truncated", f"the token limit cut answer {turn + 1}")
        messages = (*messages, Message("assistant", reply.text.strip()))
    meta = {"persona": persona, "form": prompt.form}
    return [Dialogue(messages=messages, task=prompt.task, topic=prompt.topic, tags=prompt.tags, meta=meta)]


async def user_turn(context: Context, history: Sequence[Message], persona: str, *, base: int) -> str:
    """The next message of the person, without label or quotes; an answer instead is asked for again."""
    told = "\n\n".join(
        f"{'Person' if message.role == 'user' else message.role.capitalize()}: {message.content}"
        for message in history
    )
    request = context.prompt("second_user_turn", history=told, persona=context.prompt(f"persona_{persona}"))
    text = ""
    for repair in range(context.max_repairs + 1):
        reply = await context.chat((Message("user", request),), sample=base + 100 * repair)
        text = _LABEL.sub("", reply.text.strip()).strip().strip('"“”').strip()
        is_usable = text and not _ASSISTANT.match(text) and not is_refusal(text)
        if is_usable and reply.finish_reason != "length":
            return text
    raise BadContentError(f"no user turn, but {text[:120]!r}", kind="no_user_turn")


_LABEL = re.compile(
    r"^(?:\*\*)?(?:person|user|human|next message)(?:'s next message)?\s*:(?:\*\*)?\s*", re.IGNORECASE
)
_ASSISTANT = re.compile(
    r"(?:\*\*)?assistant\s*:|as an? (?:ai|assistant)\b|"
    r"(?:sure|certainly|of course)[,!] (?:here|i can|i'd be)",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"(?:(?:oh|ah|wow|great|ok|okay|well|yes)[,!]?\s+)?(?:thank(?:s| you)|i (?:really |truly )?appreciate|"
    r"that(?:'s| is| was) (?:(?:very|really|so|super) )?(?:great|helpful|interesting|useful|kind|"
    r"amazing|wonderful)|"
    r"(?:sounds|looks) (?:great|good|wonderful)|(?:great|excellent|perfect|wonderful)\s*[.!]|"
    r"i(?:'d| would) (?:be (?:happy|glad)|love) to)[^.!?]*[.!]?\s*$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?]+[.!?]*[\"'”’)]*\s*")


def strip_politeness(text: str) -> str:
    """The text without sentences that only thank, praise or declare willingness; questions always stay."""
    kept = [
        sentence
        for sentence in _SENTENCE.findall(text)
        if "?" in sentence or not _POLITE.match(sentence.strip())
    ]
    return "".join(kept).strip()


async def incapable_tasks(topic: Topic, context: Context, knobs: IncapableKnobs) -> Sequence[Row]:
    """Topic -> tasks that a language model without tools cannot do."""
    question = context.prompt("incapable_tasks", n=knobs.n, topic=topic.topic)
    return [
        Prompt(messages=(Message("user", text),), task="incapable", topic=topic.topic)
        for text in await ask_list(context, question, knobs.n)
    ]


async def decline(prompt: Prompt, context: Context, knobs: NoSettings) -> Sequence[Row]:
    """Task that cannot be done -> a dialogue in which the assistant says so."""
    request = context.prompt("decline", prompt=prompt.text)
    text = ""
    for sample in range(context.max_repairs + 1):
        reply = await context.chat((Message("user", request),), sample=sample)
        text = reply.text.strip()
        if is_refusal(text) and reply.finish_reason != "length":
            messages = (*prompt.messages, Message("assistant", text))
            return [Dialogue(messages=messages, task=prompt.task, topic=prompt.topic, tags=prompt.tags)]
    raise BadContentError(f"the answer does not decline: {text[:120]!r}", kind="no_refusal")


async def score_dialogue(row: Dialogue, context: Context, knobs: ThresholdKnobs) -> Sequence[Row]:
    """A dialogue passes if the reward model finds its last answer good enough; the scores stay with it."""
    reward = await context.score(row.messages)
    scalar = RewardJudge(CARD_WEIGHTS).scalar(reward)
    helpfulness = reward.attributes["helpfulness"]
    if helpfulness < knobs.min_helpfulness:
        raise Filtered("low helpfulness", f"{helpfulness:.3f}; at least {knobs.min_helpfulness:g} is asked")
    if scalar < knobs.min_reward:
        raise Filtered("low reward", f"{scalar:.3f}; at least {knobs.min_reward:g} is asked")
    scores = {**reward.attributes, "reward": scalar}
    return [replace(row, scores=scores)]


KINDS = {
    "two_turn": Kind(
        summary="a first answer and a second user turn by a persona",
        takes=(Prompt,), makes=Prompt, knobs=TwoTurnKnobs, run=two_turn, prompts=_PERSONA_PROMPTS,
        sampling=Sampling(temperature=0.7, max_tokens=1024), calls=lambda _: 2, fan_out=lambda _: 1,
    ),
    "dialogue": Kind(
        summary="dialogues of several turns, one model on both sides",
        takes=(Prompt,), makes=Dialogue, knobs=DialogueKnobs, run=dialogue, prompts=_PERSONA_PROMPTS,
        sampling=Sampling(temperature=0.0, max_tokens=1024),
        calls=lambda knobs: 2 * knobs.user_turns - 1, fan_out=lambda _: 0.9,
    ),
    "incapable_tasks": Kind(
        summary="tasks that a language model without tools cannot do",
        takes=(Topic,), makes=Prompt, knobs=IncapableKnobs, run=incapable_tasks,
        prompts=("incapable_tasks", *LIST_PROMPTS), sampling=Sampling(temperature=0.8, max_tokens=1024),
        calls=lambda _: 1, fan_out=lambda knobs: knobs.n,
    ),
    "decline": Kind(
        summary="answers that decline such tasks",
        takes=(Prompt,), makes=Dialogue, run=decline, prompts=("decline",),
        sampling=Sampling(temperature=0.5, max_tokens=512), calls=lambda _: 1, fan_out=lambda _: 1,
    ),
    "score_dialogue": Kind(
        summary="dialogues the reward model finds good enough",
        takes=(Dialogue,), makes=Dialogue, knobs=ThresholdKnobs, run=score_dialogue,
        needs=lambda _: "rewards", sampling=Sampling(), calls=lambda _: 1, fan_out=lambda _: 0.7,
    ),
}  # fmt: skip
