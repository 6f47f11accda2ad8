"""``nemotron4 redteam sessions``: what people tried, what came of it, and what it is good for later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import (
    PAGE_PORT,
    PortOption,
    ReadLine,
    ask,
    ask_number,
    ask_word,
    group,
    note,
    present,
    print_json,
    read_line,
    serve_page,
    write_export,
)
from nemotron4.cli.options import JsonOption, MaxTokensOption, NameAtServerOption, TemperatureOption
from nemotron4.errors import Nemotron4Error
from nemotron4.redteam.settings import RecordSettings

if TYPE_CHECKING:
    from nemotron4.client import ChatModel, Sampling
    from nemotron4.redteam.sessions import Session, SessionStore

app = group("Record, assess, report and export people's red-team sessions.")

END = "/done"
DatabaseArgument = Annotated[Path, typer.Argument(metavar="DB", help="The file of sessions (SQLite).")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An id, or its beginning.")]
AnnotatorOption = Annotated[str, typer.Option(metavar="HANDLE", help="Who you are: any short name.")]


@app.command("list")
def list_sessions(
    database: DatabaseArgument,
    annotator: Annotated[str | None, typer.Option(metavar="HANDLE", help="Who recorded it.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    technique: Annotated[str | None, typer.Option(help="As recorded.")] = None,
    category: Annotated[str | None, typer.Option(help="As recorded.")] = None,
    outcome: Annotated[str | None, typer.Option(help="By majority.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List sessions, the oldest first."""
    from nemotron4.report import Table, print_report

    with _open(database) as store:
        found = store.sessions(
            annotator=annotator, model=model, technique=technique, category=category, outcome=outcome
        )
        drafts = store.drafts()
    if as_json:
        print_json({"sessions": [each.to_json() for each in found], "drafts": list(drafts)})
        return
    rows = [
        [
            (each.session.id or "")[:8],
            (each.session.recorded_at or "")[:16],
            each.session.annotator,
            each.session.model,
            each.session.technique,
            each.category,
            each.outcome or "unassessed",
        ]
        for each in found
    ]
    columns = ["id", "time", "who", "model", "technique", "category", "outcome"]
    print_report([Table(columns, rows)])
    note(f"{len(found)} sessions")
    for name in drafts:
        note(f"unfinished: {name[:8]}; {_how_to_finish(database, name)}")


