"""``nemotron4 redteam sessions``: what people tried, what came of it, and what it is good for later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.options import JsonOption

if TYPE_CHECKING:
    from nemotron4.redteam.session_store import SessionStore

app = group("Record, assess, report and export people's red-team sessions.")

DatabaseArgument = Annotated[Path, typer.Argument(metavar="DB", help="The file of sessions (SQLite).")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A session's id, or the beginning of one.")]
AnnotatorOption = Annotated[str, typer.Option(metavar="HANDLE", help="Who you are: any short name.")]


@app.command("list")
def list_sessions(
    database: DatabaseArgument,
    annotator: Annotated[str | None, typer.Option(metavar="HANDLE", help="Recorded by this one.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model.")] = None,
    technique: Annotated[str | None, typer.Option(help="With this technique.")] = None,
    category: Annotated[str | None, typer.Option(help="In this category.")] = None,
    outcome: Annotated[str | None, typer.Option(help="With this outcome by majority.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List sessions, the oldest first: id, time, who, model, technique, category, outcome."""
    with _open(database) as store:
        found = store.sessions(
            annotator=annotator, model=model, technique=technique, category=category, outcome=outcome
        )
    if as_json:
        print_json({"sessions": [each.to_json() for each in found]})
        return
    for each in found:
        session = each.session
        print(
            f"{(session.id or '')[:8]}  {(session.recorded_at or '')[:16]}  {session.annotator:<12}"
            f"{session.model:<20} {session.technique:<17}{each.category:<18}{each.outcome or 'unassessed'}"
        )
    note(f"{len(found)} sessions")


@app.command()
def show(database: DatabaseArgument, session_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one session with all that was said of it. It may hold harmful text."""
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
    for said in found.assessments:
        severity = "-" if said.severity is None else said.severity
        print(f"\n{said.annotator}: {said.outcome}, {said.category}, severity {severity}  {said.notes}")
    for rating in found.ratings:
        values = ", ".join(f"{name} {value}" for name, value in rating.attributes.items())
        print(f"{rating.annotator} on [{rating.answer}]: {values}")
    for better in found.corrections:
        print(f"{better.annotator} would answer [{better.answer}]: {better.text}")


@app.command()
def record(
    database: DatabaseArgument,
    annotator: AnnotatorOption,
    target: Annotated[
        str | None, typer.Option(metavar="URL", help="Chat with the model behind this.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name at its server.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Take sessions from JSON lines, as export writes them."),
    ] = None,
) -> None:
    """Attack a model in the terminal and record it, or take sessions from a file.

    Lines go to the model until /done; then the technique, the outcome and the rest are asked.
    """
    from nemotron4.errors import ConfigError
    from nemotron4.redteam.session_store import SessionStore

    if (target is None) == (source is None):
        raise ConfigError("nothing to record from, or two things", hint="give --target URL or --from FILE")
    with SessionStore(database) as store:
        if source is not None:
            _take(store, source)
            return
        assert target is not None
        from nemotron4.cli.redteam_recording import attack
        from nemotron4.client import Sampling
        from nemotron4.client.remote import connect

        chat = connect(target, model_name)
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        kept = attack(chat, store, annotator=annotator, sampling=sampling, system=system)
        note(f"recorded session {kept.id}")


def _take(store: SessionStore, source: Path) -> None:
    """Every row of the file; one that cannot be used is told and costs only itself."""
    from nemotron4.errors import DataError
    from nemotron4.records import read_json_lines
    from nemotron4.redteam.session_exports import take_row

    num_taken, num_refused = 0, 0
    for number, row in read_json_lines(source):
        try:
            take_row(store, row)
            num_taken += 1
        except DataError as error:
            num_refused += 1
            note(f"{source}:{number}: {error}")
    note(f"took {num_taken} sessions, refused {num_refused}")
    if num_refused:
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
    from nemotron4.redteam.sessions import Assessment

    with _open(database) as store:
        category = category or store.session(session_id).session.category
        store.assess(
            session_id,
            Assessment(
                annotator=annotator, outcome=outcome, category=category, severity=severity, notes=notes
            ),
        )


@app.command()
def export(
    database: DatabaseArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines; .gz and .zst compress.")],
    form: Annotated[
        str,
        typer.Option(help="sessions; preference (bad answer against a better one); reward (rated answers)."),
    ] = "sessions",
    as_json: JsonOption = False,
) -> None:
    """Write sessions, preference pairs or reward-model rows. They hold harmful text."""
    from nemotron4 import records
    from nemotron4.redteam.session_exports import export as export_rows

    with _open(database) as store:
        found = export_rows(store.sessions(), form)
    records.write(out, found.rows)
    if as_json:
        print_json({"form": form, "rows": len(found.rows), "left_out": found.left_out, "file": str(out)})
        return
    reasons = "".join(f"; {number} sessions left out: {reason}" for reason, number in found.left_out.items())
    note(f"wrote {len(found.rows)} rows to {out}{reasons}")


@app.command()
def report(database: DatabaseArgument, as_json: JsonOption = False) -> None:
    """Attacks that worked by category, technique, month and model, and agreement between annotators."""
    from nemotron4.redteam.session_report import report as make_report
    from nemotron4.redteam.session_report import report_blocks
    from nemotron4.report import print_report

    with _open(database) as store:
        result = make_report(store.sessions())
    if as_json:
        print_json(result.to_json())
    else:
        print_report(report_blocks(result))


def _open(database: Path) -> SessionStore:
    from nemotron4.redteam.session_store import SessionStore

    return SessionStore(database, create=False)
