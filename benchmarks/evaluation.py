"""`nemotron4 eval run` beside lm-evaluation-harness: the same GSM8K questions, the same endpoint, no model.

    python -m venv /tmp/env-lmeval && /tmp/env-lmeval/bin/pip install torch 'lm-eval[api]==0.4.13'
    python benchmarks/evaluation.py --data-dir DIR --lm-eval /tmp/env-lmeval/bin/lm_eval

The endpoint is the shipped fake server, so what is measured is the runner. Both are whole commands in
processes of their own, taking turns; each is run with few and with all items. Their difference, divided by
the items between, is the cost of one request; the rest is the start. On a shared machine read processor
seconds. Without ``--lm-eval`` only ours is measured. ``--mmlu`` runs our 14,042 questions, takes 20 answers
away, and resumes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FEW = 100
LM_TASK = """task: gsm8k_same_prompt
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 1536, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@dataclass(frozen=True)
class Cost:
    """Of one command: processor and wall seconds, and the most memory it held."""

    cpu_s: float
    wall_s: float
    peak_mb: float


def run(command: list[str], environment: dict[str, str], log: Path) -> Cost:
    started_s = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=stream, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{log.read_text()[-2000:]}")
    return Cost(used.ru_utime + used.ru_stime, time.monotonic() - started_s, used.ru_maxrss / 1024)


class Runners:
    """The two commands, against one server, with their files in one folder."""

    def __init__(self, folder: Path, url: str, arguments: argparse.Namespace) -> None:
        self._folder, self._url, self._arguments = folder, url, arguments
        self._num_runs = 0
        rows = folder / "gsm8k.jsonl"
        rows.write_bytes(gzip.decompress((arguments.data_dir / "gsm8k/test.jsonl.gz").read_bytes()))
        (folder / "tasks").mkdir()
        (folder / "tasks/gsm8k.yaml").write_text(LM_TASK.format(rows=rows))

    @property
    def has_theirs(self) -> bool:
        return self._arguments.lm_eval is not None

    def _next_log(self) -> Path:
        self._num_runs += 1
        return self._folder / f"{self._num_runs}.log"

    def ours(self, task: str, limit: int | None, out: Path) -> Cost:
        command = [sys.executable, "-m", "nemotron4", "eval", "run", task, "--model", self._url]
        command += ["--out", str(out), "--data-dir", str(self._arguments.data_dir), "--json"]
        command += ["--concurrency", str(self._arguments.concurrency)]
        command += [] if limit is None else ["--limit", str(limit)]
        return run(command, {}, self._next_log())

    def theirs(self, limit: int) -> Cost:
        log = self._next_log()
        model = f"base_url={self._url}/chat/completions,model=fake"
        model += f",num_concurrent={self._arguments.concurrency}"
        command = [str(self._arguments.lm_eval), "run", "--model", "local-chat-completions"]
        command += ["--model_args", model, "--tasks", "gsm8k_same_prompt", "--apply_chat_template"]
        command += ["--include_path", str(self._folder / "tasks"), "--limit", str(limit)]
        command += ["--output_path", str(log.with_suffix("")), "--log_samples"]
        return run(command, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, log)

    def our_gsm8k(self, limit: int) -> Cost:
        return self.ours("gsm8k", limit, self._next_log().with_suffix(""))


def compare(runners: Runners, rounds: int, num_items: int) -> dict[str, object]:
    commands = {"nemotron4": runners.our_gsm8k}
    if runners.has_theirs:
        commands["lm-eval"] = runners.theirs
    costs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, one in commands.items():
            costs[name].append((one(FEW), one(num_items)))
            print(f"round {number + 1}: {name} {costs[name][-1]}", file=sys.stderr)
    report: dict[str, object] = {"items": num_items, "rounds": rounds}
    for name, pairs in costs.items():
        per_request = [1000 * (many.cpu_s - few.cpu_s) / (num_items - FEW) for few, many in pairs]
        report[name] = {
            "cpu_ms_per_request": round(statistics.median(per_request), 2),
            "cpu_s_total": round(statistics.median(many.cpu_s for _, many in pairs), 1),
            "wall_s_total": round(statistics.median(many.wall_s for _, many in pairs), 1),
            "peak_mb_few": round(statistics.median(few.peak_mb for few, _ in pairs)),
            "peak_mb": round(statistics.median(many.peak_mb for _, many in pairs)),
        }
    return report


def mmlu(runners: Runners, folder: Path) -> dict[str, object]:
    out = folder / "mmlu-run"
    whole = runners.ours("mmlu", None, out)
    answers = out / "mmlu/responses.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:-20]))
    again = runners.ours("mmlu", None, out)
    return {"items": len(lines), "whole": asdict(whole), "resume_with_20_left": asdict(again)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of benchmark files")
    parser.add_argument("--lm-eval", type=Path, help="lm_eval of an environment of its own")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--mmlu", action="store_true")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "nemotron4.client.fake_server"]
    server = subprocess.Popen(
        [*command, "--latency-ms", str(arguments.latency_ms)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as name:
            runners = Runners(Path(name), url, arguments)
            report: dict[str, object] = {"concurrency": arguments.concurrency}
            report["latency_ms"] = arguments.latency_ms
            if arguments.rounds:
                report |= compare(runners, arguments.rounds, arguments.items)
            if arguments.mmlu:
                report["mmlu"] = mmlu(runners, Path(name))
        print(json.dumps(report, indent=1))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