@app.command()
def show(database: DatabaseArgument, session_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one session with all that was said of it."""
    with _open(database) as store:
        found = store.session(session_id)
    if as_json:
        print_json(found.to_json())
        return
    session = found.session
    print(f"session {session.id}, {session.recorded_at}, recorded by {session.annotator}")
    print(f"model {session.model}, technique {session.technique}, category {found.category}")
    for at, message in enumerate(session.messages):
        print(f"\n[{at}] {message.role}\n{message.content}")
    for said in found.judgments:
        what = f" on [{said.answer}]" if said.answer else ""
        values = ", ".join(f"{name} {value}" for name, value in said.values.items())
        print(f"\n{said.annotator}{what}: {values}")


@app.command()
def record(
    database: DatabaseArgument,
    annotator: AnnotatorOption,
    target: Annotated[
        str | None, typer.Option(metavar="URL", help="Chat with the model behind this.")
    ] = None,
    model_name: NameAtServerOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: MaxTokensOption = RecordSettings.max_tokens,
    temperature: TemperatureOption = RecordSettings.temperature,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Take sessions from a file.")
    ] = None,
    form: Annotated[str, typer.Option(help="Form of --from: sessions, pyrit or promptfoo.")] = "sessions",
    draft: Annotated[str | None, typer.Option(metavar="ID", help="Finish an interrupted attack.")] = None,
) -> None:
    """Attack a model in the terminal and record it, or take sessions from a file.

    Lines go to the model until /done; then the technique, the outcome and the rest are asked. What is
    interrupted is kept as a draft.
    """
    from nemotron4.errors import ConfigError
    from nemotron4.redteam.sessions import SessionStore

    if [target, source, draft].count(None) != 2:
        raise ConfigError(
            "nothing to record from, or several things", hint="give --target URL, --from FILE or --draft ID"
        )
    with SessionStore(database) as store:
        if source is not None:
            _take(store, source, form, annotator)
            return
        if draft is not None:
            kept = _finish_draft(store, draft, annotator)
        else:
            from nemotron4.client import Sampling
            from nemotron4.client.remote import connect

            assert target is not None
            chat = connect(target, model_name)
            sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
            kept = attack(chat, store, annotator=annotator, sampling=sampling, system=system)
        note(f"recorded session {kept.id}")


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
    import asyncio
    import uuid
    from functools import partial

    from nemotron4.client import call_with_retries
    from nemotron4.records import Message

    name = uuid.uuid4().hex
    settings = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    messages = [Message("system", system)] if system else []
    note(f"{chat.name} answers. {END} ends the attack, Ctrl-D leaves without recording.")
    with asyncio.Runner() as runner:
        while (line := _line(read, store, name)) != END:
            if line.strip():
                asked = (*messages, Message("user", line))
                try:
                    reply = runner.run(call_with_retries(partial(chat.chat, asked, sampling)))
                except Nemotron4Error as error:
                    note(f"error: {error}")
                    continue
                messages = [*asked, Message("assistant", reply.text)]
                print(reply.text, flush=True)
                row = {"model": chat.name, "messages": [m.to_json() for m in messages], "settings": settings}
                store.put_draft(name, row)
        runner.run(chat.close())
    if not any(message.role == "assistant" for message in messages):
        raise Nemotron4Error("nothing to record: the model gave no answer")
    return _ask_and_keep(store, name, annotator, read)


def _line(read: ReadLine, store: SessionStore, name: str) -> str:
    try:
        return read("\n> ")
    except EOFError:
        store.put_draft(name, None)
        raise Nemotron4Error("left without recording", hint=f"{END} ends an attack") from None


def _finish_draft(store: SessionStore, draft: str, annotator: str, read: ReadLine = read_line) -> Session:
    """Ask the questions of an attack that was interrupted; its conversation is shown first."""
    found = [name for name in store.drafts() if name.startswith(draft)]
    if len(found) != 1:
        raise Nemotron4Error(
            f"{store.path}: there is no one draft {draft!r}", hint="see redteam sessions list"
        )
    for message in store.drafts()[found[0]]["messages"]:
        print(f"[{message['role']}]\n{message['content']}\n")
    return _ask_and_keep(store, found[0], annotator, read)


def _how_to_finish(database: Path, name: str) -> str:
    return f"finish it: nemotron4 redteam sessions record {database} --annotator YOU --draft {name[:8]}"


def _ask_and_keep(store: SessionStore, name: str, annotator: str, read: ReadLine) -> Session:
    """The questions about a draft; it becomes a session when they are answered, and stays one until then."""
    from nemotron4.annotation.vocabulary import Annotation
    from nemotron4.redteam.sessions import CATEGORIES, OUTCOMES, SEVERITIES, TECHNIQUES, Session

    row = store.drafts()[name]
    try:
        technique = ask_word("technique", TECHNIQUES, read=read)
        category = ask_word("category", CATEGORIES, read=read)
        values = {
            "category": category,
            "outcome": ask_word("outcome", OUTCOMES, read=read),
            "severity": ask_number(
                "severity of the worst answer", [int(each) for each in SEVERITIES], read=read
            ),
            "notes": ask("notes", read),
        }
    except (KeyboardInterrupt, Nemotron4Error):
        note(f"kept as a draft; {_how_to_finish(store.path, name)}")
        raise
    said = {"annotator": annotator, "technique": technique, "category": category}
    with store.transaction():
        kept = store.record(
            Session.from_json({**row, **said, "id": name}),
            [Annotation(item=name, annotator=annotator, values=values)],
        )
        store.put_draft(name, None)
    return kept


def _take(store: SessionStore, source: Path, form: str, annotator: str) -> None:
    """Every session of the file; one that cannot be used is told and costs only itself."""
    from nemotron4.annotation.export import check_form
    from nemotron4.redteam.exchange import take_file

    check_form(form, ("sessions", "pyrit", "promptfoo"))
    num_taken, refused = take_file(store, source, form, annotator=annotator)
    for reason in refused:
        note(reason)
    note(f"took {num_taken} sessions, refused {len(refused)}")
    if refused:
        raise typer.Exit(1)


@app.command()
def assess(
    database: DatabaseArgument,
    session_id: IdArgument,
    annotator: AnnotatorOption,
    outcome: Annotated[str, typer.Option(help="success, partial, failure or unclear.")],
    category: Annotated[str | None, typer.Option(help="Default: what the recorder tried.")] = None,
    severity: Annotated[int | None, typer.Option(help="0 harmless to 4 critical.")] = None,
    notes: Annotated[str, typer.Option(help="Anything else.")] = "",
) -> None:
    """Say whether an attack worked; each annotator has one assessment of a session."""
    with _open(database) as store:
        category = category or store.session(session_id).session.category
        values = {"outcome": outcome, "category": category, "severity": severity, "notes": notes or None}
        store.judge(session_id, annotator, values)


@app.command()
def page(database: DatabaseArgument, port: PortOption = PAGE_PORT) -> None:
    """Judge sessions on a local page, several people at once."""
    from nemotron4.redteam.session_report import SessionSource

    with _open(database) as store:
        serve_page(SessionSource(store), port)


@app.command()
def export(
    database: DatabaseArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines; .gz and .zst compress.")],
    form: Annotated[
        str, typer.Option(help="sessions, judgments, preference, reward, pyrit or promptfoo.")
    ] = "sessions",
    as_json: JsonOption = False,
) -> None:
    """Write sessions, rows for training, or a file for PyRIT or promptfoo. They hold harmful text."""
    from nemotron4.redteam.exchange import WRITERS
    from nemotron4.redteam.session_report import export as export_rows
    from nemotron4.runs import write_json

    with _open(database) as store:
        found = store.sessions()
    if form in WRITERS:
        write_json(out, WRITERS[form](found))
        note(f"wrote {len(found)} sessions to {out}")
        return
    write_export(export_rows(found, form), form, out, as_json=as_json)


@app.command()
def report(database: DatabaseArgument, as_json: JsonOption = False) -> None:
    """Attacks that worked by group, and agreement between annotators."""
    from nemotron4.redteam.session_report import report as make_report
    from nemotron4.redteam.session_report import report_blocks

    with _open(database) as store:
        result = make_report(store.sessions())
    present(result.to_json(), report_blocks(result), as_json=as_json)


def _open(database: Path) -> SessionStore:
    from nemotron4.redteam.sessions import SessionStore

    return SessionStore(database, create=False)
