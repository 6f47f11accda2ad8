"""Scans with a stand-in for garak behind its real command line: counts, crashes, kills, skips, reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour
from nemotron4.client.fake import PERSONAS
from nemotron4.errors import ConfigError
from nemotron4.redteam.garak_areas import AREAS, REPORT_AREAS, ProbeInfo, plan_scan
from nemotron4.redteam.garak_process import Target, configuration, environment_folder, garak_environment
from nemotron4.redteam.garak_scan import Counts, load_scan, read_report
from nemotron4.redteam.settings import ScanSettings
from tests.fake_serving import serving

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_GARAK_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def run(out: Path, url: str, *groups: str) -> int:
    chosen = [word for group in groups for word in ("--probes", group)]
    return main(["redteam", "garak", "--target", url, "--out", str(out), "--max-tokens", "40", *chosen])


def scan(out: Path, persona: str, *groups: str) -> int:
    with serving(FakeBehaviour(script=PERSONAS[persona])) as url:
        return run(out, url, *groups)


def probes_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["probe"]: row for row in json.loads((out / "result.json").read_text())["probes"]}


def test_a_model_that_falls_for_attacks_is_told_from_one_that_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong = tmp_path / "weak", tmp_path / "strong"
    groups = ("dan.DanInTheWild", "prompt_injection", "training_data_replay")
    assert scan(weak, "vulnerable", *groups) == 0
    assert scan(strong, "refusing", *groups) == 0
    for folder, passed in ((weak, 0), (strong, 4)):
        assert load_scan(folder).areas["jailbreaks"] == Counts(passed, 4 - passed, 0)
    capsys.readouterr()
    assert main(["redteam", "compare", str(weak), str(strong), "--json"]) == 0
    areas = {row["name"]: row for row in json.loads(capsys.readouterr().out)["areas"]}
    assert areas["jailbreaks"]["verdict"] == "safer"
    assert areas["jailbreaks"]["p_value"] == pytest.approx(2 / 70)  # 1 of the 70 ways to choose 4 of 8, twice
    report = (weak / "report.md").read_text()
    assert "Content warning" in report
    assert "<details><summary>dan.DanInTheWild" in report
    assert "Not asked for: automatic red teaming, " in report
    assert (weak / "areas.png").stat().st_size > 1000


def test_a_crashing_probe_costs_only_itself_and_is_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(tmp_path, "refusing", "jailbreaks") == 1
    rows = probes_of(tmp_path)
    assert rows["dan.DanInTheWild"]["status"] == "run"
    assert rows["dan.Crashing"]["status"] == "failed"
    assert rows["dan.Crashing"]["detectors"] == {}
    assert "the probe is broken" in rows["dan.Crashing"]["reason"]
    assert "in part: 1 of 2 probes" in capsys.readouterr().out
    assert "the probe is broken" in (tmp_path / "report.html").read_text()


def test_what_needs_a_network_is_skipped_with_the_reason_and_leaves_no_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(tmp_path, "refusing", "automatic_red_teaming", "training_data_replay") == 0
    rows = probes_of(tmp_path)
    assert rows["atkgen.Tox"]["status"] == "skipped"
    assert "run with --online" in rows["atkgen.Tox"]["reason"]
    assert rows["divergence.Repeat"]["status"] == "run"
    assert rows["divergence.RepeatedToken"]["status"] == "skipped"
    lines = {line.strip().split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not run" in lines["automatic red teaming"]
    assert "%" not in lines["automatic red teaming"]
    assert "in part: 1 of 2 probes" in lines["training data replay"]


def test_answers_without_a_verdict_are_in_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "nones")
    assert scan(tmp_path, "refusing", "prompt_injection") == 0
    assert load_scan(tmp_path).areas["prompt_injection"] == Counts(passed=3, fails=0, nones=1)


def test_empty_answers_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(messages: Any, sampling: Any) -> str:
        return "" if messages[0].content.endswith(("1", "2")) else "Sure, sorry."

    with serving(FakeBehaviour(script=script)) as url:
        assert run(tmp_path, url, "prompt_injection", "automatic_red_teaming") == 0
    rows = probes_of(tmp_path)
    assert rows["promptinject.HijackHateHumans"]["num_empty"] == 2
    assert rows["atkgen.Tox"]["num_empty"] is None
    assert "2 of the answers were empty." in capsys.readouterr().out
    (line,) = [row for row in (tmp_path / "report.md").read_text().splitlines() if "| promptinject." in row]
    assert line.endswith("| 2 |")


def test_the_cards_server_is_asked_in_the_cards_template(tmp_path: Path) -> None:
    asked: list[str] = []

    def script(messages: Any, sampling: Any) -> str:
        asked.append(messages[0].content)
        return "I'm sorry."

    with serving(FakeBehaviour(script=script)) as url:
        assert run(tmp_path, f"{url}/generate", "prompt_injection") == 0
    assert asked[0] == (
        "<extra_id_0>System\n\n<extra_id_1>User\n"
        "promptinject.HijackHateHumans asks 0\n<extra_id_1>Assistant\n"
    )
    (report,) = (tmp_path / "processes").glob("*.report.jsonl")
    assert '"outputs": [{"text": "I\'m sorry.\\n<extra_id_1>"}]' in report.read_text()  # without the prompt


def test_a_killed_scan_leaves_no_garak_behind_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def script(messages: Any, sampling: Any) -> str:
        asked.append(messages[-1].content)
        return "I'm sorry."

    out = tmp_path / "scan"
    groups = ["--probes", "prompt_injection", "--probes", "training_data_replay"]
    with serving(FakeBehaviour(script=script)) as url:
        command = ["redteam", "garak", "--target", url, "--out", str(out), *groups]
        process = subprocess.Popen(
            [sys.executable, "-m", "nemotron4", *command],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "STAND_IN": "slow"},
        )
        while not any("divergence" in prompt for prompt in asked):  # the second process is at work
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        num_asked = len(asked)
        time.sleep(1.2)
        assert len(asked) == num_asked < 8  # the garak that was running ended with its parent
        assert not (out / "result.json").exists()
        assert main(command) == 0
    assert sum("promptinject" in prompt for prompt in asked) == 4  # finished before the kill: not asked again
    assert {row["status"] for row in probes_of(out).values()} == {"run", "skipped"}


def test_a_target_that_is_gone_ends_the_scan_and_blames_no_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as url:
        pass
    command = ["redteam", "garak", "--target", url, "--model-name", "x", "--out", str(tmp_path)]
    assert main([*command, "--probes", "prompt_injection"]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_another_scan_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(tmp_path, "refusing", "prompt_injection") == 0
    assert scan(tmp_path, "refusing", "prompt_injection", "dan.DanInTheWild") == 1
    assert "another run: probes was" in capsys.readouterr().err


def test_groups_are_areas_modules_or_probes() -> None:
    known = [
        ProbeInfo("dan.A", True, "d.D"),
        ProbeInfo("dan.B", False, "d.D"),
        ProbeInfo("test.T", False, None),
    ]
    assert [unit.probes for unit in plan_scan(known, [], is_online=False).units] == [("dan.A",)]
    named = plan_scan(known, ["dan.B", "test"], is_online=False).units
    assert [(unit.area, unit.probes) for unit in named] == [
        ("jailbreaks", ("dan.B",)),
        ("others", ("test.T",)),
    ]
    with pytest.raises(ConfigError, match="unknown probe group 'jailbreak'"):
        plan_scan(known, ["jailbreak"], is_online=False)
    assert len(REPORT_AREAS) == 10
    assert set(AREAS) - set(REPORT_AREAS) == {"others"}


def test_no_key_is_written_and_no_other_service_sees_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "theirs")
    target = Target(url="http://127.0.0.1:1/generate", model="m", api_key="secret")
    config = configuration(target, ScanSettings(), tmp_path, "x")
    assert "secret" not in json.dumps(config)
    assert (
        config["plugins"]["generators"]["rest"]["RestGenerator"]["headers"]["Authorization"] == "Bearer $KEY"
    )
    environment = garak_environment(tmp_path, ScanSettings(), "secret")
    assert environment["REST_API_KEY"] == "secret"
    assert "PERSPECTIVE_API_KEY" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_older_reports_and_torn_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.report.jsonl"
    rows = [
        {"entry_type": "eval", "probe": "dan.A", "detector": "d.D", "passed": 3, "total": 5},
        {"entry_type": "probe_summary", "probe": "dan.A"},
        {"entry_type": "eval", "probe": "dan.B", "detector": "d.D", "passed": 1, "total": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"entry_type": "probe_summ')
    found = read_report(path)
    assert found.probes == {"dan.A": {"d.D": Counts(3, 2, 0)}}
    assert found.num_empty == {"dan.A": 0}
    assert not found.is_whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_garak_tells_the_two_personas_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMOTRON4_GARAK_PYTHON")
    monkeypatch.delenv("PYTHONPATH")
    if not (environment_folder() / "installed").exists():
        pytest.skip("garak's environment is not there: `nemotron4 redteam garak` makes it")
    rates = []
    for persona in ("vulnerable", "refusing"):
        folder = tmp_path / persona
        assert scan(folder, persona, "grandma.Substances") == 0
        rates.append(load_scan(folder).areas["jailbreaks"].pass_rate)
    assert rates == [0.0, 1.0]
