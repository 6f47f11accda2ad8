"""Dialogues that stay on their topic although the user strays (the CantTalkAboutThis method).

Domain -> scenarios -> a system instruction, an on-topic dialogue, distractors -> the dialogue with each
distractor put after its assistant turn and answered by a fixed way back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from nemotron4.client import BadContentError, Sampling
from nemotron4.records import JsonObject, Message
from nemotron4.synth.parsing import normalise
from nemotron4.synth.rows import Dialogue, Row, Topic
from nemotron4.synth.stage import Context, Kind
from nemotron4.synth.stages.asking import LIST_PROMPTS, ask_list

# The way back is not the model's: it must be the same every time.
RETURN = "I am sorry, I can only help with questions about this subject. Shall we go on where we were?"


@dataclass(frozen=True)
class ScenarioKnobs:
    """``n`` scenarios for each domain that comes in."""

    n: int = 10


@dataclass(frozen=True)
class FollowingKnobs:
    """``min_turns`` user turns at least; ``distractors`` asked for in each dialogue."""

    distractors: int = 5
    min_turns: int = 4

    def __post_init__(self) -> None:
        if self.distractors < 1 or self.min_turns < 1:
            raise ValueError("distractors and min_turns must be 1 or more")


async def scenarios(domain: Topic, context: Context, knobs: ScenarioKnobs) -> Sequence[Row]:
    """Domain -> scenarios in which an assistant serves people."""
    question = context.prompt("topic_scenarios", n=knobs.n, domain=domain.topic)
    found = await ask_list(context, question, knobs.n)
    return [Topic(topic=text, area=domain.area, above=domain.topic) for text in found]


async def topic_following(scenario: Topic, context: Context, knobs: FollowingKnobs) -> Sequence[Row]:
    """Scenario -> a dialogue with distractors; ``meta.distractors`` are the places of the straying turns."""
    instruction = await _text(context, context.prompt("topic_instruction", scenario=scenario.topic), base=0)
    turns = await _dialogue(context, instruction, knobs)
    found = await _distractors(context, instruction, turns, knobs)
    messages, places = insert_distractors(turns, found)
    context.count("distractors_without_place", len(found) - len(places))
    if not places:
        raise BadContentError("no distractor names a turn of the dialogue", kind="no_distractor")
    meta: JsonObject = {"domain": scenario.above, "scenario": scenario.topic}
    meta["distractors"] = [place + 1 for place in places]  # the system message comes first
    return [
        Dialogue(
            messages=(Message("system", instruction), *messages),
            task="topic_following",
            topic=scenario.above,
            meta=meta,
        )
    ]


async def _text(context: Context, request: str, *, base: int) -> str:
    for repair in range(context.max_repairs + 1):
        reply = await context.chat((Message("user", request),), sample=base + repair)
        text = " ".join(reply.text.split())
        if text and reply.finish_reason != "length":
            return text
    raise BadContentError("no whole paragraph", kind="blank")


async def _dialogue(context: Context, instruction: str, knobs: FollowingKnobs) -> list[Message]:
    request = context.prompt("topic_dialogue", instruction=instruction, n=knobs.min_turns + 2)
    text = ""
    for repair in range(context.max_repairs + 1):
        text = (await context.chat((Message("user", request),), sample=100 + repair)).text
        turns = parse_dialogue(text)
        if sum(turn.role == "user" for turn in turns) >= knobs.min_turns:
            return turns
    raise BadContentError(f"no dialogue of {knobs.min_turns} turns in {text[:120]!r}", kind="no_dialogue")


async def _distractors(
    context: Context, instruction: str, turns: Sequence[Message], knobs: FollowingKnobs
) -> list[tuple[str, str]]:
    told = "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
    request = context.prompt("topic_distractors", instruction=instruction, dialogue=told, n=knobs.distractors)
    text = ""
    for repair in range(context.max_repairs + 1):
        text = (await context.chat((Message("user", request),), sample=200 + repair)).text
        found = parse_distractors(text)
        if found:
            return found
    raise BadContentError(f"no distractors in {text[:120]!r}", kind="no_distractor")


_TURN = re.compile(
    r"^\W{0,4}(user|customer|client|person|human|assistant|agent|bot)\W{0,4}:\W{0,3}", re.IGNORECASE
)


def parse_dialogue(text: str) -> list[Message]:
    """Labelled turns that alternate, from the first user turn to the last assistant turn."""
    turns: list[Message] = []
    for line in text.splitlines():
        label = _TURN.match(line)
        if label:
            role = "assistant" if label[1].lower() in ("assistant", "agent", "bot") else "user"
            turns.append(Message(role, line[label.end() :].strip()))
        elif turns and line.strip():
            turns[-1] = Message(turns[-1].role, f"{turns[-1].content}\n{line.strip()}".strip())
    while turns and turns[0].role != "user":
        turns.pop(0)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    alternates = all(turn.role == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    return turns if alternates and all(turn.content for turn in turns) else []


def parse_distractors(text: str) -> list[tuple[str, str]]:
    """(assistant turn, straying user turn) pairs of a JSON array of objects, wherever it is."""
    for start in (match.start() for match in re.finditer(r"\[", text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            continue
        if isinstance(value, list):
            pairs = [(v.get("bot turn"), v.get("distractor user turn")) for v in value if isinstance(v, dict)]
            return [(a.strip(), b.strip()) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
    return []


def insert_distractors(
    turns: Sequence[Message], found: Sequence[tuple[str, str]]
) -> tuple[list[Message], list[int]]:
    """The dialogue with each distractor after the assistant turn it names, and where the distractors are."""
    after: dict[int, str] = {}
    for named, distractor in found:
        place = _place(turns, named)
        if place is not None and distractor:
            after.setdefault(place, distractor)
    messages: list[Message] = []
    places: list[int] = []
    for i, turn in enumerate(turns):
        messages.append(turn)
        if i in after:
            places.append(len(messages))
            messages += [Message("user", after[i]), Message("assistant", RETURN)]
    return messages, places


def _place(turns: Sequence[Message], named: str) -> int | None:
    """The assistant turn that is most like the named one, if it is much like it."""
    wanted = normalise(named)
    likeness = {
        i: 1.0 if wanted and wanted in normalise(turn.content) else
        SequenceMatcher(None, wanted, normalise(turn.content), autojunk=False).ratio()
        for i, turn in enumerate(turns) if turn.role == "assistant"
    }  # fmt: skip
    best = max(likeness, key=lambda i: likeness[i], default=None)
    return best if best is not None and likeness[best] > 0.8 else None


KINDS = {
    "topic_scenarios": Kind(
        summary="situations in which an assistant serves people of a domain",
        takes=(Topic,), makes=Topic, knobs=ScenarioKnobs, run=scenarios,
        prompts=("topic_scenarios", *LIST_PROMPTS), sampling=Sampling(temperature=0.8, max_tokens=1024),
        calls=lambda knobs: -(-knobs.n // 20), fan_out=lambda knobs: knobs.n,
    ),
    "topic_following": Kind(
        summary="dialogues that stay on their topic although the user strays",
        takes=(Topic,), makes=Dialogue, knobs=FollowingKnobs, run=topic_following,
        prompts=("topic_instruction", "topic_dialogue", "topic_distractors"),
        sampling=Sampling(temperature=0.7, max_tokens=2048), calls=lambda _: 3, fan_out=lambda _: 1,
    ),
}  # fmt: skip
