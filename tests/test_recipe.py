"""A recipe of stages: each is run once, with hashes, and what a kill cut short is done again."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nemotron4.cli.main import main
from nemotron4.cli.training_view import TrainingView
from nemotron4.errors import ConfigError
from nemotron4.recipe import hash_of, load_staged
from nemotron4.training.metrics import StepRecord

RECIPE = """
name = "tiny"

[values]
n = 3
seed = ["0", "1"]

[preset.minutes]
n = 2
seed = ["7"]

[[stage]]
name = "data"
commands = [["python", "{recipe}/write.py", "{recipe}/synth.toml", "{folder}/rows", "{n}"]]
makes = ["{folder}/rows"]
minutes = 1

[[stage]]
name = "slow"
commands = [["python", "{recipe}/slow.py", "{data}/rows", "{folder}/copy"]]
makes = ["{folder}/copy"]
minutes = 2

[[stage]]
name = "last"
each = "seed"
skip = ["minutes"]
commands = [["python", "{recipe}/write.py", "{slow}/copy", "{folder}/{seed}"]]
makes = ["{folder}/{seed}"]
"""
# In place of the first stage's script; a start of the command costs a second or more.
GENERATED = """commands = [
    ["nemotron4", "synth", "run", "{recipe}/synth.toml", "--out", "{folder}/run",
     "--set", "stage.0.knobs.n={n}", "--quiet"],
    ["nemotron4", "synth", "export", "{folder}/run"],
    ["python", "{recipe}/write.py", "{folder}/run/export/prompts.jsonl", "{folder}/rows"],
]
"""
SYNTH = """
name = "prompts"
[endpoint.generator]
form = "fake"
[[stage]]
name = "topics"
kind = "macro_topics"
knobs = { n = 2 }
[[stage]]
name = "questions"
kind = "open_questions"
takes = ["topics"]
knobs = { n = 2 }
[export]
prompts = ["questions"]
licence = "cc0-1.0"
"""
WRITE = """
import shutil, sys
shutil.copy(sys.argv[1], sys.argv[2])
"""
# The first time it says who it is, and hangs.
SLOW = """
import os, shutil, sys, time
from pathlib import Path
begun = Path(sys.argv[2] + ".begun")
if not begun.exists():
    begun.write_text(str(os.getpid()))
    time.sleep(600)
shutil.copy(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name, text in {
        "recipe.toml": RECIPE, "synth.toml": SYNTH, "write.py": WRITE, "slow.py": SLOW
    }.items():  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("is_generated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_9_repeats_the_unfinished_stage_and_no_other(
    folder: Path, tmp_path: Path, is_generated: bool
) -> None:
    if is_generated:
        generated(folder)
    out = tmp_path / "out"
    words = ["recipe", "run", str(folder), "--out", str(out)]
    begun = out / "slow" / "copy.begun"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-m", "nemotron4", *words], stdout=log, stderr=log)
    try:
        wait_for(lambda: begun.exists() and begun.read_text() != "", tmp_path / "log")
    finally:
        driver.kill()
        driver.wait()
    process = Path("/proc") / begun.read_text()
    wait_for(lambda: not process.exists(), tmp_path / "log")
    before = json.loads((out / "manifest.json").read_text())
    assert list(before["stages"]) == ["data"]

    assert main(words) == 0
    after = json.loads((out / "manifest.json").read_text())
    assert list(after["stages"]) == ["data", "slow", "last-0", "last-1"]
    assert after["stages"]["data"] == before["stages"]["data"]
    made = out / "last-1" / "1"
    assert after["stages"]["last-1"]["outputs"] == {"{folder}/1": hash_of(made)}
    assert after["stages"]["last-1"]["inputs"] == {
        "{recipe}/write.py": hash_of(folder / "write.py"), "{slow}/copy": hash_of(out / "slow" / "copy")
    }  # fmt: skip
    assert made.read_text() == (out / "data" / "rows").read_text() != ""


def generated(folder: Path) -> None:
    """Have the first stage run a recipe for data."""
    lines = RECIPE.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith("commands"))
    (folder / "recipe.toml").write_text("".join([*lines[:at], GENERATED, *lines[at + 1 :]]))


def finished(folder: Path, out: Path, *more: str) -> list[str]:
    (out / "slow").mkdir(parents=True, exist_ok=True)
    (out / "slow" / "copy.begun").write_text("earlier")
    return ["recipe", "run", str(folder), "--out", str(out), *more]


def test_a_training_stage_shows_its_step_in_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "json")
    view = TrainingView(console=Console(file=(said := io.StringIO())))
    view.show(StepRecord(3, 40, {"loss": 1.5, "seconds": 2.0}))
    (folder / "write.py").write_text(f"import time\nprint({said.getvalue()!r})\ntime.sleep(0.2)\n{WRITE}")
    monkeypatch.setattr("nemotron4.progress.PLAIN_INTERVAL_S", 0.0)
    assert main(finished(folder, tmp_path / "out")) == 0
    assert "stage 1 of 4, data: step 3/40  loss 1.5000" in capsys.readouterr().err


