"""Run one benchmark: ask the model, ask the judge, score. Every stage resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron4.client import ChatModel, ClientError, HopelessError, Sampling
from nemotron4.client.retry import Outage, is_of_endpoint
from nemotron4.errors import ConfigError
from nemotron4.evaluation.conversation import ItemAnswer, ItemRequest, hold, of_item, of_judgment
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.failures import FailedRequests, OnFailure, judgment_name, request_name, stopped
from nemotron4.evaluation.result import Result, save, sha256_of
from nemotron4.evaluation.scoring import (
    FAILURES_FILE,
    JUDGMENTS_FILE,
    RESPONSES_FILE,
    SAMPLES_FILE,
    ItemResponse,
    score_task,
    with_wrong,
)
from nemotron4.evaluation.task import Item, Judgment, Task, choose, load_items
from nemotron4.evaluation.viewer import LoggedSample, write_logs
from nemotron4.json_form import to_json
from nemotron4.progress import Progress
from nemotron4.records import JsonObject, Message, write
from nemotron4.runs import IncompleteError, RowLog, claim, held, in_flight


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a benchmark is run. ``limit`` draws that many items with ``seed``; it may be raised later.

    ``on_failure``: what a request that can never succeed is: a wrong answer, left out, or the end of the run.
    """

    out: Path
    limit: int | None
    seed: int
    epochs: int
    concurrency: int
    allow_unsafe: bool
    on_failure: OnFailure | None  # None: as the task says


async def run_task(
    task: Task, source: DataSource, settings: RunSettings, *, model: ChatModel, judge: ChatModel | None
) -> Result:
    """The scored result, saved in ``out/TASK``; IncompleteError if a request failed for now."""
    _check(task, settings)
    folder = settings.out / task.name
    judge_name = judge.name if judge is not None and task.judge is not None else None
    identity: dict[str, Any] = {
        "task": task.name,
        "model": model.name,
        "judge": judge_name,
        "data_sha256": source.main(task.main_file).sha256,
        "prompt_sha256": sha256_of(task.prompt),
        "sampling": to_json(task.sampling),
        "options": dict(task.changed),
        "epochs": settings.epochs,
        "seed": settings.seed,
    }
    with held(folder):
        claim(folder, identity, {"sampling": to_json(Sampling()), "epochs": 1})
        items = choose(load_items(task, source), limit=settings.limit, seed=settings.seed)
        return await _Run(task, source, settings, folder, items).result(model, judge, judge_name)


def _check(task: Task, settings: RunSettings) -> None:
    """What would fail after hours of generation fails before."""
    if task.needs_sandbox:
        from nemotron4.grading.sandbox import open_sandbox

        open_sandbox(allow_unsafe=settings.allow_unsafe)
    if settings.on_failure == "wrong" and not task.is_generative:
        raise ConfigError(f"{task.name} scores numbers: a failed request cannot be a wrong answer")
    if settings.epochs > 1:
        if task.judge is not None or not task.is_generative:
            raise ConfigError(f"--epochs is for tasks that grade a text without a judge; {task.name} is none")
        if task.sampling.temperature == 0:
            raise ConfigError(
                f"{task.name} is greedy: {settings.epochs} epochs would be equal",
                hint="pass --temperature 0.7 or another one",
            )


