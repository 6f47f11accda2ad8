"""MMLU by log-probability: `nemotron4 eval run mmlu_5shot` beside lm-evaluation-harness with transformers.

    python -m venv /tmp/env-lmeval && /tmp/env-lmeval/bin/pip install torch 'lm-eval[hf]==0.4.13'
    nemotron4 convert smollm2 /tmp/model --to hf --dtype fp32
    python benchmarks/mmlu.py /tmp/model --data-dir DIR --lm-eval /tmp/env-lmeval/bin/lm_eval

Both are whole commands in processes of their own that take turns. They read the same model and the same
questions (the first of some subjects, each behind its five examples) and ask for the same texts. In the first
round each is also run with one question: that is the start, and ratios are told with and without it. At the
end the texts, the log-probabilities of the four choices (of the first of ``--theirs``) and the right answers
are compared. Without ``--lm-eval`` only ours is measured. Where other programs run, ``taskset -c 0`` in front
gives both one processor; read processor seconds then. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.registry import find_task
from nemotron4.evaluation.tasks import mmlu
from nemotron4.evaluation.tasks.numbers import MMLU_DEV

LM_TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{subject}.test.jsonl, dev: {folder}/{subject}.dev.jsonl}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {about}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\n\\
  C. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
Weights = dict[str, list[float]]  # question -> log-probabilities of A to D


class Files:
    """The chosen questions, for ours as one file and for theirs as one task of each subject."""

    def __init__(self, folder: Path, data_dir: Path, subjects: Sequence[str], num_questions: int) -> None:
        self.folder, self.subjects = folder, subjects
        source = DataSource(data_dir)
        rows: dict[str, dict[str, list[str]]] = {}
        for split, file in (("test", mmlu.FILE), ("dev", MMLU_DEV)):
            rows[split] = defaultdict(list)
            for _, row in source.read(file).json_lines():
                rows[split][row["subject"]].append(json.dumps(row) + "\n")
        self.chosen = [line for name in subjects for line in rows["test"][name][:num_questions]]
        self.ours, self.one = folder / "ours.jsonl", folder / "one.jsonl"
        self.ours.write_text("".join(self.chosen))
        self.one.write_text(self.chosen[0])
        for name in subjects:
            (folder / f"{name}.test.jsonl").write_text("".join(rows["test"][name][:num_questions]))
            (folder / f"{name}.dev.jsonl").write_text("".join(rows["dev"][name]))
            values = {"task": f"local_{name}", "folder": folder, "subject": name}
            text = LM_TASK.format(about=name.replace("_", " "), **values)
            (folder / f"{name}.yaml").write_text(text)


class Cost(NamedTuple):
    """Of one command."""

    wall_s: float
    processor_s: float


def run(command: list[str], log: Path) -> Cost:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["HF_HOME"] = str(log.parent / "hub")
    started_s = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{log.read_text()[-2000:]}")
    return Cost(time.monotonic() - started_s, used.ru_utime + used.ru_stime)


def ours(files: Files, options: argparse.Namespace, out: Path, *, is_one: bool) -> Cost:
    command = [sys.executable, "-m", "nemotron4", "eval", "run", "mmlu_5shot", "--model", str(options.model)]
    command += ["--data", str(files.one if is_one else files.ours), "--data-dir", str(options.data_dir)]
    command += ["--out", str(out), "--json", *options.ours]
    return run(command, out.with_suffix(".log"))


def theirs(files: Files, options: argparse.Namespace, setting: str, out: Path, *, is_one: bool) -> Cost:
    """``setting``: type of numbers, batch size."""
    dtype, batch_size = setting.split(",")
    subjects = files.subjects[:1] if is_one else files.subjects
    command = [str(options.lm_eval), "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={options.model},dtype={dtype}", "--device", "cpu"]
    command += ["--batch_size", batch_size, "--include_path", str(files.folder)]
    command += ["--tasks", ",".join(f"local_{name}" for name in subjects), "--log_samples"]
    command += ["--output_path", str(out), *(["--limit", "1"] if is_one else [])]
    return run(command, out.with_suffix(".log"))


def our_weights(out: Path) -> Weights:
    lines = (out / "mmlu_5shot" / "responses.jsonl").read_text().splitlines()
    return {row["id"]: json.loads(row["response"]) for row in map(json.loads, lines)}


def their_weights(out: Path, files: Files) -> tuple[Weights, dict[str, list[str]]]:
    """Log-probabilities, and the texts: prompt and continuation of each choice."""
    weights: Weights = {}
    texts: dict[str, list[str]] = {}
    for subject in files.subjects:
        [file] = out.glob(f"*/samples_local_{subject}_*.jsonl")
        for row in map(json.loads, file.read_text().splitlines()):
            name = f"{subject}/{row['doc']['index']}"
            weights[name] = [float(pair[0]) for pair in row["filtered_resps"]]
            asked = row["arguments"]
            asked = [asked[key] for key in sorted(asked)] if isinstance(asked, dict) else asked
            asked = [[each["arg_0"], each["arg_1"]] if isinstance(each, dict) else each for each in asked]
            texts[name] = [prompt + continuation for prompt, continuation in asked]
    return weights, texts


def compare(files: Files, options: argparse.Namespace, mine: Path, their: Path) -> dict[str, Any]:
    weights, (others, texts) = our_weights(mine), their_weights(their, files)
    if len(weights) != len(files.chosen) or weights.keys() != others.keys():
        raise SystemExit(f"{len(weights)} of ours, {len(others)} of theirs, {len(files.chosen)} questions")
    right: list[tuple[bool, bool]] = []
    for item in find_task("mmlu_5shot", None).load(DataSource(options.data_dir, files.ours)):
        if [prompt + choice for prompt, choice in item.fields["choices"]] != texts[item.id]:
            raise SystemExit(f"{item.id}: other texts:\n{item.fields['choices'][0]}\n{texts[item.id][0]}")
        best = (max(range(4), key=of[item.id].__getitem__) for of in (weights, others))
        right.append(tuple(each == item.fields["right"] for each in best))  # type: ignore[arg-type]
    differences = [abs(a - b) for name in weights for a, b in zip(weights[name], others[name], strict=True)]
    return {
        "equal_texts": len(texts),
        "largest_difference_nats": max(differences),
        "right": {"ours": sum(a for a, _ in right), "theirs": sum(b for _, b in right)},
    }


def report(starts: dict[str, Cost], times: dict[str, list[Cost]], num_questions: int) -> dict[str, Any]:
    """Seconds with one question and with all, wall and processor; ratios are of each round to ours."""
    found: dict[str, Any] = {}
    for name, costs in times.items():
        found[name] = {}
        for kind in Cost._fields:
            one, mine = getattr(starts[name], kind), getattr(starts["ours"], kind)
            seconds = [getattr(cost, kind) for cost in costs]
            our_seconds = [getattr(cost, kind) for cost in times["ours"]]
            pairs = list(zip(seconds, our_seconds, strict=True))
            found[name][kind] = {
                "one_question": round(one, 1),
                "all": [round(each, 1) for each in seconds],
                "questions_per_s": round(num_questions / statistics.median(seconds), 2),
                "ratio": [round(a / b, 2) for a, b in pairs],
                "ratio_without_start": [round((a - one) / (b - mine), 2) for a, b in pairs],
            }
    return found


def versions(options: argparse.Namespace) -> dict[str, str]:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    found = {"nemotron4": importlib.metadata.version("nemotron4")}
    if options.lm_eval is not None:
        script = "from importlib.metadata import version as v; "
        script += "print(*(f'{n} {v(n)}' for n in ('lm_eval', 'transformers', 'torch')), sep=', ')"
        python = str(options.lm_eval.parent / "python")
        found["theirs"] = subprocess.check_output([python, "-c", script], text=True).strip()
    return found | {"processor": f"{len(names) or os.cpu_count()} x {(names or [platform.processor()])[0]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with a Hugging Face checkpoint")
    data = os.environ.get("NEMOTRON4_EVAL_DATA")
    parser.add_argument("--data-dir", type=Path, default=data, required=data is None)
    parser.add_argument("--lm-eval", type=Path, help="lm_eval of an environment of its own")
    parser.add_argument("--theirs", nargs="+", default=["float32,1", "bfloat16,1"])
    parser.add_argument("--ours", nargs="*", default=[], help="more options of eval run")
    parser.add_argument("--subjects", type=int, default=6, help="evenly drawn from the 57")
    parser.add_argument("--questions", type=int, default=25, help="of each subject")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    step = len(mmlu.SUBJECTS) / options.subjects
    subjects = [mmlu.SUBJECTS[int(step * number)] for number in range(options.subjects)]
    with tempfile.TemporaryDirectory() as name:
        files = Files(Path(name), options.data_dir, subjects, options.questions)
        settings = ["ours"] + (options.theirs if options.lm_eval is not None else [])
        starts: dict[str, Cost] = {}
        times: dict[str, list[Cost]] = {setting: [] for setting in settings}
        for number in range(options.rounds):
            for setting in settings:
                for is_one in (True, False) if number == 0 else (False,):
                    out = files.folder / f"{setting}-{number}-{'one' if is_one else 'all'}"
                    if setting == "ours":
                        cost = ours(files, options, out, is_one=is_one)
                    else:
                        cost = theirs(files, options, setting, out, is_one=is_one)
                    if is_one:
                        starts[setting] = cost
                    else:
                        times[setting].append(cost)
                    print(f"{setting}, {'one question' if is_one else 'all'}: {cost}", file=sys.stderr)
        found: dict[str, Any] = {"model": options.model.name, "questions": len(files.chosen)}
        found |= versions(options) | report(starts, times, len(files.chosen))
        if options.lm_eval is not None:
            others = files.folder / f"{options.theirs[0]}-0-all"
            found["compared"] = compare(files, options, files.folder / "ours-0-all", others)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
