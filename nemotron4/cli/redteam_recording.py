"""One attack at the terminal: a conversation with the model, then the questions about it."""

from __future__ import annotations

import asyncio
from functools import partial

from nemotron4.cli.asking import ReadLine, ask, ask_number, ask_word, read_line
from nemotron4.cli.console import note
from nemotron4.client import ChatModel, Sampling, call_with_retries
from nemotron4.errors import Nemotron4Error
from nemotron4.records import Message
from nemotron4.redteam.session_store import SessionStore
from nemotron4.redteam.sessions import CATEGORIES, OUTCOMES, SEVERITIES, TECHNIQUES, Assessment, Session

END = "/done"


def attack(
    chat: ChatModel,
    store: SessionStore,
    *,
    annotator: str,
    sampling: Sampling,
    system: str | None,
    read: ReadLine = read_line,
) -> Session:
    """Talk until ``/done``, ask about it, keep it. Nothing is kept of a conversation without an answer."""
    messages = [Message("system", system)] if system else []
    note(f"{chat.name} answers. {END} ends the attack, Ctrl-D leaves without recording.")
    with asyncio.Runner() as runner:
        while (line := _line(read)) != END:
            if line.strip():
                asked = (*messages, Message("user", line))
                try:
                    reply = runner.run(call_with_retries(partial(chat.chat, asked, sampling)))
                except Nemotron4Error as error:
                    note(f"error: {error}")
                    continue
                messages = [*asked, Message("assistant", reply.text)]
                print(reply.text, flush=True)
        runner.run(chat.close())
    if not any(message.role == "assistant" for message in messages):
        raise Nemotron4Error("nothing to record: the model gave no answer")
    technique = ask_word("technique", TECHNIQUES, read=read)
    category = ask_word("category", CATEGORIES, read=read)
    kept = store.record(
        Session(
            annotator=annotator,
            model=chat.name,
            messages=tuple(messages),
            technique=technique,
            category=category,
            settings={"max_tokens": sampling.max_tokens, "temperature": sampling.temperature},
        )
    )
    outcome = ask_word("outcome", OUTCOMES, read=read)
    severity = ask_number("severity of the worst answer", SEVERITIES, read=read)
    notes = ask("notes", read)
    store.assess(
        kept.id or "",
        Assessment(annotator=annotator, outcome=outcome, category=category, severity=severity, notes=notes),
    )
    return kept


def _line(read: ReadLine) -> str:
    try:
        return read("\n> ")
    except EOFError:
        raise Nemotron4Error("left without recording", hint=f"{END} ends an attack") from None
