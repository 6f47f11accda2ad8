"""The review page: its interface over HTTP, what its labels do to an export, and the page in a browser."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from nemotron4.records import PreferencePair, RewardSample, read
from nemotron4.synth.export import export
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.review import create_app, open_reviews
from nemotron4.synth.writer import Ledger
from tests.browser import Browser
from tests.synth.conftest import Bench

MakeRecipe = Callable[..., SynthRecipe]
TAB, ESCAPE, SELECT_ALL = "\ue004", "\ue00c", "\ue009a\ue000"  # as WebDriver spells keys
EXPORT = {"preference": ["judge"], "sft": ["judge"], "prompts": ["dedup"]}


def app_token(folder: Path) -> str:
    reviews = open_reviews(folder)
    assert reviews is not None
    with reviews:
        return reviews.token()


def say(client: httpx.Client, record: bytes, answer: str = "", *, by: str = "ada", **values: object) -> None:
    row = {"annotator": by, "answer": answer, "values": values}
    answered = client.post(f"api/items/{record.hex()}/judgments", json=row)
    assert answered.status_code == 200, answered.text


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[httpx.Client]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(folder), ws="none", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}/{app_token(folder)}/"
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
        page = client.get("api/items", params={**query, "after": after}).json()
        found += page["rows"]
        after = page["after"]
    return found


def test_pages_hold_every_row_of_every_stage_once(bench: Bench, made: SynthRecipe) -> None:
    with serving(bench.folder) as client:
        run = client.get("api/study").json()
        listed = [row["id"] for row in all_rows(client)]
        assert run["groups"][0]["name"] == "judge"
        assert len(listed) == len(set(listed)) == sum(group["items"] for group in run["groups"]) > 50
        judged = all_rows(client, group="judge")
        assert {row["id"] for row in judged} == {record.hex() for record in bench.rows("judge")}
        word = judged[0]["title"].split()[-1]
        found = all_rows(client, group="judge", search=word.upper())
        assert judged[0]["id"] in {row["id"] for row in found}
        assert all_rows(client, group="judge", search=judged[0]["id"][:12])[0] == judged[0]
        assert all_rows(client, search="nothing says this") == []


def test_a_row_tells_its_answers_and_where_it_comes_from(bench: Bench, made: SynthRecipe) -> None:
    record, content = next(iter(bench.rows("judge").items()))
    with serving(bench.folder) as client:
        row = client.get(f"api/items/{record.hex()}").json()
    chosen, rejected = row["answers"]
    assert chosen["text"] == content["chosen"]["text"]
    assert rejected["facts"]["reward"] == "0.00"
    stages = [summary.split()[0] for summary, _ in row["further"]]
    assert stages == ["root:macro", "macro", "sub", "open", "dedup", "respond", "judge"]
    assert row["judgments"] == []


def test_reviews_shape_the_export_and_become_labels(bench: Bench, made: SynthRecipe) -> None:
    first, second, third, *rest = sorted(bench.rows("judge"))
    content = bench.rows("judge")
    with serving(bench.folder) as client:
        say(client, first, verdict="accept")
        say(client, first, verdict="reject", comment="changed my mind")
        say(client, second, preferred="rejected")
        say(client, second, "chosen", edit="Better.")
        say(client, third, preferred="tie")
        say(client, third, "chosen", helpfulness=3, verbosity=0)
        say(client, third, "chosen", by="bob", helpfulness=4)
        study = client.get("api/study").json()
        assert study["progress"]["by_annotator"] == {"ada": 3, "bob": 1}
        figures = client.get("api/report").json()["figures"]
        assert figures["with_the_judge"] == {"agree": 0, "disagree": 1, "tie": 1}
        rejected = all_rows(client, group="judge", state="verdict=reject")
        assert [row["id"] for row in rejected] == [first.hex()]
        assert [row["id"] for row in all_rows(client, group="judge", state="differ")] == [third.hex()]
        assert len(all_rows(client, group="judge", state="mine", annotator="bob")) == len(rest) + 2
        assert [row["id"] for row in all_rows(client, state="edit=*")] == [second.hex()]
    folder = export(bench.folder, made).folder
    pairs = {pair.id: pair for pair in read(folder / "preference.jsonl", PreferencePair)}
    assert set(pairs) == {record.hex() for record in (second, third, *rest)}
    assert pairs[second.hex()].chosen == "Better."
    [preferred] = read(folder / "human_preference.jsonl", PreferencePair)
    assert preferred.chosen == content[second]["rejected"]["text"]
    assert preferred.meta["judge_agrees"] is False
    [rated] = read(folder / "human_reward.jsonl", RewardSample)
    assert rated.attributes == {"helpfulness": 3.5, "verbosity": 0.0}  # the mean of those who rated it
    assert rated.meta["annotators"]["bob"] == {"helpfulness": 4}
    assert rated.messages[-1].content == content[third]["chosen"]["text"]
    counted = {"reviewed": 3, "left_out": 1, "corrected": 1}
    assert json.loads((folder / "accounting.json").read_text())["reviews"] == counted
    assert "1 were rejected and left out" in (folder / "README.md").read_text()


def test_a_review_is_saved_while_a_run_holds_the_ledger(bench: Bench, made: SynthRecipe) -> None:
    record = next(iter(bench.rows("judge")))
    ledger = Ledger(bench.folder / "ledger.sqlite")
    try:
        reviews = open_reviews(bench.folder)
        assert reviews is not None
        with reviews:
            reviews.say(record.hex(), "ada", {"verdict": "accept"})
            assert [each.values["verdict"] for each in reviews.judgments()] == ["accept"]
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"values": {}}, "annotator is 'None'"),
        ({"annotator": "a", "values": {"verdict": "maybe"}}, "unknown verdict 'maybe'"),
        ({"annotator": "a", "answer": "chosen", "values": {"helpfulness": 5}}, "helpfulness is 5; expected"),
        ({"annotator": "a", "answer": "chosen", "values": {"humor": 1}}, "unknown question 'humor'"),
        ({"annotator": "a", "answer": "left", "values": {"edit": "x"}}, "its answers are: chosen, rejected"),
        ({"annotator": "a", "verdit": "accept"}, "no field 'verdit'"),
        ({"annotator": "a", "values": []}, "values is not an object"),
    ],
)
def test_a_wrong_review_is_refused_by_field(
    bench: Bench, made: SynthRecipe, value: object, message: str
) -> None:
    with serving(bench.folder) as client:
        answer = client.post(f"api/items/{next(iter(bench.rows('judge'))).hex()}/judgments", json=value)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_another_page_can_neither_read_nor_write(bench: Bench, made: SynthRecipe) -> None:
    record = next(iter(bench.rows("judge"))).hex()
    path, review = f"api/items/{record}/judgments", {"annotator": "eve", "values": {"verdict": "reject"}}
    with serving(bench.folder) as client:
        assert client.get("api/study", headers={"Host": "evil.example"}).status_code == 400
        root = str(client.base_url).split("/")
        assert httpx.get(f"http://{root[2]}/").status_code == 404  # without the token nothing is there
        assert httpx.get(f"http://{root[2]}/api/study").status_code == 404
        assert httpx.get(f"http://{root[2]}/guessed/api/study").status_code == 404
        foreign = {"Origin": "http://evil.example"}
        assert client.post(path, json=review, headers=foreign).status_code == 403
        form = {"Content-Type": "text/plain"}
        assert client.post(path, content=json.dumps(review), headers=form).status_code == 415
        pieces = (b" " * 100_000 for _ in range(21))  # more than the limit, and no length told before
        endless = client.post(path, content=pieces, headers={"Content-Type": "application/json"})
        assert endless.status_code == 413
        assert client.get("web/../app.py").status_code == 404
        row = client.get(f"api/items/{record}")
        assert row.json()["judgments"] == []
        assert row.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in client.get("").headers["content-security-policy"]


def test_a_person_reviews_by_keyboard(
    browser: Browser, bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = recipe(export=EXPORT)
    bench.run(made)
    with serving(bench.folder) as client:
        browser.open(str(client.base_url))
        browser.until(lambda: len(browser.find_all(".items li")) > 4, "rows are listed")
        browser.press("j")
        browser.wait_for(".answer h3", text="the judge's choice")
        browser.press("a")
        browser.wait_for(".problem", text="Say who you are first")
        browser.fill("#annotator", "ada")
        browser.press(TAB)
        browser.press(ESCAPE)
        browser.press("a")
        browser.wait_for(".items li[aria-current=true] .accept", text="accept")
        browser.press("j")
        browser.press("2")  # for the row that is still coming
        browser.wait_for(".progress", text="2 of")
        browser.wait_for(".answer.preferred h3", text="Right")
        browser.click("[aria-label^='Left: helpfulness 4']")
        browser.until(
            lambda: browser.find_all(".answer .scale button[aria-pressed=true]"), "the rating is shown"
        )
        browser.click(".answer .edit")
        browser.press(SELECT_ALL, "<script>window.hacked = 1</script>", ESCAPE)
        browser.wait_for(".answer h3", text="(edited)")
        browser.click(".answer .edit")
        browser.wait_for(".answer .text", text="<script>window.hacked = 1</script>")
        assert browser.run("return window.hacked") is None
        assert browser.problems() == []
        browser.screenshot(tmp_path / "review.png")
        browser.driver.refresh()
        browser.wait_for(".progress", text="2 of")
        browser.wait_for(".answer h3", text="(edited)")  # the address names the row
        browser.click("#hide-scores")
        browser.press("j")
        browser.until(lambda: not browser.find_all(".bars"), "a blind reviewer sees no scores")
        said = [
            each
            for row in all_rows(client, group="judge")
            for each in client.get(f"api/items/{row['id']}").json()["judgments"]
        ]
    assert [each["values"]["verdict"] for each in said if "verdict" in each["values"]] == ["accept"]
    assert [each["values"]["edit"] for each in said if each["answer"] and "edit" in each["values"]] == [
        "<script>window.hacked = 1</script>"
    ]
    assert len([each for each in said if "preferred" in each["values"]]) == 1


def opened_by_ada(browser: Browser, client: httpx.Client) -> str:
    """The first row on the page; its id."""
    browser.open(str(client.base_url))
    browser.fill("#annotator", "ada")
    browser.press(TAB)
    browser.click(".items li button")
    browser.wait_for(".answer h3", text="the judge's choice")
    return str(browser.run("return location.hash.slice(1)"))


def test_two_annotators_see_each_other_at_once(browser: Browser, bench: Bench, made: SynthRecipe) -> None:
    with serving(bench.folder) as client:
        shown = opened_by_ada(browser, client)
        say(client, bytes.fromhex(shown), by="bob", verdict="reject")
        browser.wait_for(".others", text="bob: verdict reject")
        browser.wait_for(".items li[aria-current=true] .reject", text="reject")
        browser.click("button.report")
        browser.wait_for(".verdict", text="1 rows are reviewed: 0 accepted, 1 rejected")
        assert browser.problems() == []


def test_what_is_said_while_the_server_is_away_is_sent_when_it_is_back(
    browser: Browser, bench: Bench, made: SynthRecipe
) -> None:
    away = """window.fetched = window.fetch;
        window.fetch = (url, options) => options ? Promise.reject(new TypeError()) : window.fetched(url);"""
    with serving(bench.folder) as client:
        shown = opened_by_ada(browser, client)
        browser.run(away)
        browser.click(".answer .edit")
        browser.press(SELECT_ALL, "better words", ESCAPE)
        browser.wait_for(".problem", text="does not answer")
        browser.press("j")
        browser.until(lambda: browser.run("return location.hash.slice(1)") != shown, "another item is open")
        browser.press("k")
        browser.wait_for(".answer h3", text="(edited)")
        browser.wait_for(".answer .text", text="better words")
        browser.run("window.fetch = window.fetched")
        said = lambda: client.get(f"api/items/{shown}").json()["judgments"]  # noqa: E731
        browser.until(lambda: said() and said()[0]["values"]["edit"] == "better words", "it is stored")


@pytest.mark.slow
def test_the_page_has_no_serious_accessibility_problem(
    browser: Browser, bench: Bench, made: SynthRecipe
) -> None:
    with serving(bench.folder) as client:
        for dark in (False, True):
            browser.open(str(client.base_url), dark=dark)
            browser.until(lambda: len(browser.find_all(".items li")) > 4, "rows are listed")
            browser.press("j")
            browser.wait_for(".answer h3", text="the judge's choice")
            assert browser.accessibility_problems() == []
