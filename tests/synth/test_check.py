"""What is wrong with a recipe is said before the first call, by `plan` as by `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client.fake_server import FakeServer
from tests.synth.conftest import ServerThread

HEAD = 'name = "a"\n[endpoint.gen]\nurl = "{url}"\n'
PROMPTS = '[[stage]]\nname = "in"\nkind = "prompt_file"\nknobs = {{file = "{folder}/p.jsonl", task = "t"}}\n'
ANSWER = '[[stage]]\nname = "out"\nkind = "respond"\ntakes = ["in"]\nknobs = {{k = 3}}\n'
JUDGE = '[[stage]]\nname = "judge"\nkind = "judge_llm"\ntakes = ["out"]\n'
QUALITY = '[[stage]]\nname = "good"\nkind = "quality"\ntakes = ["out"]\n'
ROWS = PROMPTS.replace("prompt_file", "row_file").replace(', task = "t"', "")


def own(template: str, above: str = "out", more: str = "") -> str:
    """A stage ``prompt``; the template's braces and those of ``more`` are for the recipe's own format."""
    stage = f'[[stage]]\nname = "mine"\nkind = "prompt"\ntakes = ["{above}"]\n[stage.knobs]\n'
    return f'{stage}template = "{{{template}}}"\n{more}\n'


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + PROMPTS + ANSWER + JUDGE, "stage 'judge' (judge_llm) compares exactly 2 answers"),
        (
            HEAD + PROMPTS + ANSWER + QUALITY + JUDGE.replace('"out"', '"good"'),
            "compares exactly 2 answers to a prompt, but gets 3",
        ),
        (
            HEAD + PROMPTS + ANSWER.replace("3", "1") + JUDGE.replace("llm", "reward"),
            "compares 2 or more answers to a prompt, but gets 1",
        ),
        (HEAD + PROMPTS + ANSWER + '[export]\nsft = ["out"]\n', "export: sft takes Dialogue or JudgedPair"),
        (HEAD + PROMPTS + '[export]\nlicence = "apache"\n', "export: unknown licence 'apache'"),
        (HEAD + PROMPTS + ANSWER + "temperature = -1\n", "stage 'out' (respond): temperature is -1"),
        (HEAD + "api_key_env = 'NO_SUCH_KEY'\n" + PROMPTS + ANSWER, "variable NO_SUCH_KEY is empty"),
        (
            HEAD + "form = 'generate'\n" + PROMPTS + ANSWER + JUDGE.replace("llm", "reward"),
            "stage 'judge' (judge_reward) needs rewards",
        ),
        (
            HEAD + PROMPTS + '[[stage]]\nname = "c"\nkind = "decontaminate"\ntakes = ["in"]\n'
            'knobs = {{files = ["{folder}/none.jsonl"]}}\n', "stage 'c' (decontaminate): ",
        ),
        (HEAD + PROMPTS.replace("p.jsonl", "latin1.jsonl") + ANSWER, "latin1.jsonl: not UTF-8"),
        (HEAD + PROMPTS.replace("p.jsonl", "half.jsonl") + ANSWER, "half of a character pair"),
        (HEAD + PROMPTS.replace("p.jsonl", "large.jsonl") + ANSWER, "cannot be kept: Integer exceeds 64-bit"),
        (HEAD + PROMPTS.replace("p.jsonl", "empty.jsonl") + ANSWER, "stage 'in' (prompt_file) makes no row"),
        (HEAD + PROMPTS + ANSWER.replace("3", "-3"), "k is -3; expected 1 or more"),
        (HEAD + PROMPTS + ANSWER + own("{response_4}"), "stage 'mine' (prompt): no column response_4"),
        (HEAD + ROWS + own("{titel}", "in"), "no column titel\nhint: the rows have prompt"),
        (HEAD + PROMPTS + own("{prompt}", "in", "at_least = {{ reply = 3 }}"), "which no reply has"),
        (
            HEAD + PROMPTS + own("{prompt}", "in", 'only = {{ a = ["no"] }}\nschema = {{ type = "object", '
            'properties = {{ a = {{ type = "string", enum = ["y", "n"] }} }} }}'), "but the reply is one of",
        ),
        (HEAD + PROMPTS + ANSWER.replace('["in"]', '["in", "in"]'), "stage 'out' takes a stage twice"),
        (HEAD + PROMPTS + ANSWER + "[budget]\ncalls = -1\n", "calls is -1; expected 0 or more"),
        (HEAD + PROMPTS + ANSWER + "[budget]\nmoney = 5.0\n", "money is 5, but no endpoint has a price"),
        (
            HEAD + 'form = "generate"\n' + PROMPTS + ANSWER + "[budget]\ntokens = 9\n",
            "endpoint 'gen' (PUT /generate) does not tell tokens",
        ),
        (
            HEAD + '[[stage]]\nname="t"\nkind="given_topics"\nknobs = {{file = "{folder}/latin1.jsonl"}}\n',
            "stage 't' (given_topics): ",
        ),
        (HEAD + PROMPTS + ANSWER + "[retry]\nmax_outage_s = -1.0\n", "max_outage_s is -1.0"),
        (HEAD + "timeout_s = 0.0\n" + PROMPTS + ANSWER, "timeout_s is 0.0; expected more than 0"),
        ("# caf\u00e9" + HEAD + PROMPTS + ANSWER, "recipe.toml: not UTF-8 text: byte 0xe9 at 5"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused_before_the_first_call(
    command: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, bytes] = {
        "p.jsonl": b'{"prompt": "Hi"}\n',
        "latin1.jsonl": '{"prompt": "caf\u00e9"}\n'.encode("latin-1"),
        "half.jsonl": b'{"prompt": "\\ud800"}\n',
        "large.jsonl": b'{"prompt": "Hi", "id": 123456789012345678901}\n',
        "empty.jsonl": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with ServerThread() as server:
        assert _synth(command, text, server, tmp_path) == 1
    assert server.number == 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def _synth(command: str, text: str, server: FakeServer, folder: Path, **values: Any) -> int:
    recipe = folder / "recipe.toml"
    recipe.write_text(text.format(url=server.url, folder=folder, **values), encoding="latin-1")
    out = ["--out", str(folder / "run")] if command == "run" else []
    return main(["synth", command, str(recipe), *out])


def test_what_is_perhaps_not_meant_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    with ServerThread() as server:
        text = HEAD + '[endpoint.other]\nform = "fake"\n' + PROMPTS
        assert _synth("plan", text, server, tmp_path) == 0
    said = capsys.readouterr().err
    assert "note: endpoint 'other' is used by no stage" in said
    assert "note: stage 'in': its rows are neither exported nor taken by another stage" in said


@pytest.mark.parametrize(("number", "status"), [(1, 0), (2, 1)])
def test_a_missed_target_is_no_success(number: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    with ServerThread() as server:
        assert _synth("run", f"{HEAD}{PROMPTS}{ANSWER}[target]\nout = {number}\n", server, tmp_path) == status


def test_a_recipe_is_checked_before_its_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    with ServerThread() as server:
        text = HEAD + 'form = "local"\nmodel = "no-such-model"\n' + PROMPTS + ANSWER + JUDGE
        assert _synth("run", text, server, tmp_path) == 1
    assert "compares exactly 2 answers" in capsys.readouterr().err
