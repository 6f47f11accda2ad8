"""Run one benchmark: ask the model, ask the judge, score. Every stage resumes where it was stopped."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from nemotron4.client import ChatModel, ClientError, HopelessError, Sampling, TransientError
from nemotron4.evaluation import inspect_adapter
from nemotron4.evaluation.conversation import Answer, Conversation, of_item, of_judgment
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.responses import FAILURES_FILE, JUDGMENTS_FILE, RESPONSES_FILE, SAMPLES_FILE
from nemotron4.evaluation.result import Result, save, sha256_of
from nemotron4.evaluation.scoring import score_task
from nemotron4.evaluation.task import Item, Judgment, Task
from nemotron4.records import JsonObject
from nemotron4.runs import IncompleteError, RowLog, claim

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a benchmark is run. ``limit`` draws that many items with ``seed``; it may be raised later."""

    out: Path
    limit: int | None = None
    seed: int = 0
    concurrency: int = 16
    allow_unsafe: bool = False


def choose(items: Sequence[Item], *, limit: int | None, seed: int) -> list[Item]:
    """All items, or a seeded sample in the benchmark's order. A larger sample holds every smaller one."""
    if limit is None or limit >= len(items):
        return list(items)
    shuffled = list(range(len(items)))
    random.Random(seed).shuffle(shuffled)
    return [items[at] for at in sorted(shuffled[:limit])]


async def run_task(
    task: Task,
    source: DataSource,
    settings: RunSettings,
    *,
    model: ChatModel,
    judge: ChatModel | None,
    note: Note,
) -> Result:
    """The scored result, saved in ``out/TASK``; IncompleteError if a request failed for now."""
    folder = settings.out / task.name
    content = source.main(task.main_file)
    if task.needs_sandbox:
        from nemotron4.grading.sandbox import open_sandbox

        open_sandbox(allow_unsafe=settings.allow_unsafe)  # before hours of generation, not after
    judge_name = judge.name if judge is not None and task.judge is not None else None
    identity: dict[str, Any] = {
        "task": task.name,
        "model": model.name,
        "judge": judge_name,
        "data_sha256": content.sha256,
        "prompt_sha256": sha256_of(task.prompt),
        "sampling": asdict(task.sampling),
        "seed": settings.seed,
    }
    claim(folder, identity)
    items = choose(task.load(source), limit=settings.limit, seed=settings.seed)
    stage = _Stage(folder, settings, task.name, identity, note)
    answers = await stage.ask(
        [of_item(item, task.sampling) for item in items],
        model,
        RESPONSES_FILE,
        lambda answer, _: answer.to_json(),
    )
    responses = {str(row["id"]): _texts(row) for row in answers}
    judgments: list[Judgment] = []
    judged: list[JsonObject] = []
    if task.judge is not None and judge is not None:
        requests = [of_judgment(request) for request in task.judge(items, responses, source)]
        judged = await stage.ask(requests, judge, JUDGMENTS_FILE, _judgment_row)
        judgments = [Judgment(id=row["id"], part=row["part"], text=row["text"], fields=row) for row in judged]
    result = score_task(
        task,
        items,
        responses,
        judgments,
        source,
        seed=settings.seed,
        allow_unsafe=settings.allow_unsafe,
        judge=judge_name,
        model=model.name,
        sampling=_decoding(task.sampling),
        limit=settings.limit,
        usage=_usage(answers, judged),
    )
    missing = "no response" if task.judge is None else "no judgment"
    result = replace(result, unscored=_with_failures(result.unscored, missing, stage.refused))
    save(result, folder)
    return result


def _decoding(sampling: Sampling) -> dict[str, Any]:
    """What a result says of it: length, temperature, and the rest where it is not the default."""
    default = asdict(Sampling())
    return {
        name: value
        for name, value in asdict(sampling).items()
        if name in ("max_tokens", "temperature") or value != default[name]
    }


def _texts(row: JsonObject) -> tuple[str, ...]:
    response = row["response"]
    return tuple(response) if isinstance(response, list) else (response,)


def _judgment_row(answer: Answer, conversation: Conversation) -> JsonObject:
    """A judgment as ``eval score`` reads it."""
    row = answer.to_json()
    fields = dict(conversation.fields)
    item, part = fields.pop("item"), fields.pop("part")
    row |= {"id": item, "part": part, "turn": part, "text": row.pop("response"), **fields}
    if (first := row.pop("first_token", None)) is not None:
        row["logprobs"] = first
    return row


def _usage(answers: Sequence[JsonObject], judged: Sequence[JsonObject]) -> dict[str, float]:
    usage: dict[str, float] = {}
    for prefix, rows in (("", answers), ("judge_", judged)):
        if rows:
            for name in ("prompt_tokens", "completion_tokens", "duration_s"):
                usage[prefix + name] = sum(row.get(name) or 0 for row in rows)
    return usage


