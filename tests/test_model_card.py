"""The card of a model: the published layout, filled from what is recorded, with a reason where nothing is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.registry import find_task
from nemotron4.evaluation.result import save
from nemotron4.evaluation.scoring import score_files
from nemotron4.model_card import MARK, CardContent, render
from nemotron4.redteam.aegis import AegisResult, tally_all
from nemotron4.redteam.garak_scan import RESULT_FILE, Counts, ProbeResult, ScanResult
from nemotron4.runs import write_json
from tests.tiny_models import nemotron_directory

# The headings of the published card, in its order.
HEADINGS = [
    "Model Overview", "License", "Intended use", "Required Hardware", "Model Architecture", "Prompt Format",
    "Usage", "Evaluation Results", "Adversarial Testing and Red Teaming Efforts", "Limitations",
    "Ethical Considerations",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return nemotron_directory(tmp_path / "tiny")


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """GSM8K on two of three questions."""
    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"id": str(n), "response": f"#### {n}"} for n in range(2)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    source = DataSource(tmp_path, tmp_path / "data.jsonl")
    scored = score_files(
        find_task("gsm8k", tmp_path), source, responses=tmp_path / "answers.jsonl", judgments=None
    )
    save(scored, tmp_path / "runs" / "gsm8k")
    return tmp_path / "runs"


def test_the_card_has_the_published_headings_and_the_numbers(
    model: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(model), "--results", str(result), "--licence", "Apache-2.0"]) == 0
    text = (model / "README.md").read_text("utf-8")
    assert capsys.readouterr().out.strip() == str(model / "README.md")
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == HEADINGS
    assert "- Apache-2.0" in text
    assert "<extra_id_1>User\n{prompt}\n<extra_id_1>Assistant" in text
    assert "#### Multi-Turn" in text
    assert f"nemotron4 serve {model}" in text
    assert re.search(r"\| GSM8K 0-shot *\|\n\|[-: ]+\|\n\| 100.00 \[34.2, 100.0\]", text), text
    assert "`gsm8k`, 3 items; scored " in text
    assert "unscored 1" in text


def test_what_is_missing_is_an_empty_cell_with_its_reason(model: Path, result: Path) -> None:
    assert main(["card", str(model), "--results", str(result)]) == 0
    text = (model / "README.md").read_text("utf-8")
    mmlu = text.split("#### MMLU")[1].split("####")[0]
    assert "- Empty: no result of it is in the folders given." in mmlu
    assert re.search(r"\n\| +\|\s*$", mmlu)
    assert "### License\nEmpty: no --licence was given." in text
    assert "**Garak**: empty: no run was given (--redteam)." in text
    assert "### Model Overview\nEmpty: no record of its training lies here." in text


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    """Three of four attacks worked, one probe crashed."""
    rows = (
        ProbeResult("jailbreaks", "dan.A", "run", "d", {"d": Counts(1, 3, 2)}, num_empty=1),
        ProbeResult("code_generation", "malwaregen.B", "failed", "d", {}, "it crashed"),
    )
    folder = tmp_path / "scan"
    folder.mkdir()
    result = ScanResult("http://127.0.0.1:1/v1", "m", {"generations": 1}, rows, "2026-11-30T10:00:00+00:00")
    write_json(folder / RESULT_FILE, result.to_json())
    return folder


def test_a_scan_has_each_area_and_what_did_not_run(model: Path, scanned: Path) -> None:
    assert main(["card", str(model), "--redteam", str(scanned)]) == 0
    text = (model / "README.md").read_text("utf-8").split("### Adversarial Testing")[1]
    assert "3 of 4 attacks worked" in text
    assert "1 of 2 probes asked for, answers to each prompt: 1; scanned 2026-11-30. An attack" in text
    assert (
        "\n  - jailbreaks: 25.0 % [4.6, 69.9] passed, 1/4, 1 of the answers empty, 2 without a verdict\n"
        in text
    )
    assert "\n  - code generation: no rate (not run)\n" in text


def test_replies_that_could_not_be_read_stand_next_to_the_unsafe_rate(model: Path, tmp_path: Path) -> None:
    result = AegisResult(
        model="m", classifier="c", policy="nemotron4", policy_sha256="0", num_prompts=5, no_answer={},
        no_judgment={}, num_cut=0, prompts_by_category={}, num_blocked=0,
        tallies=tally_all(["safe", "unsafe\nO1", "well", "perhaps", "-"]),
    )  # fmt: skip
    (tmp_path / "aegis").mkdir()
    write_json(tmp_path / "aegis" / "result.json", result.to_json())
    assert main(["card", str(model), "--redteam", str(tmp_path / "aegis")]) == 0
    text = (model / "README.md").read_text("utf-8")
    assert (
        "of the 2 judged answers to 5 prompts are unsafe, by c. 3 of the classifier's replies could" in text
    )


def test_two_scans_are_refused_and_none_is_dropped(
    model: Path, scanned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(model), "--redteam", str(scanned), "--redteam", str(scanned)]) == 1
    assert "two results of Garak are given" in capsys.readouterr().err


def test_a_reason_of_ones_own_is_in_the_empty_section(model: Path) -> None:
    reasons = ["--empty", "AEGIS=no judge here.", "--empty", "mmlu=not run: 2 = 1 + 1 hours"]
    assert main(["card", str(model), *reasons]) == 0
    text = (model / "README.md").read_text("utf-8")
    assert "- **AEGIS**: empty: no judge here.\n" in text
    assert "- **Human Content Red Teaming**: empty: no run was given (--redteam)." in text
    assert "- Empty: not run: 2 = 1 + 1 hours." in text.split("#### MMLU")[1].split("####")[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["AEGIS"], "expected NAME=REASON"),
        (["AEGIS="], "expected NAME=REASON"),
        (["Aegis=no judge"], "known: AEGIS, Garak"),
        (["AEGIS=a", "AEGIS=b"], "names AEGIS twice"),
        (["Garak=no time"], "says why Garak has no result, but one is given"),
        (["gsm8k=no time"], "says why gsm8k has no result, but one is given"),
    ],
)
def test_a_reason_that_cannot_be_used_is_refused(
    model: Path, result: Path, scanned: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for each in given for word in ("--empty", each)]
    assert main(["card", str(model), "--results", str(result), "--redteam", str(scanned), *words]) == 1
    assert said in capsys.readouterr().err
    assert not (model / "README.md").exists()


def test_a_card_of_somebody_else_stays(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "README.md").write_text("# mine\n")
    assert main(["card", str(model)]) == 1
    assert "was written by somebody else" in capsys.readouterr().err
    assert (model / "README.md").read_text() == "# mine\n"
    assert main(["card", str(model), "--out", str(model / "CARD.md")]) == 0
    assert (model / "CARD.md").read_text("utf-8").startswith(MARK)


def test_a_card_in_another_encoding_stays_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "README.md").write_bytes(b"caf\xe9")
    assert main(["card", str(model)]) == 1
    assert "was written by somebody else" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path)]) == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "elsewhere/base", "peft_type": "LORA"}'
    )
    assert main(["card", str(tmp_path), "--licence", "MIT"]) == 0
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "### Usage\nEmpty: the model cannot be opened here (" in text


def test_an_empty_card_says_so_everywhere() -> None:
    text = render(CardContent(name="x"))
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == HEADINGS
    assert text.count("nobody has written it") == len(HEADINGS) - 1 + 3 - 1
