"""Prompts for the AEGIS evaluation: rows of a file, or the test set fetched from its hub."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron4 import records
from nemotron4.errors import DownloadError, import_optional
from nemotron4.records import AskedPrompt, JsonObject, read_json_lines
from nemotron4.text.content_safety import category_code

DATASET = "nvidia/Aegis-AI-Content-Safety-Dataset-1.0"
HUB = "https://huggingface.co"
SAFE = "safe"


def read_aegis_prompts(path: Path) -> tuple[list[AskedPrompt], int]:
    """Prompts of a file, each with the code of its category; and how many categories are none of the 13."""
    prompts, num_strange = [], 0
    for prompt in records.read_prompts(path):
        code = None if prompt.category is None else category_code(prompt.category)
        num_strange += code is None and str(prompt.category or SAFE).strip().lower() != SAFE
        prompts.append(replace(prompt, category=code))
    return prompts, num_strange


def fetch_prompts(path: Path) -> int:
    """Write the user prompts of the hub's AEGIS test set to ``path``, unless it is there; their number.

    The hub's address is ``$HF_ENDPOINT``, a token ``$HF_TOKEN``. The category of a prompt is what most
    annotators gave it.
    """
    if path.exists():
        return sum(1 for _ in read_json_lines(path))
    import httpx

    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(headers=headers, timeout=120.0, follow_redirects=True) as client:
            listing = client.get(f"{hub}/api/datasets/{DATASET}/tree/main", params={"recursive": "true"})
            names = [str(entry["path"]) for entry in listing.raise_for_status().json()]
            name = _test_file(names)
            content = client.get(f"{hub}/datasets/{DATASET}/resolve/main/{name}").raise_for_status().content
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{hub}: {DATASET} could not be fetched: {error!r}",
            hint=f"without a network, write the prompts to {path} by hand: one {{'prompt': ...}} a line",
        ) from error
    rows = list(_user_prompts(_parse(name, content)))
    if not rows:
        raise DownloadError(f"{hub}: {name} of {DATASET} holds no row with text_type user_message")
    path.parent.mkdir(parents=True, exist_ok=True)
    return records.write(path, rows)


def _test_file(names: Iterable[str]) -> str:
    suffixes = (".jsonl", ".json", ".csv", ".parquet")
    found = sorted(name for name in names if "test" in name.lower() and name.endswith(suffixes))
    if not found:
        raise DownloadError(f"{DATASET} has no test file of a known form ({', '.join(suffixes)})")
    return found[0]


def _parse(name: str, content: bytes) -> list[Mapping[str, Any]]:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(content.decode())))
    if name.endswith(".json"):
        return list(json.loads(content))
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    parquet = import_optional("pyarrow.parquet", f"reading {name}")
    return list(parquet.read_table(io.BytesIO(content)).to_pylist())


def _user_prompts(rows: Iterable[Mapping[str, Any]]) -> Iterable[JsonObject]:
    """The dataset also holds answers and whole dialogues, which are no prompts."""
    for number, row in enumerate(rows, start=1):
        if row.get("text_type") != "user_message":
            continue
        labels = [
            value for name, value in row.items() if name.startswith("labels_") and isinstance(value, str)
        ]
        # One annotator may have given several categories.
        votes = Counter(part.strip() for label in labels for part in label.split(",") if part.strip())
        best = votes.most_common(1)[0][0] if votes else None
        yield {"id": str(number), "prompt": row["text"], "category": best}
