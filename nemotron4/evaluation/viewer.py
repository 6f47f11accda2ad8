"""Logs that inspect_ai's viewer shows: every conversation of a scored run with its scores.

The form is inspect's ``.eval`` archive, version 2; ``pip install inspect_ai`` is needed to view it only.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemotron4.evaluation.result import Result
from nemotron4.records import JsonObject, Message
from nemotron4.runs import replacing

# Conversations of one log: keeps every log quick to open.
CHUNK = 1000
STOP_REASONS = {"stop": "stop", "length": "max_tokens"}


@dataclass(frozen=True, kw_only=True)
class LoggedSample:
    """One item: what was said, its scores, why it has them, and what the judge wrote."""

    id: str
    epoch: int
    messages: Sequence[Message]
    row: Mapping[str, Any]  # of responses.jsonl
    scores: Mapping[str, float | None]
    reason: str | None = None
    judgments: Sequence[str] = ()
    error: str | None = None

    def to_json(self) -> JsonObject:
        """As inspect's ``EvalSample``."""
        num_asked = next(
            (n for n, message in enumerate(self.messages) if message.role == "assistant"), len(self.messages)
        )
        turns = [
            {"id": f"{self.id}-{number}", "role": message.role, "content": message.content}
            for number, message in enumerate(self.messages)
        ]
        sample = self.summary() | {
            "input": turns[:num_asked],
            "messages": turns,
            "output": self._output(turns),
            "store": {},
            "events": [],
            "attachments": {},
        }
        if self.error is not None:
            sample["error"] = {"message": self.error, "traceback": "", "traceback_ansi": ""}
        return sample

    def summary(self) -> JsonObject:
        """As inspect's ``EvalSampleSummary``."""
        explanation = "\n\n".join([*([self.reason] if self.reason else []), *self.judgments])
        return {
            "id": self.id,
            "epoch": self.epoch,
            "input": self.messages[0].content if self.messages else "",
            "target": "",
            "metadata": {},
            "scores": {
                name: {"value": "unscored" if value is None else value, "explanation": explanation or None}
                for name, value in self.scores.items()
            },
            "model_usage": {},
            "total_time": self.row.get("duration_s"),
            "working_time": self.row.get("duration_s"),
            "uuid": f"{self.id}-{self.epoch}",
            "completed": self.error is None,
            "message_count": len(self.messages),
        } | ({"error": self.error} if self.error is not None else {})

    def _output(self, turns: Sequence[JsonObject]) -> JsonObject:
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not answers:
            return {"model": "", "choices": [], "completion": ""}
        reason = self.row.get("finish_reason")
        last = reason[-1] if isinstance(reason, list) else reason
        num_in, num_out = self.row.get("prompt_tokens") or 0, self.row.get("completion_tokens") or 0
        return {
            "model": "",
            "choices": [{"message": answers[-1], "stop_reason": STOP_REASONS.get(str(last), "unknown")}],
            "completion": answers[-1]["content"],
            "usage": {"input_tokens": num_in, "output_tokens": num_out, "total_tokens": num_in + num_out},
        }


def write_logs(folder: Path, result: Result, samples: Sequence[LoggedSample]) -> dict[str, str]:
    """Write the logs of a scored run in place of earlier ones; the log's file name by item id."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-00-00")
    earlier = list(folder.glob(f"*_{result.task}_nemotron4x*.eval"))
    log_of: dict[str, str] = {}
    for number, start in enumerate(range(0, len(samples), CHUNK)):
        chunk = samples[start : start + CHUNK]
        name = f"{stamp}_{result.task}_nemotron4x{number:04}.eval"
        _write_log(folder / name, result, chunk, number)
        log_of |= {sample.id: name for sample in chunk}
    for path in earlier:
        if path.name not in log_of.values():
            path.unlink()
    return log_of


def _write_log(path: Path, result: Result, samples: Sequence[LoggedSample], number: int) -> None:
    head = _head(result, samples, number)
    with (
        replacing(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as log,
    ):
        _add(log, "_journal/start.json", {name: head[name] for name in ("version", "eval", "plan")})
        for sample in samples:
            _add(log, f"samples/{sample.id}_epoch_{sample.epoch}.json", sample.to_json())
        _add(log, "summaries.json", [sample.summary() for sample in samples])
        _add(log, "header.json", head)


def _add(log: zipfile.ZipFile, name: str, value: Any) -> None:
    log.writestr(name, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _head(result: Result, samples: Iterable[LoggedSample], number: int) -> JsonObject:
    """As inspect's ``EvalLog`` without its samples."""
    samples = list(samples)
    at = result.created_at
    metadata = {
        "data_sha256": result.data_sha256,
        "prompt_sha256": result.prompt_sha256,
        "grader_sha256": result.grader_sha256,
        "judge": result.judge,
        "seed": result.seed,
        "sampling": dict(result.sampling),
    }
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": f"{result.task}-{number}",
            "run_id": result.task,
            "created": at,
            "task": result.name,
            "task_id": f"nemotron4x{number:04}",
            "task_version": 0,
            "task_attribs": {},
            "task_args": {},
            "dataset": {
                "samples": len(samples),
                "sample_ids": list(dict.fromkeys(sample.id for sample in samples)),
                "shuffled": False,
            },
            "model": result.model or "not named",
            "model_generate_config": {},
            "model_args": {},
            "config": {"epochs": max((sample.epoch for sample in samples), default=1)},
            "packages": {},
            "metadata": metadata,
        },
        "plan": {"name": "plan", "steps": [], "config": {}},
        "results": {
            "total_samples": len(samples),
            "completed_samples": sum(sample.error is None for sample in samples),
            "scores": [
                {
                    "name": name,
                    "scorer": result.task,
                    "params": {},
                    "metrics": {"value": {"name": "value", "value": metric.value, "params": {}}},
                }
                for name, metric in result.metrics.items()
                if metric.value is not None
            ],
        },
        "stats": {"started_at": at, "completed_at": at, "model_usage": {}},
    }
