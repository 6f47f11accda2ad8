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
