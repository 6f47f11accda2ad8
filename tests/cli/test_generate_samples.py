"""``generate``: samples of a row, the best by a reward model, OpenAI's batch rows, all settings."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.batch import as_json
from nemotron4.cli.main import main
from nemotron4.cli.rows import read_request
from nemotron4.client import FakeChatModel
from nemotron4.engine import Reward, SamplingParams
from nemotron4.inference.fake import FakeEngine
from nemotron4.records import FieldError, Message
from nemotron4.text.prompt import nemotron4
from tests import tiny_models
from tests.cli.test_generate import Run, _read, _write
from tests.fake_serving import serving

HI = [{"role": "user", "content": "hi"}]
PARAMS = SamplingParams(max_new_tokens=12, seed=5)


def chat_engine(reply: Any = None) -> FakeEngine:
    return FakeEngine(reply, prompt_format=nemotron4())


def batch_row(name: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    body = {"messages": HI, "max_tokens": 12} | body if url == "/v1/chat/completions" else body
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_samples_of_a_row_differ_from_each_other_and_from_every_other_row(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": "same", "id": n} for n in range(3)] + [{"prompt": "same", "n": 2}]
    answers = Run(tmp_path, rows).start(FakeEngine(), PARAMS, n=3)
    assert [(row.get("id"), row["sample"]) for row in answers] == [
        *((n, i) for n in range(3) for i in range(3)),
        *((None, i) for i in range(2)),
    ]
    assert len({row["text"] for row in answers}) == 11


def test_a_row_with_one_sample_and_a_seed_is_as_before(tmp_path: Path) -> None:
    row = {"prompt": "x", "seed": 3}
    (tmp_path / "one").mkdir()
    [alone] = Run(tmp_path / "one", [row]).start(FakeEngine(), PARAMS)
    several = Run(tmp_path, [row | {"n": 3}]).start(FakeEngine(), PARAMS)
    assert alone["text"] == several[0]["text"]
    assert "sample" not in alone


def test_the_reward_is_next_to_each_sample_and_the_best_one_is_kept(tmp_path: Path) -> None:
    rows: list[object] = [{"messages": HI, "id": "a"}, {"prompt": "raw"}]
    (tmp_path / "all").mkdir()
    *samples, raw = Run(tmp_path / "all", rows).start(chat_engine(), PARAMS, n=4, judge=FakeChatModel())
    assert [row["sample"] for row in samples] == [0, 1, 2, 3]
    assert all(set(row["attributes"]) > {"helpfulness", "verbosity"} for row in samples)
    assert raw["error"] == "only a row with 'messages' can be scored"
    judge, run = FakeChatModel(), Run(tmp_path, rows)
    best, _ = run.start(chat_engine(), PARAMS, n=4, judge=judge, keeps_best=True)
    assert best == max(samples, key=lambda row: row["reward"])


def test_batch_rows_are_answered_in_their_form(tmp_path: Path) -> None:
    rows: list[object] = [
        batch_row("a", n=2, temperature=0),
        batch_row("b", "/v1/completions", prompt="hi", max_tokens=3),
        batch_row("c", "/v1/embeddings", input=["x", "y"]),
        batch_row("d", temperature=-1),
        batch_row("e", "/v1/images"),
        batch_row("f", stream=True),
        batch_row("g", model="other"),
        batch_row("h", response_format={"type": "json_schema", "json_schema": {"schema": {"enum": [7]}}}),
        {**batch_row("i"), "priority": 1},
        {"messages": HI},
    ]
    answers = Run(tmp_path, rows).start(chat_engine("fine words"), PARAMS)
    assert [row.get("custom_id") for row in answers] == [*"abcdefghi", None]
    chat, text, vectors, wrong, unknown, streamed, other, formed, extra, own = answers
    assert [c["message"]["content"] for c in chat["response"]["body"]["choices"]] == ["fine words"] * 2
    assert (chat["response"]["status_code"], chat["error"]) == (200, None)
    assert text["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert len(vectors["response"]["body"]["data"]) == 2
    assert wrong["response"]["status_code"] == 400
    assert "temperature" in wrong["response"]["body"]["error"]["message"]
    assert unknown["error"]["message"].startswith("field 'url' is '/v1/images'; expected one of /v1/comp")
    assert "no stream" in streamed["error"]["message"]
    assert other["response"]["status_code"] == 404
    assert formed["response"]["body"]["choices"][0]["message"]["content"] == "7"
    assert "unknown field 'priority'" in extra["error"]["message"]
    assert own["text"] == "fine words"


def test_batch_rows_follow_the_commands_settings_and_can_be_scored(tmp_path: Path) -> None:
    params = SamplingParams(max_new_tokens=4, seed=5, logprobs=0, stop_token_ids=frozenset({1}))
    body = {"messages": HI, "model": "gpt"}
    rows: list[object] = [{"custom_id": "a", "url": "/v1/chat/completions", "body": body}, batch_row("b")]
    settings: dict[str, Any] = {"n": 3, "served_names": ("gpt",), "judge": FakeChatModel()}
    (tmp_path / "all").mkdir()
    first, second = Run(tmp_path / "all", rows).start(chat_engine(), params, **settings)
    choices = first["response"]["body"]["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert all(len(choice["logprobs"]["content"]) <= 4 for choice in choices)
    assert second["response"]["body"]["usage"]["completion_tokens"] > 12  # its own limit
    best, _ = Run(tmp_path, rows).start(chat_engine(), params, **settings, keeps_best=True)
    assert best["response"]["body"]["choices"] == [max(choices, key=lambda choice: choice["reward"])]


def test_calls_in_an_answer_are_scored_with_it(tmp_path: Path) -> None:
    seen: list[Message] = []

    class Judge(FakeChatModel):
        async def score(self, messages: Sequence[Message]) -> Reward:
            seen.append(messages[-1])
            return await super().score(messages)

    tool = {"type": "function", "function": {"name": "now"}}
    row: list[object] = [batch_row("a", tools=[tool], tool_choice="required", max_tokens=200)]
    call = '<TOOLCALL>[{"name": "now", "arguments": {}}]</TOOLCALL>'
    Run(tmp_path, row).start(chat_engine(call), PARAMS, judge=Judge())
    [answer] = seen
    assert answer.more["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("echo", [False, True])
def test_a_continued_answer_is_scored_as_one_turn(tmp_path: Path, echo: bool) -> None:
    seen: list[Message] = []

    class Judge(FakeChatModel):
        async def score(self, messages: Sequence[Message]) -> Reward:
            seen.extend(messages)
            return await super().score(messages)

    talk = [*HI, {"role": "assistant", "content": "It is "}]
    row: list[object] = [batch_row("a", messages=talk, continue_final_message=True, echo=echo, temperature=0)]
    Run(tmp_path, row).start(chat_engine("noon"), PARAMS, judge=Judge())
    assert seen == [Message("user", "hi"), Message("assistant", "It is noon")]


def test_every_setting_is_a_field_of_a_row() -> None:
    row = {
        "prompt": "x",
        "stop_token_ids": [4],
        "logit_bias": {"7": -1.5},
        "ignore_eos": True,
        "min_p": 0.1,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "choice": ["a", "b"],
    }
    params = read_request(FakeEngine(), row, PARAMS).params
    assert (params.shows_stop, params.shows_special, params.ignore_eos) == (True, True, True)
    assert (params.stop_token_ids, params.logit_bias) == ({4}, {7: -1.5})
    assert params.grammar is not None
    assert json.dumps(as_json(params))
    with pytest.raises(FieldError, match="regex and choice both ask for a form"):
        read_request(FakeEngine(), row | {"regex": "a"}, PARAMS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "meta": 1e999}', "not valid JSON: Out of range"),
        ('{"prompt": "a", "meta": ' + "[" * 400 + "]" * 400 + "}", "nests too deeply; the limit is 200"),
        ('{"prompt": "a", "meta": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"prompt": "a", "n": 0}', "field 'n' is 0; expected 1 or more"),
        ('{"prompt": "a", "n": 1000000000}', "field 'n' is 1000000000; expected 1 to 1024"),
        ('{"prompt": "a", "prompt": "b"}', "not valid JSON: an object has the key 'prompt' twice"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias has 'x=1'"),
        ('{"prompt": "a", "stop_token_ids": ["b"]}', "something else than integers"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}', "not UTF-8"),
    ],
)
def test_no_row_makes_invalid_json(tmp_path: Path, line: str, words: str) -> None:
    _, bad, _ = Run(tmp_path, [{"prompt": "a"}, line, {"prompt": "b"}]).start(FakeEngine("x"))
    assert words in bad["error"], bad


PROGRAM = """
    import sys
    from pathlib import Path
    from nemotron4.cli.answering import Wanted
    from nemotron4.cli.batch import Output, answer_file
    from nemotron4.cli.main import explained
    from nemotron4.client import FakeChatModel
    from nemotron4.engine import Reward, SamplingParams
    from nemotron4.inference.fake import FakeEngine
    from nemotron4.text.prompt import nemotron4

    def run() -> int:
        params = SamplingParams(max_new_tokens=5, seed=3)
        wanted = Wanted(params=params, n=4, judge=FakeChatModel(), keeps_best=True)
        with Output(Path(sys.argv[2]), {"run": 1}) as output:
            engine = FakeEngine(delay_s=0.002, prompt_format=nemotron4())
            answer_file(lambda: engine, Path(sys.argv[1]), output, wanted, max_in_flight=4)
        return 0

    sys.exit(explained(run))
