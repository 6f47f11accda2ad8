"""The benchmarks by name, the only list of them; own tasks; input files checked and fetched."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, DataError, DownloadError, unknown_name
from nemotron4.evaluation.data import DataFile, DataSource, inflated, unpack
from nemotron4.evaluation.own import TASK_FILE, list_folders, open_folder, open_function
from nemotron4.evaluation.task import Task
from nemotron4.evaluation.tasks.alpaca_eval import ALPACA_EVAL, ALPACA_EVAL_SAMPLED
from nemotron4.evaluation.tasks.arena_hard import ARENA_HARD, ARENA_HARD_SAMPLED
from nemotron4.evaluation.tasks.code import HUMANEVAL, MBPP, MBPP_399, MBPP_427, MBPP_500
from nemotron4.evaluation.tasks.exact import BBH, GSM8K
from nemotron4.evaluation.tasks.mmlu import MMLU
from nemotron4.evaluation.tasks.mt_bench import MT_BENCH, MT_BENCH_FIRST
from nemotron4.evaluation.tasks.numbers import (
    ARC_CHALLENGE,
    HELLASWAG,
    MMLU_5SHOT,
    MMLU_LOGPROB,
    REWARDBENCH,
    WINOGRANDE,
)
from nemotron4.evaluation.tasks.rules import IFEVAL, TFEVAL
from nemotron4.runs import write_file

_ALL = (
    MT_BENCH, IFEVAL, MMLU, GSM8K, HUMANEVAL, MBPP, ARENA_HARD, ALPACA_EVAL, TFEVAL, REWARDBENCH, MBPP_399,
    MBPP_427, MBPP_500, MT_BENCH_FIRST, ARENA_HARD_SAMPLED, ALPACA_EVAL_SAMPLED, MMLU_LOGPROB, MMLU_5SHOT,
    ARC_CHALLENGE, HELLASWAG, WINOGRANDE, BBH,
)  # fmt: skip
BAD_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)  # what a proxy cut short
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def all_tasks(folder: Path) -> list[Task]:
    """Every benchmark, and the own tasks of the data folder."""
    return [*TASKS.values(), *(open_folder(path) for path in list_folders(folder))]


def find_task(name: str, folder: Path | None = None) -> Task:
    """A benchmark or own task of the data folder, a folder with ``task.toml``, or ``FILE.py:FUNCTION``."""
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if (path / TASK_FILE).is_file():
        return open_folder(path)
    if ".py:" in name:
        return open_function(name)
    own = {path.name: path for path in list_folders(folder)} if folder is not None else {}
    if name in own:
        return open_folder(own[name])
    message, hint = unknown_name("benchmark", name, [*TASKS, *own])
    raise ConfigError(message, hint=f"{hint}, or a folder with {TASK_FILE}")


def files_of(names: Sequence[str]) -> list[DataFile]:
    """The input files of the named benchmarks (all, if none is named), each once."""
    tasks = [find_task(name) for name in names] or list(TASKS.values())
    return list(dict.fromkeys(file for task in tasks for file in task.files))


def check_files(files: Sequence[DataFile], folder: Path) -> list[dict[str, Any]]:
    """One row per file; status ok, changed, missing, or unknown (there, but no hash to hold it against)."""
    rows = []
    for file in files:
        path = DataSource(folder).find(file)
        found = None if path is None else file.identity(hashlib.sha256(unpack(path)).hexdigest())
        if found is None:
            status = "missing"
        elif file.sha256 is None:
            status = "unknown"
        else:
            status = "ok" if found == file.sha256 else "changed"
        rows.append(
            {
                "path": file.path,
                "status": status,
                "sha256": found,
                "expected_sha256": file.sha256,
                "source": file.source,
                "licence": file.licence,
            }
        )
    return rows


def fetch_files(files: Sequence[DataFile], folder: Path) -> Iterator[str]:
    """Download what is missing and has an address; yields a line per file. A wrong hash is never kept.

    One file that fails does not keep the others from being fetched; DownloadError comes at the end.
    """
    import httpx

    def download(url: str) -> bytes:
        return client.get(url).raise_for_status().content

    failures: list[str] = []
    with httpx.Client(follow_redirects=True, timeout=60.0) as client:
        for file, row in zip(files, check_files(files, folder), strict=True):
            if row["status"] in ("ok", "unknown"):
                yield f"have     {file.path}"
            elif file.url is None and file.build is None:
                yield f"by hand  {file.path}: {file.source} ({file.licence})"
            else:
                try:
                    _keep(file, file.build(download) if file.build else download(str(file.url)), folder)
                except (httpx.HTTPError, DownloadError, DataError, *BAD_GZIP) as error:
                    failures.append(file.path)
                    yield f"failed   {file.path}: {error}"
                else:
                    yield f"fetched  {file.path}"
    if failures:
        raise DownloadError(
            f"{len(failures)} of {len(files)} files could not be fetched: {', '.join(failures)}",
            hint=f"put them below {folder} by hand; `nemotron4 eval data check` says where they come from",
        )


def _keep(file: DataFile, received: bytes, folder: Path) -> None:
    content = inflated(received)
    sha256 = file.identity(hashlib.sha256(content).hexdigest())
    if file.sha256 is not None and sha256 != file.sha256:
        raise DownloadError(f"sha256 of the content is {sha256}; expected {file.sha256}")
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