class _Run:
    """The stages of one benchmark in one folder."""

    def __init__(
        self, task: Task, source: DataSource, settings: RunSettings, folder: Path, items: Sequence[Item]
    ) -> None:
        self._task, self._source, self._settings = task, source, settings
        self._folder, self._items = folder, items
        self._refused: dict[str, dict[str, str]] = {}  # file of a stage -> conversation -> kind of failure

    async def result(self, model: ChatModel, judge: ChatModel | None, judge_name: str | None) -> Result:
        task, settings = self._task, self._settings
        rows = await self._ask(self._conversations(), model, RESPONSES_FILE, _response_row)
        epochs = self._epochs(rows)
        judgments: list[Judgment] = []
        judged: list[JsonObject] = []
        if task.judge is not None and judge is not None:
            texts = {name: response.texts for name, response in epochs[0].items()}
            requests = [of_judgment(one) for one in task.judge(self._items, texts, self._source)]
            judged = list((await self._ask(requests, judge, JUDGMENTS_FILE, _judgment_row)).values())
            judgments = [
                Judgment(id=row["id"], part=row["part"], text=row["text"], fields=row) for row in judged
            ]
        result = score_task(
            task,
            self._items,
            epochs,
            judgments,
            self._source,
            self._failures,
            seed=settings.seed,
            allow_unsafe=settings.allow_unsafe,
            judge=judge_name,
            model=model.name,
            sampling=_decoding(task.sampling),
            limit=settings.limit,
            usage=_usage(list(rows.values()), judged),
        )
        save(result, self._folder)
        self._write_logs(result, rows, judgments)
        return result

    def _conversations(self) -> list[ItemRequest]:
        """Every item once per epoch; an epoch has a seed of its own."""
        found = []
        for epoch in range(1, self._settings.epochs + 1):
            sampling = self._task.sampling
            if epoch > 1:
                sampling = replace(sampling, seed=(sampling.seed or self._settings.seed) + epoch - 1)
            for item in self._items:
                found.append(replace(of_item(item, sampling), id=request_name(item.id, epoch), epoch=epoch))
        return found

    def _epochs(self, rows: Mapping[str, JsonObject]) -> list[dict[str, ItemResponse]]:
        """Answers by item for each epoch; a failed request is an empty one where it counts as wrong."""
        found = [
            {
                item.id: ItemResponse.of_row(rows[name])
                for item in self._items
                if (name := request_name(item.id, epoch)) in rows
            }
            for epoch in range(1, self._settings.epochs + 1)
        ]
        return with_wrong(self._items, found, self._failures)

    @property
    def _on_failure(self) -> OnFailure:
        return self._settings.on_failure or self._task.on_failure

    @property
    def _failures(self) -> FailedRequests:
        return FailedRequests(
            on_failure=self._on_failure,
            responses=self._refused[RESPONSES_FILE],
            judgments=self._refused.get(JUDGMENTS_FILE, {}),
        )

    async def _ask(
        self,
        conversations: Sequence[ItemRequest],
        model: ChatModel,
        file: str,
        as_row: Callable[[ItemAnswer, ItemRequest], JsonObject],
    ) -> dict[str, JsonObject]:
        """The rows of all conversations by id, in the order of the file, in which they are scored again."""
        by_id = {conversation.id: conversation for conversation in conversations}
        transient: list[ClientError] = []
        has_answered = False
        outage = Outage(self._settings.concurrency)
        with (
            RowLog(self._folder / file, key=_conversation_id) as log,
            RowLog(self._folder / FAILURES_FILE) as failed,
            Progress(
                len(by_id),
                sum(name in log or name in failed for name in by_id),
                name=f"{self._task.name} {Path(file).stem}",
                unit="requests",
            ) as progress,
        ):

            async def work(conversation: ItemRequest) -> tuple[RowLog, JsonObject] | None:
                nonlocal has_answered
                try:
                    answer = await hold(conversation, model, lambda error: progress.repeated(error.message))
                except HopelessError as error:
                    is_alive = has_answered or bool(len(log))
                    if self._on_failure == "stop" or is_of_endpoint(error, has_answered=is_alive):
                        raise stopped(self._task, conversation.id, error.message, error.hint) from error
                    outage.answered()
                    return failed, {"id": conversation.id, "kind": error.kind, "message": error.message}
                except ClientError as error:
                    transient.append(error)
                    if outage.failed() or error.kind == "quota":
                        num_missing = len(left) - outage.num_answered
                        raise self._incomplete(len(by_id), num_missing, error) from error
                    return None
                has_answered = True
                outage.answered()
                return log, as_row(answer, conversation)

            def keep(rows: Sequence[tuple[RowLog, JsonObject] | None]) -> None:
                finished = [row for row in rows if row is not None]
                for target in (log, failed):
                    target.append(*(row for to, row in finished if to is target))
                progress.add(len(finished), num_failed=sum(to is failed for to, _ in finished))

            left = [c for c in conversations if c.id not in log and c.id not in failed]
            await in_flight(left, work, keep, limit=self._settings.concurrency)
            self._refused[file] = {name: failed[name]["kind"] for name in by_id if name in failed}
            num_missing = sum(name not in log and name not in failed for name in by_id)
            if num_missing:
                raise self._incomplete(len(by_id), num_missing, transient[0] if transient else None)
            return {name: row for row in log.rows if (name := _conversation_id(row)) in by_id}

    def _incomplete(self, total: int, missing: int, error: ClientError | None) -> IncompleteError:
        reason = f": {error.message}" if error is not None else ""
        return IncompleteError(
            f"{self._task.name}: {missing} of {total} requests have no answer yet{reason}",
            hint="repeat the command: what was answered is kept",
        )

    def _write_logs(
        self, result: Result, rows: Mapping[str, JsonObject], judgments: Sequence[Judgment]
    ) -> None:
        """For the viewer, and which log shows which item for the report's links."""
        texts: dict[str, list[str]] = {}
        for judgment in judgments:
            texts.setdefault(judgment.id, []).append(judgment.text)
        samples = [
            LoggedSample(
                id=item.id,
                epoch=epoch,
                messages=_said(item, rows.get(name)),
                row=rows.get(name, {}),
                scores=result.items.get(item.id, {}),
                reason=result.reasons.get(item.id),
                judgments=texts.get(item.id, ()),
                error=self._refused[RESPONSES_FILE].get(name),
            )
            for item in self._items
            for epoch in range(1, self._settings.epochs + 1)
            if (name := request_name(item.id, epoch))
        ]
        log_of = write_logs(self._folder / "logs", result, samples)
        ids: dict[str, list[str]] = {}
        for name, log in log_of.items():
            ids.setdefault(log, []).append(name)
        write(self._folder / SAMPLES_FILE, ({"log": log, "ids": names} for log, names in ids.items()))


