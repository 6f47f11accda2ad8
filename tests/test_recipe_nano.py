"""The recipe of a model from nothing: what it holds out and measures, and (slow) the whole of it in small."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nemotron4
from nemotron4.cli.main import main

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "nano"
NAMES = ("prepare", "ngram", "measure", "trials", "law")
ORDER = [{"role": "user", "content": "a small latte please"}]
AGENT = [
    {"role": "agent", "text": "Welcome to the Coffee Bar."},
    {"role": "user", "text": "A mocha."},
    {"role": "agent", "api": {"get_menu_items": {"query": "mocha"}}},
    {"role": "api", "response": {"get_menu_items": {"items": [{"name": "Mocha"}]}}},
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
    return {name: __import__(name) for name in NAMES}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The four files in small: this repository's pages are the books, their lines the definitions."""
    folder = tmp_path / "texts"
    folder.mkdir()
    pages = [page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/**/*.md"))]
    lines = [*dict.fromkeys(line for page in pages for line in page.splitlines() if 40 < len(line) < 200)]
    write(folder, "books", [{"id": f"{number}", "text": page} for number, page in enumerate(pages)])
    write(
        folder,
        "wordnet_definitions",
        [
            {"id": f"{at}", "words": ["word"], "pos": "noun", "definition": line, "examples": []}
            for at, line in enumerate(lines)
        ],
    )
    talks, judged = [], []
    for number, line in enumerate(lines[:150]):
        asked = {"role": "user", "content": f"{line[:20]} {number}"}
        talks.append(
            {"id": f"{number}", "messages": [asked, {"role": "assistant", "content": "Is it right?"}]}
        )
        context = [AGENT[0], {"role": "user", "text": asked["content"]}]
        for reward, text in ((1.0, "Yes, gladly."), (0.0, f"No. {number}")):
            said = {"role": "agent", "text": text}
            judged.append({"id": f"{number}", "context": context, "generation": said, "reward": reward})
    write(folder, "dialogues_tm4_coffee", talks)
    write(folder, "reward_tm4_coffee", judged)
    return folder


@pytest.mark.parametrize("preset", [[], ["--preset", "minutes"]], ids=["whole", "minutes"])
def test_every_command_line_is_right(
    preset: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"values.text={tmp_path}"
    assert main(["recipe", "run", str(FOLDER), "--dry-run", "--set", text, *preset]) == 0
    assert "answers-03-rpo" in capsys.readouterr().out


def test_calls_of_an_agent_become_a_conversation(scripts: dict[str, ModuleType]) -> None:
    found = scripts["prepare"].messages(AGENT)
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert found[2]["content"] == "get_menu_items:query:mocha"


def test_nothing_held_out_is_trained_on(
    scripts: dict[str, ModuleType], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(texts), str(out), "--layers", "1"])
    monkeypatch.setattr(scripts["prepare"], "make_tokenizer", lambda out: (out / "tokenizer.model").touch())
    scripts["prepare"].main()
    for name in (
        "books",
        "definitions",
        "sft_dialogues",
        "dialogues",
        "rewards",
        "turns",
        "sft_turns",
        "pairs",
    ):
        trained, held_out = (
            {json.dumps(row) for row in scripts["prepare"].rows_of(out, f"{name}{part}")}
            for part in ("", "_held_out")
        )
        assert trained
        assert held_out
        assert not trained & held_out
    questions = {row["messages"][0]["content"] for row in scripts["prepare"].rows_of(out, "asked")}
    asked_in_training = {
        message["content"]
        for name in ("sft_dialogues", "sft_turns", "rewards")
        for row in scripts["prepare"].rows_of(out, name)
        for message in row["messages"]
    }
    assert questions
    assert not questions & asked_in_training


@pytest.mark.parametrize(
    ("answer", "is_sensible"),
    [
        ("Your latte is on its way", True),
        ("Your mocha is on its way", False),  # not what was ordered
        ("Your latte is on its wazzy", False),  # no word
        ("Yes", False),
    ],
)
def test_a_sensible_answer_has_known_words_and_the_drink(
    scripts: dict[str, ModuleType], answer: str, is_sensible: bool
) -> None:
    known = {"your", "latte", "mocha", "is", "on", "its", "way", "yes"}
    assert scripts["measure"].is_sensible(answer, ORDER, known) is is_sensible


def test_the_fit_finds_a_law(scripts: dict[str, ModuleType]) -> None:
    law = scripts["law"].Law(0.8, 40.0, 0.34, 90.0, 0.28, 0.0)
    rows = [
        {"multiplied": n, "tokens": d, "bits": law.at(n, d)} for n in (2e5, 1e6, 8e6) for d in (1e5, 3e5, 2e6)
    ]
    found = scripts["law"].fit(rows)
    assert (found.alpha, found.beta) == (pytest.approx(0.34), pytest.approx(0.28))
    assert found.at(15e9, 8e12) == pytest.approx(law.at(15e9, 8e12))


def test_trials_that_are_there_are_not_repeated(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = scripts["trials"]
    ran: list[int] = []

    def run(data: Path, config: Any, steps: int, seed: int) -> dict[str, float]:
        ran.append(seed)
        return {"loss": 4.0, "seconds": 1.0}

    monkeypatch.setattr(trials, "run", run)
    monkeypatch.setattr(trials, "nats_to_bits_per_byte", lambda data: 0.5)
    trials.main(tmp_path, tmp_path, ["choice card 0"])
    trials.main(tmp_path, tmp_path, ["choice card"])
    assert ran == [0, 1, 2]
    scripts["law"].main(tmp_path)
    assert "| card | 3 | 2.0000 | 0.0000 |" in (tmp_path / "trials.md").read_text("utf-8")


def test_the_tokenizer_learns_from_the_same_lines_in_every_process(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, given = scripts["prepare"], []
    for name in ("books", "definitions", "dialogues", "turns"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f"{json.dumps({'text': f'{name} {n}'})}\n" for n in range(9))
        )

    def train(**settings: Any) -> None:
        assert not {"input_sentence_size", "shuffle_input_sentence"} & set(settings)
        given.append(list(settings["sentence_iterator"]))

    monkeypatch.setattr(prepare.sentencepiece.SentencePieceTrainer, "train", train)
    monkeypatch.setattr(prepare, "TOKENIZER_LINES", 7)
    prepare.make_tokenizer(tmp_path)
    prepare.make_tokenizer(tmp_path)
    assert len(set(given[0])) == 7
    assert given[0] == given[1]


def test_the_committed_tokenizer_keeps_no_path_of_the_machine_that_learnt_it() -> None:
    model = (FOLDER / "model" / "tokenizer.model").read_bytes()
    assert b"/data" not in model
    assert b"/nano" not in model


def test_the_committed_model_takes_an_order_and_ends() -> None:
    ordered = [{"role": "user", "content": "Can I get a large latte with oat milk please?"}]
    with nemotron4.load(FOLDER / "model", dtype="float32") as engine:
        first = engine.generate(ordered, temperature=0.0)[0]
        said = {"role": "assistant", "content": first.text}
        then = engine.generate([*ordered, said, {"role": "user", "content": "yes"}], temperature=0.0)[0]
    assert "order" in first.text
    assert "soon" in then.text
    assert first.finish_reason == then.finish_reason == "stop"
    assert sum(file.stat().st_size for file in (FOLDER / "model").iterdir()) < 8_000_000


@pytest.mark.slow  # two minutes: ten stages, each some starts of the command
@pytest.mark.timeout(900)
def test_the_recipe_runs_from_end_to_end(texts: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "run", f"values.text={texts}"
    command = ["recipe", "run", str(FOLDER), "--preset", "minutes", "--out", str(out), "--set", text]
    command += ["--set", "preset.minutes.share=1.0"]
    assert main(command) == 0
    formats = json.loads((out / "formats" / "formats.json").read_text("utf-8"))
    assert formats["torch_dist"]["tensors equal"] is True
    assert formats["Hugging Face, transformers"]["greedy tokens equal"] is True
    assert "| RPO |" in (out / "report" / "report.md").read_text("utf-8")
    assert main(command) == 0  # all of it is done
