"""`nemotron4 eval run` against a scripted server: scores, judges, failures, kill and resume."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main

pytest.importorskip("inspect_ai")
pytestmark = pytest.mark.filterwarnings("default")  # inspect_ai's dependencies warn

Script = Callable[[list[dict[str, str]]], "str | int"]


class ScriptedServer:
    """An OpenAI-compatible endpoint that answers by a function: a text, or an HTTP status to fail with."""

    def __init__(self, script: Script, *, delay_s: float = 0.0) -> None:
        self.requests: list[list[dict[str, str]]] = []
        self.in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "scripted"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.in_flight += 1
                time.sleep(delay_s)
                reply = script(body["messages"])
                with outer.lock:
                    outer.in_flight -= 1
                    if isinstance(reply, str):
                        outer.requests.append(body["messages"])
                if isinstance(reply, int):
                    self._send(reply, {"error": {"message": "scripted failure"}})
                    return
                choice: dict[str, Any] = {
                    "message": {"role": "assistant", "content": reply},
                    "finish_reason": "stop",
                }
                if body.get("logprobs"):
                    top = [{"token": "m", "logprob": -0.2}, {"token": "M", "logprob": -1.7}]
                    choice["logprobs"] = {"content": [{"token": "m", "logprob": -0.2, "top_logprobs": top}]}
                usage = {"prompt_tokens": 5, "completion_tokens": 3}
                self._send(200, {"model": "scripted", "choices": [choice], "usage": usage})

            def _send(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def data(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], str]:
    def write(rows: Sequence[dict[str, Any]]) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


GSM8K = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(8)]


def _say_the_number(messages: list[dict[str, str]]) -> str:
    return "#### " + messages[-1]["content"].split("Say ")[-1].rstrip(".")


def test_a_run_and_its_stored_answers_have_the_same_score(
    data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = data(GSM8K)
    failures = iter([503])
    with ScriptedServer(lambda messages: next(failures, None) or _say_the_number(messages)) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", file, "--out", str(out), "--json"]
        assert main(command) == 0
        captured = capsys.readouterr()
        live = json.loads(captured.out)
        assert "8/8" in captured.err
        assert "1 repeated: " in captured.err
        assert main(command) == 0  # everything is there: the second time asks nothing
        assert len(server.requests) == 8
    capsys.readouterr()
    answers = str(out / "gsm8k/responses.jsonl")
    assert main(["eval", "score", "gsm8k", "--responses", answers, "--data", file, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert live["metrics"] == stored["metrics"] == {"strict": 100, "flexible": 100}
    assert live["model"] == "scripted"
    assert live["usage"]["completion_tokens"] == 24
    assert list((out / "gsm8k/logs").glob("*.eval"))


def test_a_larger_sample_goes_on_and_another_run_is_refused(data: Any, tmp_path: Path, capsys: Any) -> None:
    file, out = data(GSM8K), str(tmp_path / "out")
    with ScriptedServer(_say_the_number) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", file, "--out", out, "--json"]
        assert main([*command, "--limit", "2"]) == 0
        assert main([*command, "--limit", "5"]) == 0
        assert len(server.requests) == 5  # the first two are not asked again
        assert main([*command, "--limit", "5", "--seed", "1"]) == 1
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["denominators"]["strict"] for result in results] == [2, 5]
    assert "seed 0" in captured.err


def test_mt_bench_asks_the_second_turn_after_the_models_own_answer(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    folder = Path(os.environ["NEMOTRON4_SHARED"]) / "data" / "eval"

    def script(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "system":
            return "Rating: [[4]]" if "second" in messages[-1]["content"] else "Rating: [[8]]"
        return f"answer {len(messages)}"

    file = data([{"question_id": 81, "category": "writing", "turns": ["first", "second"]}])
    with ScriptedServer(script) as server:
        command = ["eval", "run", "mt_bench", "--model", server.url, "--judge", server.url, "--json"]
        command += ["--data", file, "--data-dir", str(folder), "--out", str(tmp_path / "out")]
        assert main(command) == 0
        conversation = [m["content"] for m in server.requests[1]]
    assert conversation == ["first", "answer 1", "second"]
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "mt_bench (judge scripted)"
    assert result["metrics"]["total"] == 6
    judgments = str(tmp_path / "out/mt_bench/judgments.jsonl")
    assert main(["eval", "score", "mt_bench", "--judgments", judgments, "--data", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == result["metrics"]


def test_the_alpaca_judge_is_read_from_its_log_probabilities(data: Any, tmp_path: Path, capsys: Any) -> None:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    folder = Path(os.environ["NEMOTRON4_SHARED"]) / "data" / "eval"
    file = data([{"instruction": f"question {n} {{output_1}}", "output": "theirs"} for n in range(6)])
    with ScriptedServer(lambda messages: "ours") as server:
        command = ["eval", "run", "alpaca_eval", "--model", server.url, "--judge", server.url, "--json"]
        command += ["--data", file, "--data-dir", str(folder), "--out", str(tmp_path / "out")]
        assert main(command) == 0
        judged = [m[-1]["content"] for m in server.requests if len(m) == 2]
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "out/alpaca_eval/judgments.jsonl").open()]
    shown_first = {row["id"] for row in rows if row["model_shown"] == "m"}
    assert 0 < len(shown_first) < 6  # the scripted judge prefers m, so the order decides
    share = 1 / (1 + math.exp(-1.5))
    expected = (len(shown_first) * share + (6 - len(shown_first)) * (1 - share)) / 6
    assert result["metrics"]["win_rate"] == pytest.approx(100 * expected)
    assert sum(text.index("ours") < text.index("theirs") for text in judged) == len(shown_first)
    assert all("question" in text and "{output_1}" in text for text in judged)


def test_a_request_that_can_never_succeed_is_unscored_under_its_reason(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    def script(messages: list[dict[str, str]]) -> str | int:
        return 400 if "Say 3" in messages[-1]["content"] else _say_the_number(messages)

    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["denominators"]["strict"] == 7
    assert result["unscored_reasons"] == {"request refused: bad_request": 1}


def test_a_judgment_that_is_refused_is_counted_once_under_its_reason(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    folder = Path(os.environ["NEMOTRON4_SHARED"]) / "data" / "eval"

    def script(messages: list[dict[str, str]]) -> str | int:
        is_judge = messages[0]["role"] == "system"
        if is_judge and "second" in messages[-1]["content"]:
            return 400
        return "Rating: [[8]]" if is_judge else "answer"

    file = data([{"question_id": 81, "category": "writing", "turns": ["first", "second"]}])
    with ScriptedServer(script) as server:
        command = ["eval", "run", "mt_bench", "--model", server.url, "--judge", server.url, "--json"]
        command += ["--data", file, "--data-dir", str(folder), "--out", str(tmp_path / "out")]
        assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["total"] == 8
    assert result["unscored_reasons"] == {"request refused: bad_request": 1}


def _wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the run did not get going"
        time.sleep(0.02)


def test_a_killed_run_goes_on_without_losing_or_repeating_an_answer(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(24)]
    out = tmp_path / "out"
    answers = out / "gsm8k/responses.jsonl"
    with ScriptedServer(_say_the_number, delay_s=0.1) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(rows), "--out", str(out)]
        command += ["--concurrency", "2", "--json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "nemotron4", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        _wait_for(lambda: answers.exists() and answers.read_bytes().count(b"\n") >= 6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait_for(lambda: server.in_flight == 0)  # requests of the dead process count as asked
        kept = answers.read_bytes().count(b"\n")
        with answers.open("ab") as torn:
            torn.write(b'{"id": "23", "resp')
        asked = len(server.requests)
        assert main(command) == 0
        assert asked - kept <= 2  # only what was under way
        assert len(server.requests) - asked == 24 - kept
    result = json.loads(capsys.readouterr().out)
    assert result["numerators"]["strict"] == 24
    ids = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert sorted(ids, key=int) == [str(n) for n in range(24)]


@pytest.fixture(autouse=True)
def _leftovers_of_inspect() -> Iterator[None]:
    """inspect_ai sets up the root logger, and leaves streams to a garbage collection that would warn."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], level = before
    logging.root.setLevel(level)
    gc.collect()