def _said(item: Item, row: JsonObject | None) -> list[Message]:
    """The conversation as it went."""
    said = list(item.messages)
    if row is not None:
        turns = ItemResponse.of_row(row).texts
        for number, text in enumerate(turns):
            said.append(Message("assistant", text))
            if number < len(turns) - 1 and number < len(item.follow_ups):
                said.append(Message("user", item.follow_ups[number]))
    return said


def _conversation_id(row: JsonObject) -> str:
    if "part" in row:
        return judgment_name(row["id"], row["part"])
    return request_name(str(row["id"]), row.get("epoch", 1))


def _response_row(answer: ItemAnswer, conversation: ItemRequest) -> JsonObject:
    row = answer.to_json()
    if conversation.epoch > 1:
        row |= {"id": conversation.id.removesuffix(f"~{conversation.epoch}"), "epoch": conversation.epoch}
    return row


def _judgment_row(answer: ItemAnswer, conversation: ItemRequest) -> JsonObject:
    """A judgment as ``eval score`` reads it."""
    row = answer.to_json()
    fields = dict(conversation.fields)
    item, part = fields.pop("item"), fields.pop("part")
    row |= {"id": item, "part": part, "turn": part, "text": row.pop("response"), **fields}
    if (first := row.pop("first_token", None)) is not None:
        row["logprobs"] = first
    return row


def _decoding(sampling: Sampling) -> dict[str, Any]:
    """What a result says of it: length, temperature, and the rest where it is not the default."""
    default = to_json(Sampling())
    return {
        name: value
        for name, value in to_json(sampling).items()
        if name in ("max_tokens", "temperature") or value != default[name]
    }


def _usage(answers: Sequence[JsonObject], judged: Sequence[JsonObject]) -> dict[str, float]:
    usage: dict[str, float] = {}
    for prefix, rows in (("", answers), ("judge_", judged)):
        if rows:
            for name in ("prompt_tokens", "completion_tokens", "duration_s"):
                usage[prefix + name] = sum(row.get(name) or 0 for row in rows)
    return usage
