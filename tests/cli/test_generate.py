"""``generate``: every row answered once, in order, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.answering import Wanted
from nemotron4.cli.batch import Output, answer_file
from nemotron4.cli.rows import SEED_RULE, row_seed
from nemotron4.engine import SamplingParams, derive_seed
from nemotron4.errors import DataError, EngineBusyError, Nemotron4Error
from nemotron4.inference.fake import FakeEngine

PARAMS = SamplingParams(max_new_tokens=8, seed=0)


def _write(path: Path, rows: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Run:
    """The output of a list of rows; ``start`` may be called again, as a person would after a failure."""

    def __init__(self, folder: Path, rows: list[object]) -> None:
        self.source = _write(folder / "prompts.jsonl", rows)
        self.output = folder / "answers.jsonl"

    def start(
        self,
        engine: FakeEngine,
        params: SamplingParams = PARAMS,
        *,
        max_in_flight: int = 4,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        with Output(self.output, {"run": 1}) as output:
            wanted = Wanted(params=params, **settings)
            answer_file(lambda: engine, self.source, output, wanted, max_in_flight=max_in_flight)
        return _read(self.output)


def test_answers_stand_in_input_order_with_what_the_rows_carry(tmp_path: Path) -> None:
    rows: list[object] = [
        {"prompt": f"say {n}", "id": f"row-{n}", "meta": {"n": n}, "max_new_tokens": 1 + 7 * (n % 2)}
        for n in range(20)
    ]
    answers = Run(tmp_path, rows).start(FakeEngine(lambda prompt: prompt.removeprefix("say ")), PARAMS)
    assert [row["id"] for row in answers] == [f"row-{n}" for n in range(20)]
    assert [row["meta"]["n"] for row in answers] == list(range(20))
    assert answers[5] == {
        "id": "row-5",
        "meta": {"n": 5},
        "text": "5",
        "token_ids": answers[5]["token_ids"],
        "finish_reason": "stop",
        "num_prompt_tokens": 5,
    }


def test_an_output_on_stdout_is_refused() -> None:
    with pytest.raises(DataError, match="answers go to a file"):
        Output(Path("-"), {})


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    answers = Run(tmp_path, [{"prompt": "a"}, "", "   ", {"prompt": "b"}]).start(FakeEngine("x"))
    assert len(answers) == 2


def test_token_ids_are_a_prompt(tmp_path: Path) -> None:
    engine = FakeEngine.echo()
    ids = engine.tokenizer.encode("abc")
    (answer,) = Run(tmp_path, [{"prompt": ids}]).start(engine)
    assert (answer["text"], answer["num_prompt_tokens"]) == ("abc", 3)


def test_row_settings_override_the_commands(tmp_path: Path) -> None:
    rows: list[object] = [
        {"prompt": "a", "max_new_tokens": 2},
        {"prompt": "a", "stop": ["lo"]},
        {"prompt": "a", "logprobs": True},
        {"prompt": "a"},
    ]
    short, stopped, scored, plain = Run(tmp_path, rows).start(FakeEngine("hello"))
    assert (short["text"], short["finish_reason"]) == ("he", "length")
    assert (stopped["text"], stopped["finish_reason"]) == ("hel", "stop")
    assert len(scored["logprobs"]) == len(scored["token_ids"])
    assert "logprobs" not in plain


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ({}, "one of the fields 'prompt' and 'messages', found 0"),
        ({"prompt": "a", "messages": []}, "found 2"),
        ({"prompt": 5}, "field 'prompt' is 5; expected a string or a list of token ids"),
        ({"prompt": [1, "a"]}, "something else than integers"),
        ({"prompt": [1, True]}, "something else than integers"),
        ({"prompt": [10**9]}, "outside the vocabulary"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "a", "temprature": 0}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"prompt": "a", "temperature": "hot"}, "field 'temperature' is \"hot\""),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "field 'max_new_tokens' is 1.5; expected an integer"),
        ({"prompt": "a", "max_new_tokens": 10**6}, "the context length is"),
        ({"prompt": "a", "stop": [""]}, "non-empty strings"),
        ({"prompt": "\ud800"}, "not UTF-8 text"),
        ({"messages": [{"role": "user"}]}, "a user message needs content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ],
)
def test_bad_row_costs_one_record(tmp_path: Path, row: object, words: str) -> None:
    first, bad, last = Run(tmp_path, [{"prompt": "a"}, row, {"prompt": "b"}]).start(FakeEngine("fine"))
    assert (first["text"], last["text"]) == ("fine", "fine")
    assert bad["line"] == 2
    assert words in bad["error"]


def test_bad_row_keeps_its_id(tmp_path: Path) -> None:
    (bad,) = Run(tmp_path, [{"id": 7, "prompt": 5}]).start(FakeEngine())
    assert bad["id"] == 7


def test_line_that_is_not_utf8_costs_one_record(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"prompt": "a"}])
    run.source.write_bytes(run.source.read_bytes() + b'{"prompt": "\xff"}\n')
    assert "not UTF-8 text" in run.start(FakeEngine("x"))[1]["error"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "meta": ' + "[" * 3000 + "]" * 3000 + "}", "nests too deeply"),
        ('{"prompt": "a", "meta": NaN}', "NaN is no JSON value"),
        ('{"prompt": "a", "temperature": Infinity}', "Infinity is no JSON value"),
        ('{"prompt": "a", "meta": "\\ud800"}', "not UTF-8 text"),
    ],
)
def test_a_row_that_breaks_the_parser_costs_one_record(tmp_path: Path, line: str, words: str) -> None:
    first, bad, last = Run(tmp_path, [{"prompt": "a"}, line, {"prompt": "b"}]).start(FakeEngine("x"))
    assert words in bad["error"]
    assert first["text"] == last["text"] == "x"


def test_equal_prompts_draw_different_answers_and_the_same_ones_again(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": "tell me"}] * 4
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts.append([row["text"] for row in Run(tmp_path / name, rows).start(FakeEngine(), max_in_flight=3)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_rows_are_samples_of_the_runs_seed_and_old_runs_keep_their_rule() -> None:
    assert [row_seed(7, line, SEED_RULE) for line in (1, 2)] == [7, derive_seed(7, 1)]
    assert row_seed(3, 1, 1) == 25233382892082996


def test_full_queue_is_waited_for(tmp_path: Path) -> None:
    engine = FakeEngine("x")
    engine.fail_next(EngineBusyError("full", retry_after_s=0.01))
    (answer,) = Run(tmp_path, [{"prompt": "a"}]).start(engine)
    assert answer["text"] == "x"


def test_no_more_rows_are_in_flight_than_allowed(tmp_path: Path) -> None:
    most = 0

    class Watched(FakeEngine):
        async def stream(self, prompt_ids: Any, params: Any) -> Any:
            nonlocal most
            async for step in super().stream(prompt_ids, params):
                most = max(most, self.stats().num_running)
                yield step

    Run(tmp_path, [{"prompt": "a"}] * 12).start(Watched("hello"), max_in_flight=3)
    assert most == 3


def test_failing_engine_ends_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    run = Run(tmp_path, [{"prompt": f"{n}"} for n in range(6)])
    engine = FakeEngine("x")

    class Dying(FakeEngine):
        async def stream(self, prompt_ids: Any, params: Any) -> Any:
            if self.stats().requests_finished_total == 3:
                self.close()
            async for step in super().stream(prompt_ids, params):
                yield step

    with pytest.raises(Nemotron4Error, match="stopped before the answer was complete"):
        run.start(Dying("x"), max_in_flight=1)
    assert not run.output.exists()
    assert [row["text"] for row in run.start(engine)] == ["x"] * 6
    assert engine.stats().requests_finished_total == 3


def test_nothing_is_loaded_when_nothing_is_left_to_answer(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    with Output(run.output, {"run": 1}) as output:
        answer_file(_never, run.source, output, Wanted(params=PARAMS), max_in_flight=1)
    assert run.output.read_text() == ""


def _never() -> FakeEngine:
    raise AssertionError("the engine was loaded")


PROGRAM = """
    import sys
    from pathlib import Path
    from nemotron4.cli.answering import Wanted
    from nemotron4.cli.batch import Output, answer_file
    from nemotron4.cli.main import explained
    from nemotron4.inference.fake import FakeEngine
    from nemotron4.engine import SamplingParams

    def run() -> int:
        wanted = Wanted(params=SamplingParams(max_new_tokens=5, seed=3))
        with Output(Path(sys.argv[2]), {"run": 1}) as output:
            engine = FakeEngine(delay_s=0.002)
            answer_file(lambda: engine, Path(sys.argv[1]), output, wanted, max_in_flight=8)
        return 0

    sys.exit(explained(run))
