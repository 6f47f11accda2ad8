"""The review page: its interface over HTTP, what its labels do to an export, and the page in a browser."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from nemotron4.errors import DataError
from nemotron4.records import PreferencePair, RewardSample, read
from nemotron4.synth.export import export
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.review.app import create_app
from nemotron4.synth.review.notes import NoteBook, Review
from nemotron4.synth.writer import Ledger
from tests.browser import Browser
from tests.synth.conftest import Bench

MakeRecipe = Callable[..., SynthRecipe]
TAB, ESCAPE, SELECT_ALL = "\ue004", "\ue00c", "\ue009a\ue000"  # as WebDriver spells keys
EXPORT = {"preference": ["judge"], "sft": ["judge"], "prompts": ["dedup"]}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[httpx.Client]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(folder), ws="none", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=base, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def made(bench: Bench, recipe: MakeRecipe) -> SynthRecipe:
    done = recipe(export=EXPORT)
    bench.run(done)
    return done


def all_rows(client: httpx.Client, **query: str) -> list[dict]:
    found: list[dict] = []
    after: str | None = ""
    while after is not None:
        page = client.get("/api/rows", params={**query, "after": after}).json()
        found += page["rows"]
        after = page["after"]
    return found


def test_pages_hold_every_row_of_every_stage_once(bench: Bench, made: SynthRecipe) -> None:
    with serving(bench.folder) as client:
        run = client.get("/api/run").json()
        listed = [row["id"] for row in all_rows(client)]
        assert run["first_stage"] == "judge"
        assert len(listed) == len(set(listed)) == sum(stage["rows"] for stage in run["stages"]) > 50
        judged = all_rows(client, stage="judge")
        assert {row["id"] for row in judged} == {record.hex() for record in bench.rows("judge")}
        word = judged[0]["title"].split()[-1]
        found = all_rows(client, stage="judge", search=word.upper())
        assert judged[0]["id"] in {row["id"] for row in found}
        assert all_rows(client, stage="judge", search=judged[0]["id"][:12])[0] == judged[0]
        assert all_rows(client, search="nothing says this") == []


def test_a_row_tells_its_answers_and_where_it_comes_from(bench: Bench, made: SynthRecipe) -> None:
    record, content = next(iter(bench.rows("judge").items()))
    with serving(bench.folder) as client:
        row = client.get(f"/api/rows/{record.hex()}").json()
    assert row["answers"]["chosen"]["text"] == content["chosen"]["text"]
    assert row["answers"]["rejected"]["reward"] == 0.0
    stages = [step["stage"] for step in row["ancestry"]]
    assert stages == ["root:macro", "macro", "sub", "open", "dedup", "respond", "judge"]
    assert row["reviews"] == []


def test_reviews_shape_the_export_and_become_labels(bench: Bench, made: SynthRecipe) -> None:
    first, second, third, *rest = sorted(bench.rows("judge"))
    content = bench.rows("judge")
    with serving(bench.folder) as client:

        def review(record: bytes, **said: object) -> None:
            answer = client.post(f"/api/rows/{record.hex()}/review", json={"annotator": "ada", **said})
            assert answer.status_code == 200, answer.text

        review(first, verdict="accept")
        review(first, verdict="reject", comment="changed my mind")
        review(second, edits={"chosen": "Better."}, preferred="rejected")
        review(third, preferred="tie", ratings={"chosen": {"helpfulness": 3, "verbosity": 0}})
        run = client.get("/api/run").json()
        assert (run["reviewed"], run["accepted"], run["rejected"]) == (3, 0, 1)
        assert run["agreement"] == {"agree": 0, "disagree": 1, "tie": 1}
        assert [row["id"] for row in all_rows(client, stage="judge", state="rejected")] == [first.hex()]
        assert len(all_rows(client, stage="judge", state="open")) == len(rest)
    folder = export(bench.folder, made).folder
    pairs = {pair.id: pair for pair in read(folder / "preference.jsonl", PreferencePair)}
    assert set(pairs) == {record.hex() for record in (second, third, *rest)}
    assert pairs[second.hex()].chosen == "Better."
    [preferred] = read(folder / "human_preference.jsonl", PreferencePair)
    assert preferred.chosen == content[second]["rejected"]["text"]
    assert preferred.meta["judge_agrees"] is False
    [rated] = read(folder / "human_reward.jsonl", RewardSample)
    assert rated.attributes == {"helpfulness": 3.0, "verbosity": 0.0}
    assert rated.messages[-1].content == content[third]["chosen"]["text"]
    counted = {"reviewed": 3, "left_out": 1, "corrected": 1}
    assert json.loads((folder / "accounting.json").read_text())["reviews"] == counted
    assert "1 were rejected and left out" in (folder / "README.md").read_text()


def test_a_review_is_saved_while_a_run_holds_the_ledger(bench: Bench, made: SynthRecipe) -> None:
    record = next(iter(bench.rows("judge")))
    ledger = Ledger(bench.folder / "ledger.sqlite")
    try:
        notes = NoteBook(bench.folder / "ledger.sqlite")
        notes.add(record, {"annotator": "ada", "verdict": "accept"})
        notes.close()
        assert [value["verdict"] for _, _, value in ledger.notes()] == ["accept"]
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "'annotator' is empty"),
        ({"annotator": "a", "verdict": "maybe"}, "'verdict' is 'maybe'; expected accept, reject or null"),
        ({"annotator": "a", "ratings": {"chosen": {"helpfulness": 5}}}, "helpfulness is 5; expected 0 to 4"),
        ({"annotator": "a", "ratings": {"chosen": {"humor": 1}}}, "expected some of helpfulness"),
        ({"annotator": "a", "edits": {"left": "x"}}, "expected an object with chosen and rejected"),
        ({"annotator": "a", "verdit": "accept"}, "no field 'verdit'"),
        ([], "a review is an object"),
    ],
)
def test_a_wrong_review_is_refused_by_field(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Review.parse(value, at=0.0)


def test_another_page_can_neither_read_nor_write(bench: Bench, made: SynthRecipe) -> None:
    record = next(iter(bench.rows("judge"))).hex()
    path, review = f"/api/rows/{record}/review", {"annotator": "eve", "verdict": "reject"}
    with serving(bench.folder) as client:
        assert client.get("/api/run", headers={"Host": "evil.example"}).status_code == 400
        foreign = {"Origin": "http://evil.example"}
        assert client.post(path, json=review, headers=foreign).status_code == 403
        form = {"Content-Type": "text/plain"}
        assert client.post(path, content=json.dumps(review), headers=form).status_code == 415
        pieces = (b" " * 100_000 for _ in range(21))  # more than the limit, and no length told before
        endless = client.post(path, content=pieces, headers={"Content-Type": "application/json"})
        assert endless.status_code == 413
        assert client.get("/web/../app.py").status_code == 404
        row = client.get(f"/api/rows/{record}")
        assert row.json()["reviews"] == []
        assert row.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def test_a_person_reviews_by_keyboard(
    browser: Browser, bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = recipe(export=EXPORT)
    bench.run(made)
    with serving(bench.folder) as client:
        browser.open(str(client.base_url))
        browser.until(lambda: len(browser.find_all("#rows tr")) > 4, "rows are listed")
        browser.press("j")
        browser.wait_for(".answer h3", text="the judge's choice")
        browser.press("a")
        browser.wait_for("#problem", text="Say who you are first")
        browser.fill("#annotator", "ada")
        browser.press(TAB)
        browser.press("a")
        browser.wait_for("#rows tr[aria-current=true] .accepted", text="accepted")
        browser.press("j")
        browser.press("2")  # for the row that is still coming
        browser.wait_for("#progress", text="2 reviewed")
        browser.wait_for(".answer.preferred h3", text="Right")
        browser.click("[aria-label='Left: helpfulness 4']")
        browser.until(lambda: browser.find_all(".ratings button[aria-pressed=true]"), "the rating is shown")
        browser.click("#edit")
        browser.press(SELECT_ALL, "<script>window.hacked = 1</script>", ESCAPE)
        browser.wait_for(".answer h3", text="(edited)")
        browser.click("#edit")
        browser.wait_for(".answer .text", text="<script>window.hacked = 1</script>")
        assert browser.run("return window.hacked") is None
        assert browser.problems() == []
        browser.screenshot(tmp_path / "review.png")
        browser.driver.refresh()
        browser.wait_for("#progress", text="2 reviewed, 1 accepted")
        browser.wait_for(".answer h3", text="(edited)")  # the address names the row
        browser.click("#blind")
        browser.press("j")
        browser.until(lambda: not browser.find_all(".bars"), "a blind reviewer sees no scores")
        reviews = [
            each for row in all_rows(client, stage="judge")
            for each in client.get(f"/api/rows/{row['id']}").json()["reviews"]
        ]  # fmt: skip
    assert sorted(str(each["verdict"]) for each in reviews) == ["None", "accept"]
    [labelled] = [each for each in reviews if each["preferred"]]
    assert list(labelled["edits"].values()) == ["<script>window.hacked = 1</script>"]
    assert time.time() - labelled["at"] < 600


@pytest.mark.slow
def test_the_page_has_no_serious_accessibility_problem(
    browser: Browser, bench: Bench, made: SynthRecipe
) -> None:
    with serving(bench.folder) as client:
        for dark in (False, True):
            browser.open(str(client.base_url), dark=dark)
            browser.until(lambda: len(browser.find_all("#rows tr")) > 4, "rows are listed")
            browser.press("j")
            browser.wait_for(".answer h3", text="the judge's choice")
            assert browser.accessibility_problems() == []
