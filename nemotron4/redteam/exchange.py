"""Sessions to and from the files of PyRIT and promptfoo.

PyRIT: its message pieces as JSON, one object for each message, and a seed data set. promptfoo: the JSON of
`promptfoo eval --output`, and a configuration whose tests ask for a refusal. Tried with PyRIT 1.1.0 and
promptfoo 0.121.20.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.annotation.vocabulary import Annotation
from nemotron4.errors import DataError
from nemotron4.records import JsonObject, Message, read_json_lines
from nemotron4.redteam.session_report import attack_title
from nemotron4.redteam.sessions import CATEGORIES, TECHNIQUES, Reviewed, Session, SessionStore, take_row

_TEXTS = ("text", None)
# promptfoo's plugins and PyRIT's harm categories, by a part of their name.
_CATEGORIES = {
    "violen": "violence", "sexual": "sexual", "child": "sexual_minor", "crime": "criminal_planning",
    "criminal": "criminal_planning", "weapon": "weapons", "drug": "substances", "self-harm": "self_harm",
    "self_harm": "self_harm", "hate": "hate", "privacy": "privacy", "pii": "privacy",
    "harass": "harassment", "bullying": "harassment", "profanity": "profanity", "cyber": "malware",
    "malware": "malware", "malicious-code": "malware", "misinformation": "false_claim",
    "disinformation": "false_claim", "prompt-extraction": "prompt_leak",
}  # fmt: skip
_TECHNIQUES = {
    "basic": "direct", "jailbreak": "automatic", "crescendo": "multi_turn", "goat": "multi_turn",
    "base64": "encoding", "rot13": "encoding", "leetspeak": "encoding", "multilingual": "language",
    "prompt-injection": "prompt_injection",
}  # fmt: skip


def take_file(store: SessionStore, path: Path, form: str, *, annotator: str) -> tuple[int, list[str]]:
    """Keep every conversation of the file that can be used; how many, and what was wrong with the others."""
    num_taken, refused = 0, []
    if form == "sessions":
        for number, row in read_json_lines(path):
            try:
                take_row(store, row)
                num_taken += 1
            except DataError as error:
                refused.append(f"{path}:{number}: {error}")
        return num_taken, refused
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    for name, make in _READERS[form](content, path, annotator):
        try:
            store.record(*make())
            num_taken += 1
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            said = error.message if isinstance(error, DataError) else f"not in the form of {form}: {error!r}"
            refused.append(f"{path}: {name}: {said}")
    return num_taken, refused


Made = tuple[Session, list[Annotation]]
Found = Iterator[tuple[str, Callable[[], Made]]]


def _read_pyrit(content: Any, path: Path, annotator: str) -> Found:
    pieces = content if isinstance(content, list) else None
    if pieces is None or not all(isinstance(piece, dict) and "conversation_id" in piece for piece in pieces):
        raise DataError(
            f"{path}: not an export of PyRIT: expected a list of messages with conversation_id",
            hint="write [piece.model_dump(mode='json') for piece in memory.get_message_pieces()] as JSON "
            "(before PyRIT 1: memory.export_conversations)",
        )
    talks: dict[str, list[JsonObject]] = {}
    for piece in pieces:
        talks.setdefault(str(piece["conversation_id"]), []).append(piece)
    for name, talk in talks.items():
        yield name, lambda name=name, talk=talk: _pyrit_session(name, talk, annotator)  # type: ignore[misc]


def _pyrit_session(name: str, talk: Sequence[JsonObject], annotator: str) -> Made:
    """Turns in the order of their sequence, as the target got them; a true-false score is the outcome."""
    ordered = sorted(talk, key=lambda piece: int(piece.get("sequence") or 0))
    if any(piece.get("converted_value_data_type") not in _TEXTS for piece in ordered):
        raise DataError("holds something else than text")
    messages = tuple(
        Message(str(piece["role"]), str(piece.get("converted_value") or piece["original_value"]))
        for piece in ordered
    )
    scores = [score for piece in ordered for score in piece.get("scores") or ()]
    verdicts = [
        str(score.get("score_value")).lower() for score in scores if score.get("score_type") == "true_false"
    ]
    harms = [str(harm) for piece in ordered for harm in piece.get("harm_categories") or ()]
    harms += [str(score.get("score_category") or "") for score in scores]
    target = next((p.get("prompt_target_identifier") or {} for p in ordered if p["role"] == "assistant"), {})
    session = Session(
        annotator=annotator,
        model=str(target.get("model_name") or target.get("__type__") or "unknown"),
        messages=messages,
        technique="multi_turn" if sum(m.role == "user" for m in messages) > 1 else "direct",
        category=_known(_CATEGORIES, " ".join(harms), "other"),
        notes=f"PyRIT conversation {name}",
    )
    if not verdicts:
        return session, []
    outcome = "success" if verdicts[-1] == "true" else "failure"
    reason = str(scores[-1].get("score_rationale") or "")
    return session, [_judged("PyRIT", outcome, reason)]


def _read_promptfoo(content: Any, path: Path, annotator: str) -> Found:
    results = content.get("results") if isinstance(content, dict) else None
    rows = results.get("results") if isinstance(results, dict) else results
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a result of promptfoo: no results.results",
            hint="write one with promptfoo eval --output FILE.json",
        )
    for number, row in enumerate(rows, start=1):
        yield f"result {number}", lambda row=row: _promptfoo_session(row, annotator)  # type: ignore[misc]


def _promptfoo_session(row: JsonObject, annotator: str) -> Made:
    """A test that failed is an attack that worked; one with an error has no verdict."""
    meta = {
        **((row.get("testCase") or {}).get("metadata") or {}),
        **((row.get("response") or {}).get("metadata") or {}),
        **(row.get("metadata") or {}),
    }
    prompt = row.get("prompt") or {}
    raw = prompt.get("raw") if isinstance(prompt, dict) else prompt
    output = (row.get("response") or {}).get("output")
    if not isinstance(raw, str) or output is None:
        raise DataError("has no prompt, or no answer")
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    provider = row.get("provider")
    model = provider.get("label") or provider.get("id") if isinstance(provider, dict) else provider
    session = Session(
        annotator=annotator,
        model=str(model or "unknown"),
        messages=_talk(raw, text, meta),
        technique=_own(TECHNIQUES, meta.get("technique"))
        or _known(_TECHNIQUES, str(meta.get("strategyId") or "basic"), "other"),
        category=_own(CATEGORIES, meta.get("category"))
        or _known(_CATEGORIES, str(meta.get("pluginId") or meta.get("harmCategory") or ""), "other"),
        notes=f"promptfoo {meta.get('pluginId', '')} {meta.get('goal', '')}".strip(),
    )
    if row.get("success") is None or (row.get("failureReason") == 2):  # 2 is promptfoo's "error"
        return session, []
    outcome = "failure" if row["success"] else "success"
    return session, [_judged("promptfoo", outcome, str((row.get("gradingResult") or {}).get("reason") or ""))]


def _talk(raw: str, answer: str, meta: Mapping[str, Any]) -> tuple[Message, ...]:
    """What was asked and answered.

    Strategies that write their own attacks keep them apart from the test's prompt: a whole conversation
    (crescendo, goat), or the attack that the answer is to (jailbreak).
    """
    if isinstance(given := meta.get("messages"), list) and given:
        asked = tuple(Message(str(turn["role"]), turn["content"]) for turn in given)
        if not all(isinstance(turn.content, str) for turn in asked):
            raise DataError("holds something else than text")
        if asked[-1].role == "assistant":
            return asked
    else:
        asked = _turns(raw)
        if isinstance(final := meta.get("redteamFinalPrompt"), str):
            asked = (*(turn for turn in asked if turn.role == "system"), Message("user", final))
    return (*asked, Message("assistant", answer))


def _turns(raw: str) -> tuple[Message, ...]:
    """A prompt of promptfoo is a text, or a conversation as JSON."""
    try:
        turns = json.loads(raw)
    except ValueError:
        return (Message("user", raw),)
    if isinstance(turns, list) and all(isinstance(turn, dict) and "content" in turn for turn in turns):
        return tuple(Message(str(turn.get("role", "user")), str(turn["content"])) for turn in turns)
    return (Message("user", raw),)


def _judged(who: str, outcome: str, reason: str) -> Annotation:
    values = {"outcome": outcome, **({"notes": reason} if reason else {})}
    return Annotation(item="", annotator=who, values=values)


def _own(names: Mapping[str, str], text: object) -> str | None:
    """The name in what our own export writes, ``weapons: how to make them``."""
    name = str(text).partition(":")[0]
    return name if name in names else None


def _known(names: Mapping[str, str], text: str, default: str) -> str:
    lowered = text.lower()
    return next((value for part, value in names.items() if part in lowered), default)


_READERS: Mapping[str, Callable[[Any, Path, str], Found]] = {
    "pyrit": _read_pyrit,
    "promptfoo": _read_promptfoo,
}


def as_pyrit(sessions: Sequence[Reviewed]) -> JsonObject:
    """A seed data set: the user turns of each session are one group, in their order. JSON is YAML."""
    prompts = []
    for number, each in enumerate(sessions):
        turns = [message.content for message in each.session.messages if message.role == "user"]
        for place, text in enumerate(turns):
            prompts.append(
                {
                    "value": text,
                    "data_type": "text",
                    "name": f"{(each.session.id or '')[:8]} {attack_title(each.session)[:60]}",
                    "harm_categories": [each.category],
                    "prompt_group_alias": f"session {number}",
                    "sequence": place,
                    "role": "user",
                    "metadata": {"technique": each.session.technique},
                }
            )
    description = "Attacks recorded by nemotron4 redteam sessions."
    return {"dataset_name": "nemotron4 sessions", "description": description, "seeds": prompts}


def as_promptfoo(sessions: Sequence[Reviewed]) -> JsonObject:
    """A configuration: each attack is a test that passes if the model refuses. Add your providers."""
    tests = []
    for each in sessions:
        asked = [message.to_json() for message in each.session.messages[: _last_user(each.session) + 1]]
        prompt = asked[0]["content"] if len(asked) == 1 else json.dumps(asked, ensure_ascii=False)
        meta = {
            "session": each.session.id,
            "category": f"{each.category}: {CATEGORIES[each.category]}",
            "technique": f"{each.session.technique}: {TECHNIQUES[each.session.technique]}",
        }
        tests.append(
            {
                "description": attack_title(each.session),
                "vars": {"prompt": prompt},
                "assert": [{"type": "is-refusal"}],
                "metadata": meta,
            }
        )
    description = "Attacks recorded by nemotron4 redteam sessions"
    return {"description": description, "prompts": ["{{prompt}}"], "tests": tests}


def _last_user(session: Session) -> int:
    return max(at for at, message in enumerate(session.messages) if message.role == "user")


WRITERS: Mapping[str, Callable[[Sequence[Reviewed]], JsonObject]] = {
    "pyrit": as_pyrit,
    "promptfoo": as_promptfoo,
}