"""


def _start(source: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source), str(output)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _wait_for_rows(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    partial = output.with_name(output.name + ".partial")
    deadline = time.monotonic() + 30
    while not partial.exists() or partial.read_bytes().count(b"\n") < count + 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_anywhere_the_same_command_gives_the_uninterrupted_file(
    tmp_path: Path, number: signal.Signals
) -> None:
    source = _write(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}", "id": n} for n in range(150)])
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    process = _start(source, whole)
    process.communicate(timeout=60)
    assert process.returncode == 0
    for rows_before in (20, 70):
        process = _start(source, output)
        _wait_for_rows(output, rows_before, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert "Traceback" not in err
        assert ("the same command continues" in err) == (number != signal.SIGKILL)
    process = _start(source, output)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "continuing: " in err
    assert output.read_bytes() == whole.read_bytes()


OLD = Path(__file__).parents[1] / "golden" / "runs" / "generate"
OLD_RUN = {"model": "fake", "sampling": {"seed": 3}}


def test_a_journal_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    output = tmp_path / "cut.jsonl"
    with Output(output, OLD_RUN) as opened:
        assert opened.log is not None
        assert opened.log.num_torn_bytes == len('{"row": 7, "val')
        kept = len(opened.log)
        engine = FakeEngine()
        answer_file(lambda: engine, OLD / "prompts.jsonl", opened, Wanted(params=PARAMS), max_in_flight=2)
    assert engine.stats().requests_finished_total == 8 - kept
    assert _read(output)[:kept] == _read(OLD / "whole.jsonl")[:kept]
    assert len(_read(output)) == 8
    with Output(tmp_path / "whole.jsonl", OLD_RUN) as opened:
        assert opened.log is None  # complete


def test_a_complete_output_of_another_run_and_a_foreign_file_are_not_overwritten(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    with pytest.raises(DataError, match="of another run: model was 'fake', is 'other'"):
        Output(tmp_path / "whole.jsonl", {**OLD_RUN, "model": "other"})
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(DataError, match="exists already"):
        Output(tmp_path / "mine.jsonl", OLD_RUN)
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


def test_killed_between_the_two_renames_finishes_at_the_next_start(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    partial = output.with_name("answers.jsonl.partial")
    with Output(output, OLD_RUN) as opened:
        assert opened.log is not None
        opened.log.append({"row": 1, "value": {"text": "a"}})
        kept = partial.read_bytes()
        opened.finish()
    assert not partial.exists()
    partial.write_bytes(kept)
    with Output(output, OLD_RUN) as opened:
        opened.finish()
    assert _read(output) == [{"text": "a"}]
    assert json.loads(Path(f"{output}.run.json").read_text()) == {**OLD_RUN, "seed_rule": SEED_RULE}


def test_a_full_disk_is_told_in_words_and_the_same_command_continues(tmp_path: Path) -> None:
    source = _write(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(60)])
    output = tmp_path / "answers.jsonl"
    program = textwrap.dedent(PROGRAM).replace(
        "def run() -> int:",
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "def run() -> int:",
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(source), str(output)], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "error: " in process.stderr
    assert "answers.jsonl.partial: file too large" in process.stderr
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source), str(output)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0
    assert "continuing: " in process.stderr
    assert len(_read(output)) == 60