def test_a_preset_changes_values_and_leaves_stages_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = finished(folder, tmp_path / "out", "--preset", "minutes")
    assert main([*words, "--until", "data"]) == 0
    assert main([*words, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(manifest["stages"]) == ["data", "slow"]
    assert manifest["stages"]["data"]["commands"][0][-1] == "2"
    assert main(words[:-2]) == 1
    assert "preset was 'minutes', is None" in capsys.readouterr().err


def test_what_changed_is_named_and_again_repeats_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = finished(folder, tmp_path / "out", "--preset", "minutes")
    assert main(words) == 0
    (folder / "slow.py").write_text(SLOW + "# edited\n")
    assert main(words) == 1
    assert "slow.py of its inputs is missing or changed" in capsys.readouterr().err
    begun = tmp_path / "out" / "slow" / "copy.begun"
    assert main([*words, "--again", "typo"]) == 1
    (folder / "slow.py").write_text(WRITE)
    assert main([*words, "--again", "slow"]) == 0
    assert not begun.exists()
    (tmp_path / "out" / "slow" / "copy").write_text("edited")
    capsys.readouterr()
    assert main(words) == 1
    assert "slow/copy of its outputs is missing or changed" in capsys.readouterr().err


def test_a_failing_command_is_shown_with_what_it_wrote(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "slow.py").write_text("raise SystemExit('no luck')")
    assert main(["recipe", "run", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "stage slow: " in error
    assert "no luck" in error


def test_a_dry_run_refuses_a_wrong_command_line_and_runs_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generated(folder)
    assert main(["recipe", "run", str(folder), "--dry-run", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == ["data", "slow", "last-0", "last-1"]
    assert stages[0]["reads"] == [str(folder / "synth.toml"), str(folder / "write.py")]
    assert main(["recipe", "run", str(folder), "--dry-run", "--until", "slow", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == ["data", "slow"]
    assert main(["recipe", "run", str(folder), "--dry-run", "--again", "slow"]) == 1
    assert "--again removes stages, and --dry-run nothing" in capsys.readouterr().err
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace("--quiet", "--quite"))
    assert main(["recipe", "run", str(folder), "--dry-run", "--out", str(tmp_path / "out")]) == 1
    assert "--quite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{data}/rows", "{dta}/rows", "unknown placeholder of stage slow 'dta'"),
        ('"{slow}/copy"', '"{last-0}/0"', "unknown placeholder of stage last-0 'last-0'"),
        ("[[stage]]", "[[stag]]", "unknown key 'stag'"),
        ('each = "seed"', 'each = "n"', "expected the name of a list"),
        ('each = "seed"\n', "", r"\{seed\} is a list"),
        ('seed = ["7"]', "sed = []", "which values does not have"),
        ('"python", "{recipe}/write.py"', '"bash", "-c"', "neither nemotron4 ... nor python"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(folder: Path, old: str, new: str, message: str) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_staged(folder)


def test_a_stage_like_another_has_its_commands_with_values_of_its_own(folder: Path) -> None:
    own = 'name = "slow"\nvalues = { from = "data", more = "{n}" }\n'
    like = """
[[stage]]
name = "again"
like = "slow"
values = { from = "slow" }
skip = ["minutes"]

"""
    text = RECIPE.replace('name = "slow"\n', own).replace("{data}/rows", "{{from}}/rows").replace(
        "{folder}/copy\"]]", "{folder}/copy\", \"{more}\"]]"
    )  # fmt: skip
    (folder / "recipe.toml").write_text(
        text.replace('[[stage]]\nname = "last"', f'{like}[[stage]]\nname = "last"')
    )
    stages = {stage.name: stage for stage in load_staged(folder).stage}
    assert stages["slow"].commands[0][2:] == ("{data}/rows", "{folder}/copy", "3")
    assert stages["again"].commands[0][2:] == ("{slow}/rows", "{folder}/copy", "3")
    assert (stages["again"].makes, stages["again"].minutes) == (("{folder}/copy",), 2)
    assert "again" not in [stage.name for stage in load_staged(folder, preset="minutes").stage]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ('like = "lst"', "unknown like of stage more 'lst'"),
        ('like = "slow"\nmakes = ["x"]', "stage more has commands or makes, and like"),
        ("", "stage more needs commands, and makes"),
    ],
)
def test_a_stage_has_commands_or_is_like_one_that_has(folder: Path, stage: str, message: str) -> None:
    (folder / "recipe.toml").write_text(f'{RECIPE}\n[[stage]]\nname = "more"\n{stage}\n')
    with pytest.raises(ConfigError, match=message):
        load_staged(folder)


def wait_for(is_true: object, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not is_true():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text("utf-8")
        time.sleep(0.05)


def test_a_recipe_without_stages_or_presets_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.toml").write_text('name = "x"\nstage = []\n')
    assert main(["recipe", "run", str(folder), "--dry-run"]) == 1
    assert "there is no [[stage]]" in capsys.readouterr().err
    (folder / "recipe.toml").write_text(
        RECIPE.split("[preset.minutes]")[0] + RECIPE[RECIPE.index("[[stage]]") :]
    )
    assert main(["recipe", "run", str(folder), "--dry-run", "--preset", "minutes"]) == 1
    assert "the recipe has no presets" in capsys.readouterr().err


def test_a_stage_may_add_to_the_folder_of_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    changed = RECIPE.replace(
        '"{slow}/copy", "{folder}/{seed}"]]', '"{slow}/copy", "{slow}/{seed}", "{slow}"]]'
    )
    (folder / "recipe.toml").write_text(
        changed.replace('makes = ["{folder}/{seed}"]', 'makes = ["{slow}/{seed}"]')
    )
    words = finished(folder, tmp_path / "out")
    assert main(words) == 0
    assert main(words) == 0  # the folder is another one than when the stage began


def test_an_override_of_a_value_that_the_recipe_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown value 'm'"):
        load_staged(folder, ["values.m=5"])
    assert load_staged(folder, ["values.n=5"]).values["n"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [('values.seed=["A"]', "stage last for each seed: name is 'last-A'"), ("values.n=x{n}", "in a circle")],
)
def test_values_that_make_no_commands_are_refused(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_staged(folder, [override])
