"""Check and fetch the input files of benchmarks."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron4.errors import DataError, DownloadError
from nemotron4.evaluation.data import DataFile, DataSource, inflated, unpack
from nemotron4.evaluation.registry import TASKS, find_task
from nemotron4.runs import write_file


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
                except (httpx.HTTPError, DownloadError, DataError) as error:
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
