"""`nemotron4 eval run` against a scripted server: scores, judges, failures, kill and resume."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import HopelessError
from nemotron4.evaluation.conversation import room_left
from nemotron4.evaluation.registry import find_task
from nemotron4.runs import held

NINE = ["mt_bench", "ifeval", "mmlu", "gsm8k", "humaneval", "mbpp", "arena_hard", "alpaca_eval", "tfeval"]
Script = Callable[..., "str | int | dict[str, Any] | None"]


class ScriptedServer:
    """An OpenAI-compatible endpoint that answers by a function: a text, or an HTTP status to fail with."""

    def __init__(self, script: Script, *, delay_s: float = 0.0, wants_body: bool = False) -> None:
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
                reply = script(body) if wants_body else script(body["messages"])
                with outer.lock:
                    outer.in_flight -= 1
                    if reply is None or isinstance(reply, str):
                        outer.requests.append(body["messages"])
                if isinstance(reply, int):
                    self._send(reply, {"error": {"message": "scripted failure"}})
                    return
                if isinstance(reply, dict):  # an error of the script's own
                    self._send(429 if "insufficient_quota" in str(reply) else 400, reply)
                    return
                choice: dict[str, Any] = {
                    "message": {"role": "assistant", "content": reply},
                    "finish_reason": "length" if len(reply or "") > 1000 else "stop",
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


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        assert "8 of 8 requests" in captured.err
        assert "1 repeated: " in captured.err
        assert main(command) == 0  # everything is there: the second time asks nothing
        assert len(server.requests) == 8
        capsys.readouterr()
        assert main(command[:-1]) == 0
        assert "40 tokens in, 24 tokens out" in capsys.readouterr().out
    answers = str(out / "gsm8k/responses.jsonl")
    assert main(["eval", "score", "gsm8k", "--responses", answers, "--data", file, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert live["metrics"] == stored["metrics"]
    assert live["metrics"] == {"strict": 100, "flexible": 100, "value": 100, "looping": 0}
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
    assert "seed was 0, is 1" in captured.err


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
    result["metrics"].pop("looping")  # of the answers, which are not read here
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
    rows = _rows(tmp_path / "out/alpaca_eval/judgments.jsonl")
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
        assert main([*command, "--out", str(tmp_path / "out"), "--on-failure", "exclude"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["denominators"]["strict"] == 7
    assert result["unscored_reasons"] == {"request refused: bad_request": 1}


def test_after_answers_a_forbidden_request_is_about_its_prompt(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    with ScriptedServer(lambda m: 403 if "Say 3" in m[-1]["content"] else _say_the_number(m)) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        more = ["--concurrency", "1", "--on-failure", "exclude"]
        assert main([*command, "--out", str(tmp_path / "out"), *more]) == 0
    assert json.loads(capsys.readouterr().out)["unscored_reasons"] == {"request refused: unauthorized": 1}


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


CONTEXT = 4096


def _in_context(body: dict[str, Any]) -> str | dict[str, Any]:
    """As vLLM refuses it; the prompt is as many tokens as the question says."""
    prompt = int(body["messages"][-1]["content"].split("Say ")[-1].rstrip("."))
    if prompt + body["max_tokens"] > CONTEXT:
        message = (
            f"This model's maximum context length is {CONTEXT} tokens. However, you requested "
            f"{prompt + body['max_tokens']} tokens ({prompt} in the messages, {body['max_tokens']} in the "
            "completion)."
        )
        return {"error": {"message": message, "code": "context_length_exceeded"}}
    return f"#### {prompt}" if prompt != 4000 else "again " * 300


def test_new_tokens_are_clipped_to_what_the_context_leaves_and_what_does_not_fit_is_named(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in (10, 3000, 4000, 5000)]
    out = tmp_path / "out"
    with ScriptedServer(_in_context, wants_body=True) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(rows), "--out", str(out)]
        assert main([*command, "--on-failure", "exclude", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["numerators"]["strict"] == 2
    assert result["name"] == "gsm8k (cut by the context)"  # one answer would have been longer
    assert result["unscored_reasons"] == {"prompt does not fit the context": 1}
    assert any("left out (prompt does not fit the context): 3" in note for note in result["notes"])
    assert any("2 of 3 requests got fewer new tokens" in note for note in result["notes"])
    answers = {row["id"]: row for row in _rows(out / "gsm8k/responses.jsonl")}
    assert [answers[name].get("clipped_to") for name in "012"] == [None, 1096, 96]
    items = {row["id"]: row for row in _rows(out / "gsm8k/items.jsonl")}
    assert items["2"]["reason"] == "no final number; cut at the limit; looping"
    assert result["metrics"]["looping"] == pytest.approx(100 / 3)


def _small_context(body: dict[str, Any]) -> str | dict[str, Any]:
    """Four characters are a token; verdicts, ratings and letters for judges."""
    prompt = len("".join(message["content"] for message in body["messages"])) // 4
    if prompt + body["max_tokens"] > CONTEXT:
        message = f"This model's maximum context length is {CONTEXT} tokens. Your prompt has {prompt} tokens."
        return {"error": {"message": message, "code": "context_length_exceeded"}}
    return "Rating: [[5]], so the verdict is [[A=B]]"


@pytest.mark.parametrize("task", NINE)
def test_every_benchmark_of_the_card_runs_in_its_context(task: str, tmp_path: Path, capsys: Any) -> None:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    folder = Path(os.environ["NEMOTRON4_SHARED"]) / "data" / "eval"
    command = [
        "eval",
        "run",
        task,
        "--limit",
        "3",
        "--data-dir",
        str(folder),
        "--out",
        str(tmp_path),
        "--json",
    ]
    if task == "tfeval":  # of which a sample is there
        command += ["--data", str(folder / "tfeval_sample" / "topic_following_sample.jsonl.gz")]
    with ScriptedServer(_small_context, wants_body=True) as server:
        assert main([*command, "--model", server.url, "--judge", server.url]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_items"], result["unscored"]) == (3, 0)
    is_clipped = any("got fewer new tokens" in note for note in result["notes"])
    assert is_clipped == (task in ("arena_hard", "alpaca_eval"))


@pytest.mark.parametrize(
    "message",
    [
        "This model's context length is 4096 tokens. The request has 96 prompt tokens and asks for 5000 new",
        "the prompt has 96 tokens and 5000 new ones are asked for: 5096 is above the context length of 4096",
        "'max_tokens' is too large: 5000. This model's maximum context length is 4096 tokens and your request"
        " has 96 input tokens (5000 > 4096 - 96).",
    ],
)
def test_the_room_is_read_from_the_refusals_of_servers(message: str) -> None:
    assert room_left(HopelessError(message, kind="context_length"), 5000) == 4000


def test_without_numbers_half_is_tried_until_one_token_is_left() -> None:
    error = HopelessError("the prompt is too long", kind="context_length")
    assert room_left(error, 1024) == 512
    assert room_left(error, 1) is None
    assert room_left(HopelessError("no such field", kind="bad_request"), 1024) is None


@pytest.mark.parametrize(("policy", "denominator"), [("wrong", 8), ("exclude", 7)])
def test_a_refused_request_is_wrong_or_left_out_as_asked_and_the_choice_may_change(
    data: Any, tmp_path: Path, capsys: Any, policy: str, denominator: int
) -> None:
    def script(messages: list[dict[str, str]]) -> str | int:
        return 400 if "Say 3" in messages[-1]["content"] else _say_the_number(messages)

    out = str(tmp_path / "out")
    with ScriptedServer(script) as server:
        command = [
            "eval",
            "run",
            "gsm8k",
            "--model",
            server.url,
            "--data",
            data(GSM8K),
            "--out",
            out,
            "--json",
        ]
        assert main(command) == 0
        capsys.readouterr()
        assert main([*command, "--on-failure", policy]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["numerators"]["strict"], result["denominators"]["strict"]) == (7, denominator)
    assert any(note.endswith(": 3") for note in result["notes"])


def test_a_refused_request_is_by_default_what_the_benchmarks_own_program_makes_of_it(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    def script(messages: list[dict[str, str]]) -> str | int:
        return 400 if "Say 3" in messages[-1]["content"] else _say_the_number(messages)

    wrong = {"mmlu", "gsm8k", "humaneval", "mt_bench", "arena_hard", "alpaca_eval"}
    assert {name for name in NINE if find_task(name, tmp_path).on_failure == "wrong"} == wrong
    assert {name for name in NINE if find_task(name, tmp_path).on_failure == "stop"} == {"ifeval", "mbpp"}
    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["numerators"]["strict"], result["denominators"]["strict"]) == (7, 8)
    assert "1 requests count as wrong (request refused: bad_request): 3" in result["notes"]


@pytest.mark.parametrize("policy", ["wrong", "exclude"])
@pytest.mark.parametrize("more", [[], ["--limit", "6"], ["--epochs", "2", "--temperature", "0.5"]], ids=str)
def test_failed_empty_and_unreadable_answers_count_alike_in_a_run_and_from_its_files(
    data: Any, tmp_path: Path, capsys: Any, policy: str, more: list[str]
) -> None:
    odd: dict[str, str | int] = {"0": 400, "1": 400, "2": 400, "3": 400, "4": "", "5": "Hm."}

    def script(messages: list[dict[str, str]]) -> str | int:
        right = _say_the_number(messages)
        return odd.get(right.removeprefix("#### "), right)

    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        assert main([*command, "--out", str(tmp_path / "out"), "--on-failure", policy, *more]) == 0
    live = json.loads(capsys.readouterr().out)
    responses = tmp_path / "out" / "gsm8k" / "responses.jsonl"
    command = ["eval", "score", "gsm8k", "--responses", str(responses), "--data", data(GSM8K), "--json"]
    sample = more if "--limit" in more else []
    assert main([*command, "--on-failure", policy, *sample]) == 0
    stored = json.loads(capsys.readouterr().out)
    of_the_run = {"name", "model", "sampling", "usage", "created_at"}
    assert {name for name in live if live[name] != stored[name]} <= of_the_run
    num_failed = live["num_items"] * live["epochs"] - len(_rows(responses))
    assert num_failed > 2
    expected = {} if policy == "wrong" else {"request refused: bad_request": num_failed}
    assert live["unscored_reasons"] == expected
    assert live["reasons"]["no final number"] > 1
    assert main([*command, "--on-failure", "stop", *sample]) == 1
    assert re.search("gsm8k: request [0-3](~2)? failed", capsys.readouterr().err)  # the first that was noted
    failures = responses.with_name("failures.jsonl")
    failures.write_text('{"id": "nine", "kind": "bad_request"}\n')
    assert main(command) == 1
    assert "failures.jsonl:1: id 'nine' is not in the benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "flags"), [(400, ["--on-failure", "stop"]), (401, []), (403, [])])
def test_the_run_stops_where_asked_and_where_the_endpoint_refuses_everybody(
    data: Any, tmp_path: Path, capsys: Any, status: int, flags: list[str]
) -> None:
    out = tmp_path / "out"
    with ScriptedServer(lambda messages: status) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--out", str(out)]
        assert main([*command, *flags]) == 1
    assert "error: gsm8k: request " in capsys.readouterr().err
    assert (out / "gsm8k/failures.jsonl").read_text() == ""  # tomorrow they may succeed


def test_a_used_up_quota_stops_at_once_and_what_is_left_is_asked_when_there_is_some_again(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    is_paid = False

    def script(messages: list[dict[str, str]]) -> str | dict[str, Any]:
        if is_paid or "Say 0" in messages[-1]["content"]:
            return _say_the_number(messages)
        return {"error": {"message": "check your plan", "code": "insufficient_quota"}}

    out = tmp_path / "out"
    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--out", str(out)]
        command += ["--concurrency", "1", "--json"]
        assert main(command) == 1
        assert "7 of 8 requests have no answer yet: " in (error := capsys.readouterr().err)
        assert "check your plan" in error
        assert not (out / "gsm8k/result.json").exists()
        assert (out / "gsm8k/failures.jsonl").read_text() == ""
        num_answered = len(server.requests)
        is_paid = True
        assert main(command) == 0
        assert len(server.requests) == num_answered + 7
    assert json.loads(capsys.readouterr().out)["numerators"]["strict"] == 8


def test_an_answer_without_content_is_an_empty_answer(data: Any, tmp_path: Path, capsys: Any) -> None:
    def script(messages: list[dict[str, str]]) -> str | None:
        return None if "Say 2" in messages[-1]["content"] else _say_the_number(messages)

    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["numerators"]["strict"], result["denominators"]["strict"]) == (7, 8)
    assert result["reasons"]["no answer text"] == 1


def test_a_run_in_which_nothing_was_scored_ends_with_an_error(data: Any, tmp_path: Path, capsys: Any) -> None:
    with ScriptedServer(lambda messages: 400) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K)]
        assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "error: gsm8k: nothing was scored: 8 request refused: bad_request" in capsys.readouterr().err


def test_a_changed_setting_is_in_the_results_name_and_refused_in_another_runs_folder(
    data: Any, tmp_path: Path, capsys: Any
) -> None:
    bodies: list[dict[str, Any]] = []

    def script(body: dict[str, Any]) -> str:
        bodies.append(body)
        return _say_the_number(body["messages"])

    with ScriptedServer(script, wants_body=True) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--json"]
        command += ["--out", str(tmp_path / "out"), "--max-tokens", "99", "--system", "Be short."]
        assert main([*command, "--temperature", "0.5"]) == 0
        assert main([*command, "--temperature", "0.6"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["name"] == "gsm8k (max_tokens 99, temperature 0.5, system 'Be short.')"
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(99, 0.5)}
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be short."}
    assert "temperature was 0.5, is 0.6" in captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-fewshot", "3"], "gsm8k has nothing that can be set; given 'num_fewshot'"),
        (["--set", "x"], "setting 'x' has no '='"),
        (["--epochs", "2"], "gsm8k is greedy: 2 epochs would be equal"),
    ],
)
def test_what_a_task_does_not_allow_is_refused(
    data: Any, tmp_path: Path, capsys: Any, flags: list[str], words: str
) -> None:
    command = ["eval", "run", "gsm8k", "--model", "http://127.0.0.1:1", "--data", data(GSM8K)]
    assert main([*command, "--out", str(tmp_path / "out"), "--model-name", "m", *flags]) == 1
    assert words in capsys.readouterr().err


def test_epochs_give_means_and_pass_at_k(data: Any, tmp_path: Path, capsys: Any) -> None:
    def script(body: dict[str, Any]) -> str:
        number = int(body["messages"][-1]["content"].split("Say ")[-1].rstrip("."))
        return f"#### {number}" if number < (body.get("seed") or 0) + 2 else "#### -1"

    out = tmp_path / "out"
    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(4)]
    file = data(rows)
    with ScriptedServer(script, wants_body=True) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", file, "--out", str(out), "--json"]
        assert main([*command, "--epochs", "3", "--temperature", "0.7"]) == 0
        assert len(server.requests) == 12
    result = json.loads(capsys.readouterr().out)
    # right in 3, 3, 2 and 1 of the 3 epochs
    assert result["metrics"]["strict"] == pytest.approx(75)
    assert result["metrics"]["strict (pass@2)"] == pytest.approx(100 * (1 + 1 + 1 + 2 / 3) / 4)
    assert result["metrics"]["strict (pass@3)"] == pytest.approx(100)
    assert result["epochs"] == 3
    answers = str(out / "gsm8k/responses.jsonl")
    assert main(["eval", "score", "gsm8k", "--responses", answers, "--data", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == result["metrics"]


OLD = Path(__file__).parents[1] / "golden" / "runs" / "eval"


def test_a_run_of_an_earlier_version_is_continued(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(OLD / "run", out)

    def script(messages: list[dict[str, str]]) -> str:
        return _say_the_number(messages)

    with ScriptedServer(script) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--model-name", "fake", "--json"]
        command += ["--on-failure", "exclude"]  # the default of that version
        assert main([*command, "--data", str(OLD / "gsm8k.jsonl"), "--out", str(out)]) == 0
        asked = sorted(m[-1]["content"].split("Say ")[-1] for m in server.requests)
    assert asked == ["6.", "7."]  # five were answered, one was refused for ever, one line was torn
    result = json.loads(capsys.readouterr().out)
    assert result["numerators"]["strict"] == 7
    assert result["unscored_reasons"] == {"request refused: bad_request": 1}


def test_a_full_disk_is_told_in_words_and_the_same_command_continues(data: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from nemotron4.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(24)]
    with ScriptedServer(_say_the_number) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(rows), "--out", str(out)]
        full = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
        assert full.returncode == 1
        assert "responses.jsonl: file too large" in full.stderr
        assert "Traceback" not in full.stderr
        assert main(command) == 0
    ids = [row["id"] for row in _rows(out / "gsm8k/responses.jsonl")]
    assert sorted(ids, key=int) == [str(n) for n in range(24)]


def test_two_processes_do_not_work_on_one_run(data: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with held(out / "gsm8k"), ScriptedServer(_say_the_number) as server:
        command = ["eval", "run", "gsm8k", "--model", server.url, "--data", data(GSM8K), "--out", str(out)]
        assert main(command) == 1
    assert "is in use" in capsys.readouterr().err


def _wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the run did not get going"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_without_losing_or_repeating_an_answer(
    data: Any, tmp_path: Path, capsys: Any, number: signal.Signals
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
        process.send_signal(number)
        assert process.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
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