"""


def test_best_of_n_killed_anywhere_gives_the_uninterrupted_file(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"say {n}"}], "id": n} for n in range(60)]
    source = _write(tmp_path / "prompts.jsonl", rows)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"

    def start(path: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source), str(path)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    assert start(whole).wait(60) == 0
    process, partial = start(output), output.with_name(output.name + ".partial")
    while not partial.exists() or partial.read_bytes().count(b"\n") < 15:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert start(output).wait(60) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert all("reward" in row for row in _read(output))


def test_the_command_reads_its_input_and_scores_with_a_served_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.llama_directory(tmp_path / "tiny", chat_template=tiny_models.CHATML)
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in ({"messages": HI}, batch_row("b")))
    output = tmp_path / "out.jsonl"
    with serving() as url:
        for _ in range(2):  # the second finds it complete
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
            command = f"generate {model} - -o {output} -n 2 --best --score {url} --max-new-tokens 6 --json"
            more = "--logit-bias 5=-2 --stop-token-id 9 --no-skip-special-tokens --min-p 0.01"
            assert main([*command.split(), *more.split()]) == 0
    first, second = _read(output)
    assert isinstance(first["reward"], float)
    assert len(second["response"]["body"]["choices"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["rows"], report["failed"]) == (2, 0)
    assert main(["generate", str(model), str(output), "-o", str(tmp_path / "no"), "--best"]) == 1
    assert "--best needs rewards" in capsys.readouterr().err
