"""``nemotron4 redteam``: attack a model and keep what came of it."""

from __future__ import annotations

from nemotron4.cli.console import group
from nemotron4.cli.redteam_aegis import aegis
from nemotron4.cli.redteam_garak import compare, garak
from nemotron4.cli.redteam_replay import replay
from nemotron4.cli.redteam_sessions import app as sessions_app

app = group("Attack a model and keep what came of it.")
app.command("garak")(garak)
app.command("compare")(compare)
app.command("aegis")(aegis)
app.command("replay")(replay)
app.add_typer(sessions_app, name="sessions")
