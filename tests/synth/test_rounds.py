"""Rounds of generating and training: each goes on with the model before it, and every step is done once."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4 import config
from nemotron4.cli.child_server import require_free_port
from nemotron4.cli.main import main
from nemotron4.errors import ConfigError, DataError, Nemotron4Error
from nemotron4.recipe import hash_of
from nemotron4.synth.rounds import RoundsRecipe, run_rounds
from tests.tiny_models import nemotron_directory

VALUES: dict[str, Any] = {
    "name": "loop",
    "generator": "first",
    "bases": ["small", "large"],
    "generate": {
        "serve": ["serve", "{generator}", "{port}"],
        "commands": [["write", "{folder}/data", "pairs by {generator}"]],
        "makes": "{folder}/data",
    },
    "train": {
        "commands": [["write", "{folder}/model", "{base} trained on {data}"]],
        "makes": "{folder}/model",
    },
    "evaluate": {
        "commands": [["write", "{folder}/score", "score of {result}"]],
        "makes": "{folder}/score",
    },
}


class Machine:
    """Runs ``write FILE TEXT``; the command whose number is ``fails_at`` fails instead."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.commands: list[list[str]] = []
        self.served: list[list[str]] = []
        self._fails_at = fails_at

    def run(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        if len(self.commands) == self._fails_at:
            return 3
        Path(command[1]).write_text(command[2], "utf-8")
        return 0

    @contextlib.contextmanager
    def serve(self, command: Sequence[str], folder: Path) -> Iterator[None]:
        self.served.append(list(command))
        yield

    def do(self, out: Path, **changes: Any) -> list[dict[str, Any]]:
        recipe = config.build(RoundsRecipe, VALUES | changes)
        return run_rounds(recipe, out, run=self.run, serve=self.serve, report=lambda line: None)


def test_each_round_generates_with_the_model_of_the_round_before(tmp_path: Path) -> None:
    machine = Machine()
    first, second = machine.do(tmp_path)
    model = str(tmp_path / "round-01" / "model")
    assert machine.served == [["serve", "first", "18340"], ["serve", model, "18340"]]
    assert (first["generator"], first["base"]["name"]) == ({"name": "first", "sha256": None}, "small")
    assert second["generator"] == {"name": model, "sha256": hash_of(Path(model))}
    assert (tmp_path / "round-02" / "data").read_text() == f"pairs by {model}"
    assert second["steps"]["train"]["result"]["sha256"] == hash_of(tmp_path / "round-02" / "model")
    assert json.loads((tmp_path / "round-02" / "manifest.json").read_text()) == second


def test_a_failed_step_is_repeated_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"round 2, generate: .* status 3"):
        Machine(fails_at=4).do(tmp_path)
    machine = Machine()
    machine.do(tmp_path)
    assert [Path(command[1]).name for command in machine.commands] == ["data", "model", "score"]
    assert [Path(command[1]).parent.name for command in machine.commands] == ["round-02"] * 3
    again = Machine()
    again.do(tmp_path)
    assert (again.commands, again.served) == ([], [])


def test_other_inputs_and_changed_outputs_are_refused(tmp_path: Path) -> None:
    Machine().do(tmp_path)
    with pytest.raises(ConfigError, match="begun with the generator"):
        Machine().do(tmp_path, generator="other")
    with pytest.raises(ConfigError, match="the step train was done with other commands"):
        Machine().do(tmp_path, train=VALUES["train"] | {"commands": [["write", "{folder}/model", "x"]]})
    (tmp_path / "round-01" / "data").write_text("edited")
    with pytest.raises(DataError, match="missing or changed"):
        Machine().do(tmp_path)


def test_an_unknown_placeholder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown \['modl'\]; known: round, folder"):
        Machine().do(tmp_path, train={"commands": [["write", "{modl}"]], "makes": "x"})


def test_a_folder_is_hashed_by_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("one")
    before = hash_of(tmp_path / "a")
    (tmp_path / "a" / "b" / "file").rename(tmp_path / "a" / "file")
    assert hash_of(tmp_path / "a") != before


def test_the_command_generates_with_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "data")
    (tmp_path / "synth.toml").write_text(
        'name = "r"\n[endpoint.gen]\nform = "fake"\n[[stage]]\nname = "topics"\nkind = "macro_topics"\n'
        "knobs = { n = 2 }\n"
    )
    (tmp_path / "rounds.toml").write_text(
        f"""
name = "r"
generator = "fake"
bases = ["fake"]
generate = {{ commands = [["nemotron4", "synth", "run", "{tmp_path}/synth.toml", "--out", "{data}"]], \
makes = "{data}/recipe.json" }}
train = {{ commands = [["cp", "{{data}}", "{{folder}}/model"]], makes = "{{folder}}/model" }}
"""
    )
    assert main(["synth", "rounds", str(tmp_path / "rounds.toml"), "--out", str(tmp_path), "--json"]) == 0
    (manifest,) = json.loads(capsys.readouterr().out)["rounds"]
    assert manifest["steps"]["train"]["result"]["sha256"] == hash_of(Path(data) / "recipe.json")


KILLED = """
name = "loop"
generator = "{model}"
bases = ["small"]
port = {port}
train = {{ commands = [["true"]], makes = "x" }}

[generate]
serve = ["nemotron4", "serve", "{{generator}}", "--port", "{{port}}"]
commands = [["nemotron4", "serve", "{{generator}}", "--port", "{other}"]]
makes = "x"
"""


@pytest.mark.slow
def test_kill_9_leaves_neither_the_server_nor_the_command_behind(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    model = nemotron_directory(tmp_path / "model")
    (tmp_path / "rounds.toml").write_text(KILLED.format(model=model, port=port, other=other), "utf-8")
    command = ["synth", "rounds", str(tmp_path / "rounds.toml"), "--out", str(tmp_path / "out")]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-m", "nemotron4", *command], stdout=log, stderr=log)
    try:
        assert wait_until(lambda: is_open(port) and is_open(other)), (tmp_path / "log").read_text("utf-8")
    finally:
        driver.kill()
        driver.wait()
    assert wait_until(lambda: not is_open(port) and not is_open(other))
    require_free_port("127.0.0.1", port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(is_true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_taken_port_is_named_with_the_way_to_choose_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Nemotron4Error) as caught:
            require_free_port("127.0.0.1", port, option="--set port=")
    assert f"another port: --set port={port + 1}" in str(caught.value.hint)