def _with_failures(unscored: Mapping[str, int], missing: str, refused: Counter[str]) -> dict[str, int]:
    """What is missing because its request can never succeed, under that reason instead."""
    reasons = Counter(unscored)
    for kind, count in refused.items():
        reasons[missing] -= count
        reasons[f"request refused: {kind}"] += count
    return {reason: count for reason, count in reasons.items() if count > 0}


class _Stage:
    """Asks conversations of one folder and keeps what came back."""

    def __init__(
        self, folder: Path, settings: RunSettings, name: str, identity: dict[str, Any], note: Note
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._name = name
        self._identity = identity
        self._note = note
        self.refused: Counter[str] = Counter()  # kinds of failure of the latest stage

    async def ask(
        self,
        conversations: Sequence[Conversation],
        model: ChatModel,
        file: str,
        as_row: Callable[[Answer, Conversation], JsonObject],
    ) -> list[JsonObject]:
        """The rows of all conversations in the order of the file, in which scoring them again reads them."""
        by_id = {conversation.id: conversation for conversation in conversations}
        transient: list[ClientError] = []
        with (
            RowLog(self._folder / file, key=_conversation_id) as log,
            RowLog(self._folder / FAILURES_FILE) as failed,
        ):
            done = {_conversation_id(row): row for row in log.rows}
            hopeless = failed.keys
            left = [c for c in conversations if c.id not in done and c.id not in hopeless]
            progress = Progress(f"{self._name} {Path(file).stem}", len(conversations), len(left), self._note)

            def on_answer(answer: Answer) -> None:
                row = as_row(answer, by_id[answer.id])
                log.append(row)
                done[answer.id] = row
                progress.add()

            def on_failure(name: str, error: ClientError) -> None:
                if isinstance(error, HopelessError):
                    failed.append({"id": name, "kind": error.kind, "message": error.message})
                else:
                    transient.append(error)
                progress.add()

            if left:
                await inspect_adapter.run_conversations(
                    left,
                    model,
                    name=f"{self._name}-{Path(file).stem}",
                    logs=self._folder / "logs",
                    concurrency=self._settings.concurrency,
                    metadata=self._identity,
                    on_answer=on_answer,
                    on_failure=on_failure,
                    on_retry=progress.repeated,
                    on_log=self._keep_log,
                )
            progress.end()
            failures = {row["id"]: row["kind"] for row in failed.rows if row["id"] in by_id}
        self.refused = Counter(failures.values())
        missing = [name for name in by_id if name not in done and name not in failures]
        if missing:
            reason = f": {transient[0].message}" if transient else ""
            raise IncompleteError(
                f"{self._name}: {len(missing)} of {len(conversations)} requests have no answer yet{reason}",
                hint="repeat the command: what was answered is kept",
            )
        return [row for name, row in done.items() if name in by_id]

    def _keep_log(self, name: str, ids: Sequence[str]) -> None:
        """Which log shows which sample: the report's links."""
        with RowLog(self._folder / SAMPLES_FILE, key=itemgetter("log")) as log:
            log.append({"log": name, "ids": list(ids)})


def _conversation_id(row: JsonObject) -> str:
    return f"{row['id']}#{row['part']}" if "part" in row else str(row["id"])


class Progress:
    """One line per second at most, on a terminal over the last one: done, rate, time left."""

    def __init__(self, name: str, total: int, left: int, note: Note) -> None:
        self._name, self._total, self._left, self._note = name, total, left, note
        self._done = 0
        self._num_repeated, self._trouble = 0, ""
        self._started_s = self._shown_s = time.monotonic()
        if left < total:
            note(f"{name}: {total - left} of {total} are already there")

    def add(self) -> None:
        self._done += 1
        self._show()

    def repeated(self, error: TransientError) -> None:
        """A request failed for now and is made again."""
        self._num_repeated += 1
        self._trouble = error.message
        self._show()

    def _show(self) -> None:
        if time.monotonic() - self._shown_s >= (1.0 if sys.stderr.isatty() else 15.0):
            self._shown_s = time.monotonic()
            self._note(self._line())

    def end(self) -> None:
        if self._done or self._num_repeated:
            self._note(self._line())

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._started_s, 1e-9)
        at = self._total - self._left + self._done
        left_s = int((self._left - self._done) / rate) if rate else 0
        line = (
            f"{self._name}: {at}/{self._total}  {rate:.2f} requests/s  {left_s // 60}:{left_s % 60:02} left"
        )
        return line + (f"  {self._num_repeated} repeated: {self._trouble}" if self._num_repeated else "")
