"""The answers of a study's models: read from files of stored ones, or asked from servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from nemotron4.client import ChatModel, Sampling, call_with_retries
from nemotron4.client.remote import connect, is_address
from nemotron4.client.retry import ask_missing
from nemotron4.errors import DataError
from nemotron4.evaluation.human.study import StudyPrompt, answers_path
from nemotron4.records import JsonObject, read_json_lines
from nemotron4.runs import RowLog


async def collect_answers(
    folder: Path,
    prompts: Sequence[StudyPrompt],
    sources: Mapping[str, str],
    sampling: Sampling,
    *,
    concurrency: int,
    note: Callable[[str], None],
) -> None:
    """Every model's answers into the study, each on disk when it is there; what is there stays."""
    by_id = {prompt.id: prompt for prompt in prompts}
    for name, source in sources.items():
        with RowLog(answers_path(folder, name)) as log:
            if not is_address(source):
                _take(log, Path(source), by_id)
                continue
            chat = connect(source, None)

            try:
                ask = partial(_ask, chat, by_id, sampling)
                await ask_missing(log, list(by_id), ask, concurrency=concurrency, on_rows=lambda rows: None)
            finally:
                await chat.close()
        note(f"{name}: {len(prompts)} prompts answered")


async def _ask(
    chat: ChatModel, by_id: Mapping[str, StudyPrompt], sampling: Sampling, prompt: str
) -> JsonObject:
    reply = await call_with_retries(partial(chat.chat, by_id[prompt].messages, sampling))
    return {"response": reply.text, "finish_reason": reply.finish_reason}


def _take(log: RowLog, path: Path, by_id: Mapping[str, StudyPrompt]) -> None:
    """Answers of other prompts are no part of the study; an answer that is no text is an error."""
    there = set(log.keys)
    found = []
    for number, row in read_json_lines(path):
        name = str(row.get("id"))
        if name not in by_id or name in there:
            continue
        if not isinstance(row.get("response"), str):
            raise DataError(f"{path}:{number}: field 'response' is not a string; expected one answer")
        found.append({"id": name, "response": row["response"]})
        there.add(name)
    log.append(*found)
