"""``/v1/embeddings``: what the official client sends, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from nemotron4.cli.main import main
from nemotron4.client import EngineChatModel
from nemotron4.inference.fake import FakeEngine

App = Callable[..., Any]
ROUTE = "/v1/embeddings"
RECIPE = """
name = "alike"
[endpoint.gen]
url = "URL"
[[stage]]
name = "in"
kind = "prompt_file"
knobs = {{ file = "{file}", task = "t" }}
[[stage]]
name = "vectors"
kind = "embed"
takes = ["in"]
[[stage]]
name = "out"
kind = "embed_dedup"
takes = ["vectors"]
knobs = {{ threshold = 0.9999 }}
[export]
prompts = ["out"]
licence = "cc0-1.0"
"""


def test_synthetic_prompts_alike_are_dropped_by_our_own_vectors(
    serving: Callable[..., Any], tmp_path: Path
) -> None:
    texts = ["Name a bird.", "Name a bird.", "What is 1 + 2?", "What is 2 + 1?", "What is 2 + 1?"]
    texts.append("Describe bread.")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    recipe = RECIPE.format(file=tmp_path / "p.jsonl")
    with serving(FakeEngine("x")) as running:
        (tmp_path / "r.toml").write_text(recipe.replace("URL", f"{running.url}/v1"))
        assert main(["synth", "run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")]) == 0
        running.wait_idle()
    assert main(["synth", "export", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/export/prompts.jsonl").read_text().splitlines()]
    kept = {row["messages"][0]["content"].strip() for row in rows}
    assert kept == {"Name a bird.", "What is 1 + 2?", "What is 2 + 1?", "Describe bread."}
    assert len(rows) == 4


# Without a format the client asks for base64 and reads it back.
@pytest.mark.parametrize("settings", [{}, {"encoding_format": "float"}])
def test_the_official_client_gets_vectors_of_length_one(serving: Callable[..., Any], settings: Any) -> None:
    texts = ["hello there", "hello there", "quite another text"]
    engine = FakeEngine("x")
    with serving(engine) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            model = client.models.list().data[0].id
            answer = client.embeddings.create(model=model, input=texts, **settings)
        running.wait_idle()
    first, same, other = (row.embedding for row in answer.data)
    assert first == same != other
    assert math.hypot(*first) == pytest.approx(1, abs=1e-6)
    assert [row.index for row in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(engine.tokenizer.encode(text)) for text in texts)
    assert answer.pooling == "mean of the last hidden states, normalised"  # type: ignore[attr-defined]


def test_texts_and_their_ids_have_one_vector_as_in_process(make_app: App) -> None:
    app = make_app("x")
    ids = app.engine.tokenizer.encode("abc")
    bodies: list[Any] = ["abc", ["abc"], ids, [ids]]
    found = [app.post(ROUTE, {"input": each}).json()["data"][0]["embedding"] for each in bodies]
    own = asyncio.run(EngineChatModel(app.engine).embed("abc"))
    assert found == [list(own.vector)] * 4
    [kept] = app.post(ROUTE, {"input": "xxabc", "truncate_prompt_tokens": 3}).json()["data"]
    assert kept["embedding"] == found[0]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": []}, 400, "input: 0 texts; expected 1 to 2048"),
        ({"input": ["x", ""]}, 400, "input: text 1 is empty"),
        ({"input": [10**6]}, 400, "outside the vocabulary"),
        ({"input": "x" * 5000}, 400, "context length is"),
        ({"input": "x", "dimensions": 7}, 400, "dimensions is 7; this model's embeddings have 16"),
        ({"input": "x", "model": "other"}, 404, "is not served here"),
        ({"input": ["x"] * 2049}, 400, "expected 1 to 2048"),
    ],
)
def test_what_cannot_be_embedded_is_refused(make_app: App, body: Any, status: int, words: str) -> None:
    answer = make_app("x").post(ROUTE, body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
