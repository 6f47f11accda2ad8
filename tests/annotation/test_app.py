"""The page of a blind study: names stay hidden, orders are an annotator's own, nobody sees other ratings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from nemotron4.annotation.app import create_app
from nemotron4.client import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.human import Study, create
from nemotron4.records import AskedPrompt, Message

OLD = Path(__file__).parent / "old"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(OLD / "study", tmp_path / "study")
    return Study(tmp_path / "study")


@pytest.fixture
def page(study: Study) -> Iterator[TestClient]:
    with TestClient(create_app(study), base_url=f"http://127.0.0.1/{study.store.token()}/") as client:
        yield client


def test_no_answer_of_the_page_names_a_model_or_what_others_said(study: Study, page: TestClient) -> None:
    texts = [page.get("api/study").text, page.get("api/report").text, page.get("api/changes").text]
    texts.append(page.get("api/items", params={"annotator": "eve"}).text)
    shown = page.get("api/items/p0", params={"annotator": "eve"})
    texts.append(shown.text)
    assert not any(f'"{model}"' in text for text in texts for model in study.models)
    assert shown.json()["judgments"] == []  # ada and bob rated it
    assert page.get("api/export/judgments").status_code == 404


def test_letters_are_an_annotators_own_and_are_stored_as_models(study: Study, page: TestClient) -> None:
    for name in ("eve", "dan", "kim"):
        order = study.answer_order(name, "p0")
        answers = page.get("api/items/p0", params={"annotator": name}).json()["answers"]
        assert [each["text"] for each in answers] == [study.answers[model]["p0"] for model in order]
        said = {"annotator": name, "answer": "B", "values": {"helpfulness": 5}}
        assert page.post("api/items/p0/judgments", json=said).json()["answer"] == "B"
        again = page.get("api/items/p0", params={"annotator": name}).json()["judgments"]
        assert [(each["answer"], each["values"]) for each in again] == [("B", {"helpfulness": 5})]
        (kept,) = [each for each in study.store.judgments("p0") if each.annotator == name]
        assert kept.answer == order[1]


def test_half_a_rating_is_progress_and_no_rating(study: Study, page: TestClient) -> None:
    before = len(study.ratings())
    page.post(
        "api/items/p1/judgments", json={"annotator": "eve", "answer": "A", "values": {"length": "too_long"}}
    )
    assert len(study.ratings()) == before
    assert page.get("api/changes").json()["progress"]["by_annotator"]["eve"] == 1
    full = {"helpfulness": 1, "truthfulness": 2}
    page.post("api/items/p1/judgments", json={"annotator": "eve", "answer": "A", "values": full})
    assert len(study.ratings()) == before + 1


def test_without_the_token_nothing_is_there(study: Study) -> None:
    with TestClient(create_app(study), base_url="http://127.0.0.1/") as client:
        for path in ("", "api/study", "wrong/api/study", "web/judgments.js"):
            assert client.get(f"http://127.0.0.1/{path}").status_code == 404


def test_an_id_with_a_slash_is_shown_and_judged(tmp_path: Path) -> None:
    name = "HumanEval/0"
    create(
        tmp_path / "s",
        [AskedPrompt(name, (Message("user", "hi"),))],
        {"a": "", "b": ""},
        seed=0,
        sampling=Sampling(),
    )
    for model in "ab":
        (tmp_path / "s" / f"answers-{model}.jsonl").write_text(
            json.dumps({"id": name, "response": model}) + "\n"
        )
    study = Study(tmp_path / "s")
    place = f"/{study.store.token()}/api/items/HumanEval%2F0"
    with TestClient(create_app(study), base_url="http://127.0.0.1") as client:
        assert client.get(place).json()["id"] == name
        said = {"annotator": "eve", "answer": "A", "values": {"helpfulness": 5}}
        assert client.post(f"{place}/judgments", json=said).json()["item"] == name
    assert len(study.store.judgments(name)) == 1


def test_half_a_surrogate_pair_is_refused_in_words(study: Study, page: TestClient) -> None:
    said = '{"annotator": "eve", "answer": "A", "values": {"length": "\\ud83d"}}'
    headers = {"content-type": "application/json"}
    assert page.post("api/items/p0/judgments", content=said, headers=headers).status_code == 400
    with pytest.raises(DataError, match="surrogate"):
        study.store.put_draft("d", {"text": "\ud83d"})
