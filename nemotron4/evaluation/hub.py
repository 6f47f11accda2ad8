"""Tables of the Hugging Face hub as the JSON lines that benchmarks are read from."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable

from nemotron4.errors import DownloadError, import_optional

HUB = "https://huggingface.co"
Build = Callable[[Callable[[str], bytes]], bytes]


def hub_rows(repository: str, file: str) -> Build:
    """Downloads one Parquet file of a data set and writes its rows with their own fields.

    The hub's address is ``$HF_ENDPOINT``. The file is the newest: its hash stands in every result.
    """

    def build(download: Callable[[str], bytes]) -> bytes:
        parquet = import_optional("pyarrow.parquet", f"reading {repository}")
        hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        received = download(f"{hub}/datasets/{repository}/resolve/main/{file}")
        try:
            rows = parquet.read_table(io.BytesIO(received)).to_pylist()
        except import_optional("pyarrow", "reading Parquet").ArrowException as error:
            raise DownloadError(f"{repository}, {file}: not a Parquet file: {error}") from error
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    return build
