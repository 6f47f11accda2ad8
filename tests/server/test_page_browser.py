"""The page in a real browser, over the shipped fake engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.fake_tokenizer import FakeTokenizer
from nemotron4.records import ATTRIBUTES, parse_messages
from nemotron4.redteam.session_report import page_tab
from nemotron4.redteam.sessions import SessionStore
from nemotron4.server.page import PageTab
from nemotron4.server.settings import RemoteServer, ServerSettings
from nemotron4.text.prompt import nemotron4
from tests.browser import PHONE, Browser, Keys
from tests.server.conftest import Running, serving, serving_app

EVIL = """<script>window.stolen = 1</script><img src=x onerror="window.stolen = 2">
[link](javascript:window.stolen=3) **bold**

```html
<svg onload="window.stolen = 4"></svg>
```"""

RICH = r"""| planet | moons |
|:---|---:|
| Mars | 2 |

Euler: $e^{i\pi} + 1 = 0$, a price of $5 and $6, and

$$\sum_{k=1}^n k = \frac{n(n+1)}{2}$$

- [x] done
- [ ] open
  1. inner
     ```python
     def f(x):
         return "x" * 2
     ```

A [link](https://example.com/a) and ![a cat](https://example.com/cat.png).
"""

DOCS_ANSWER = """Both are **camelids** of the Andes:

| | alpaca | llama |
|---|---|---|
| weight | 48 to 90 kg | 130 to 200 kg |
| kept for | wool | carrying loads |

They live in herds and hum to each other."""


# A conversation of these answers in the page's own store.
SEED = """
const [texts, done] = arguments;
Promise.all([import("./web/store.js"), import("./web/conversation.js")]).then(async ([store, model]) => {
  const lane = model.newLane("fake-a");
  const conversation = model.newConversation([lane]);
  for (const text of texts) {
    const turn = model.newTurn("question", 1);
    turn.lanes[0] = { answers: [{ ...model.newAnswer(lane), text, finish: "stop" }], shown: 0 };
    conversation.turns.push(turn);
  }
  await store.put(conversation);
  done();
});
"""
# Milliseconds between frames, and of every task that the browser calls long.
WATCH = """
window.frames_ms = []; window.tasks_ms = [];
const note = (list) => tasks_ms.push(...list.getEntries().map((e) => e.duration));
new PerformanceObserver(note).observe({ type: "longtask" });
let last = performance.now();
const next = (now) => { frames_ms.push(now - last); last = now; requestAnimationFrame(next); };
requestAnimationFrame(next);
"""


def _answers(prompt: str) -> str:
    """By what the last turn asks for."""
    asked = prompt.rpartition("<extra_id_1>User\n")[2]
    if "evil" in asked:
        return EVIL
    if "rich" in asked:
        return RICH
    if "long" in asked:
        return "word " * 300
    return f"You said: {asked.partition(chr(10))[0]}"


@pytest.fixture(scope="module")
def chat() -> Iterator[Running]:
    """A chat model that takes its time over each token."""
    with serving(FakeEngine(_answers, name="fake-a", delay_s=0.004, prompt_format=nemotron4())) as running:
        yield running


def _open(browser: Browser, running: Running, **options: Any) -> None:
    browser.open(running.url, **options)
    browser.wait_for("#model.ready", text=running.engine.info.name)  # buttons work from then on


def _say(browser: Browser, text: str) -> None:
    browser.fill("#prompt", text)
    browser.press(Keys.ENTER)


def test_a_conversation_streams_can_be_edited_repeated_kept_and_exported(
    browser: Browser, chat: Running
) -> None:
    _open(browser, chat)
    _say(browser, "a long answer please")
    seen = browser.until(lambda: browser.text(".answer .text"), "the first words")
    assert browser.find_all("#stop")
    browser.until(lambda: len(browser.text(".answer .text")) > len(seen), "more words")
    browser.press(Keys.ESCAPE)
    browser.wait_gone("#stop")
    browser.wait_for(".answer .note", text="stopped by you")
    chat.wait_idle()  # the server has stopped too
    assert len(browser.text(".answer .text")) < len("word " * 300)

    browser.run("document.querySelector('[aria-label=\"Edit message\"]').click()")
    browser.fill("form.editing textarea", "hello")
    browser.click("form.editing .primary")
    browser.wait_for(".answer .text", text="You said: hello")
    browser.wait_gone("#stop")
    browser.click("[aria-label='Answer again']")
    browser.wait_for(".versions", text="2 of 2")
    _say(browser, "and more")
    browser.wait_for(".turn:nth-child(2) .text", text="You said: and more")
    browser.wait_gone("#stop")

    browser.driver.refresh()
    browser.wait_for(".turn:nth-child(2) .answer .text", text="You said: and more")
    assert [each.text for each in browser.find_all("#conversations .title")] == ["hello"]
    browser.choose(".export select", "jsonl")
    [line] = browser.downloaded().read_text(encoding="utf-8").splitlines()
    messages = parse_messages(json.loads(line), "messages")
    assert [message.content for message in messages] == [
        "hello",
        "You said: hello",
        "and more",
        "You said: and more",
    ]
    assert browser.problems() == []


def test_what_a_model_writes_stays_text(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    _say(browser, "evil <b>markup</b>")
    browser.wait_for(".answer pre", text='<svg onload="window.stolen = 4"></svg>')
    browser.wait_gone("#stop")
    assert browser.text(".user .text") == "evil <b>markup</b>"
    assert "<script>window.stolen = 1</script>" in browser.text(".answer .text")
    assert browser.text(".answer strong") == "bold"
    assert browser.run("return document.querySelectorAll('.answer :is(script, img, a), .user b').length") == 0
    assert browser.run("return window.stolen ?? null") is None
    refused = browser.run(
        "try { document.body.innerHTML = '<p>x</p>'; return 'parsed' } catch (e) { return e.name }"
    )
    assert refused == "TypeError"  # trusted types: no later line of this page can parse HTML either


def test_settings_have_the_bounds_of_the_api_and_change_the_request(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.click("#show-settings")
    bounds = browser.run(
        "const f = document.getElementById('field-temperature'); return [f.min, f.max, f.placeholder]"
    )
    assert bounds == ["0", "2", "1"]
    browser.fill("#field-temperature", "3")
    assert browser.text("#field-temperature-note") == "must be at most 2"
    browser.fill("#field-temperature", "0")
    browser.fill("#field-max_tokens", "7")
    browser.fill("#system", "Be kind.")
    _say(browser, "hello there")
    browser.wait_for(".answer .note", text="7 tokens")
    assert browser.text(".answer .text") == "You sai"
    browser.click("[aria-label^='Copy as']")
    browser.find("#snippets")
    shown = {}
    for number, name in enumerate(("curl", "Python", "call JSON"), start=1):
        browser.click(f"#snippets [role=tab]:nth-child({number})")
        shown[name] = browser.text("#snippet")
    assert "-X POST" in shown["curl"]
    assert '"max_tokens":7' in shown["curl"]
    compile(shown["Python"], "snippet", "exec")
    call = json.loads(shown["call JSON"])
    assert call["sentences"] == [
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nhello there\n<extra_id_1>Assistant\n"
    ]
    assert (call["tokens_to_generate"], call["greedy"]) == (7, True)
    assert chat.client.put("/generate", json=call).json()["sentences"][0].endswith("You sai")


def test_token_probabilities_show_alternatives_by_mouse_and_keys(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.click("#show-settings")
    browser.click("#probabilities")
    _say(browser, "hello é")
    browser.wait_for(".answer .note", text="tokens")
    assert browser.text(".tokens") == "You said: hello é"
    browser.click(".token:nth-child(3)")
    browser.wait_for("#token-detail", text="100 %")
    assert len(browser.find_all("#token-detail li")) == 5
    browser.press(Keys.ARROW_RIGHT)
    assert browser.run("return document.getElementById('status').textContent") == "·, 100 %"
    browser.press(Keys.ESCAPE)
    browser.wait_gone("#token-detail")


def test_markdown_has_tables_formulas_links_tasks_and_code_that_copies(
    browser: Browser, chat: Running
) -> None:
    _open(browser, chat)
    _say(browser, "rich text")
    browser.wait_for(".answer .note", text="tokens")
    assert [each.text for each in browser.find_all(".answer td")] == ["Mars", "2"]
    browser.until(lambda: len(browser.find_all(".answer .math .katex")) == 2, "both formulas are drawn")
    assert "a price of $5 and $6" in browser.text(".answer .text")
    boxes = browser.find_all(".answer li.task input")
    assert [each.is_selected() for each in boxes] == [True, False]
    assert browser.text(".answer li li .code pre") == 'def f(x):\n    return "x" * 2'
    browser.until(lambda: browser.find_all(".code .hl-keyword"), "code has colours")
    link = browser.find(".answer a[href='https://example.com/a']")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == (
        "_blank",
        "noopener noreferrer nofollow",
    )
    assert not browser.find_all(".answer img")
    assert browser.text(".answer a[href$='cat.png']") == "[image: a cat]"
    heard = browser.run("return document.getElementById('status').textContent")
    assert "Mars 2" in heard  # read aloud as it is drawn, without marks
    assert not [mark for mark in ("|", "```", "](", "- [") if mark in heard]
    assert browser.problems() == []


@pytest.mark.slow
def test_token_colours_keep_the_markdown(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.click("#show-settings")
    browser.click("#probabilities")
    _say(browser, "rich text")
    browser.wait_for(".answer .note", text="tokens")
    assert [each.text for each in browser.find_all(".answer td")] == ["Mars", "2"]
    assert "".join(each.text for each in browser.find_all(".answer td .token")) == "Mars2"
    code = browser.run("return document.querySelector('.answer pre code').textContent")
    assert code == 'def f(x):\n    return "x" * 2'
    browser.click("[aria-label='Save the token probabilities']")
    saved = json.loads(browser.downloaded().read_text(encoding="utf-8"))
    assert "".join(token["text"] for token in saved) == RICH.rstrip()


def test_a_page_closed_while_it_streams_loses_nothing(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.fill("#prompt", "half a thou")
    browser.wait_for("#conversations .title", text="half a thou")
    browser.driver.refresh()
    browser.until(lambda: browser.find("#prompt").get_attribute("value") == "half a thou", "the draft")
    browser.fill("#prompt", "a long answer please")
    browser.press(Keys.ENTER)
    browser.until(lambda: len(browser.text(".answer .text")) > 400, "a part of the answer")
    browser.driver.refresh()
    browser.wait_for(".answer .note", text="interrupted")
    assert browser.text(".answer .text").startswith("word word")
    browser.click(".answer .actions .quiet")
    browser.wait_for(".versions", text="2 of 2")
    browser.wait_gone("#stop")


@pytest.mark.slow
def test_edits_and_new_answers_are_versions_with_what_followed_them(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    for text in ("one", "two", "three"):
        _say(browser, text)
        browser.wait_for(".turn:last-child .answer .text", text=f"You said: {text}")
        browser.wait_gone("#stop")
    browser.run("document.querySelectorAll('[aria-label=\"Edit message\"]')[1].click()")
    browser.fill("form.editing textarea", "zwei")
    browser.click("form.editing .primary")
    browser.wait_for(".turn:nth-child(2) .answer .text", text="You said: zwei")
    browser.wait_gone("#stop")
    said = lambda: [each.text for each in browser.find_all(".user .text")]  # noqa: E731
    assert said() == ["one", "zwei"]
    browser.click(".user [aria-label='Version before']")
    browser.until(lambda: said() == ["one", "two", "three"], "the first version")
    browser.driver.refresh()
    browser.until(lambda: said() == ["one", "two", "three"], "it is kept")
    browser.run("document.querySelector('[aria-label=\"Answer again\"]').click()")
    browser.until(lambda: said() == ["one"], "a new answer to the first turn")
    browser.wait_gone("#stop")
    browser.click(".user [aria-label='Version before']")
    browser.until(lambda: said() == ["one", "two", "three"], "what followed the old answer")
    browser.click(".turn:nth-child(2) .user [aria-label='Next version']")
    browser.until(lambda: said() == ["one", "zwei"], "a version inside a version")


@pytest.mark.slow
def test_two_tabs_on_one_conversation_are_merged_by_turn(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    _say(browser, "start")
    browser.wait_for(".answer .text", text="You said: start")
    browser.wait_gone("#stop")
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    try:
        browser.driver.get(chat.url)
        browser.wait_for(".answer .text", text="You said: start")
        _say(browser, "from the second tab")
        browser.wait_for(".turn:last-child .answer .text", text="You said: from the second tab")
        browser.wait_gone("#stop")
        browser.driver.switch_to.window(first)
        _say(browser, "from the first tab")
        browser.wait_for(".turn:last-child .answer .text", text="You said: from the first tab")
        browser.wait_for(".user .versions", text="1 of 2")
        browser.click(".user [aria-label='Next version']")
        browser.wait_for(".turn:last-child .answer .text", text="You said: from the second tab")
    finally:
        for handle in browser.driver.window_handles:
            if handle != first:
                browser.driver.switch_to.window(handle)
                browser.driver.close()
        browser.driver.switch_to.window(first)


FAIL_ONCE = """
const real = window.fetch;
window.fetch = (...asked) => {
  if (!String(asked[0]).includes("completions")) return real(...asked);
  window.fetch = real;
  return Promise.reject(new TypeError("refused"));
};
"""


def test_a_failed_answer_is_marked_retried_and_neither_sent_nor_exported(
    browser: Browser, chat: Running
) -> None:
    _open(browser, chat)
    _say(browser, "first")
    browser.wait_for(".answer .text", text="You said: first")
    browser.wait_gone("#stop")
    browser.run(FAIL_ONCE)
    _say(browser, "lost")
    browser.wait_for(".turn:nth-child(2) .note.alert", text="does not answer")
    _say(browser, "third")
    browser.wait_for(".turn:nth-child(3) .answer .text", text="You said: third")
    browser.wait_gone("#stop")
    browser.choose(".export select", "jsonl")
    [line] = browser.downloaded().read_text(encoding="utf-8").splitlines()
    contents = [message["content"] for message in json.loads(line)["messages"]]
    assert contents == ["first", "You said: first", "third", "You said: third"]
    browser.click(".turn:nth-child(2) .actions .quiet")
    browser.wait_for(".turn:nth-child(2) .answer .text", text="You said: lost")


def test_conversations_are_found_renamed_imported_and_come_back_when_deleted(
    browser: Browser, chat: Running, tmp_path: Path
) -> None:
    rows = tmp_path / "talks.jsonl"
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
    ]
    rows.write_text(
        "".join(json.dumps({"messages": each}) + "\n" for each in (talk, talk[1:])), encoding="utf-8"
    )
    _open(browser, chat)
    browser.driver.find_element("id", "import-file").send_keys(str(rows))
    browser.wait_for("#toast", text="2 conversations imported")
    browser.wait_for(".answer .text", text="a1")
    browser.run("document.querySelector('[aria-label^=\"Rename\"]').click()")
    browser.press(Keys.CONTROL, "a")
    browser.press("Kindness", Keys.ENTER)
    titles = lambda: [each.text for each in browser.find_all("#conversations .title")]  # noqa: E731
    browser.until(lambda: sorted(titles()) == ["Kindness", "q1"], "the new title")
    browser.fill("#search", "kindn")
    browser.until(lambda: titles() == ["Kindness"], "the one that was sought")
    browser.find("#search").clear()
    browser.press(Keys.BACKSPACE)
    browser.run("document.querySelector('[aria-label=\"Delete: Kindness\"]').click()")
    browser.until(lambda: titles() == ["q1"], "it is gone")
    browser.click("#toast button")
    browser.until(lambda: sorted(titles()) == ["Kindness", "q1"], "it is back")
    rows.write_text("no json", encoding="utf-8")
    browser.driver.find_element("id", "import-file").send_keys(str(rows))
    browser.wait_for("#toast", text="was not imported. Line 1 is not JSON.")


@pytest.mark.slow
def test_a_wrong_setting_is_not_sent_and_the_arrow_edits_the_last_message(
    browser: Browser, chat: Running
) -> None:
    _open(browser, chat)
    browser.click("#show-settings")
    assert browser.find("#field-temperature").get_attribute("value") == "0.7"
    browser.fill("#field-temperature", "3")
    _say(browser, "hello")
    assert not browser.find_all(".turn")
    assert browser.find("#prompt").get_attribute("value") == "hello"
    browser.fill("#field-temperature", "0")
    browser.click("#send")
    browser.wait_for(".answer .text", text="You said: hello")
    browser.wait_gone("#stop")
    browser.click("#prompt")
    browser.press(Keys.ARROW_UP)
    assert browser.find("form.editing textarea").get_attribute("value") == "hello"


@pytest.mark.slow
def test_a_narrow_window_closes_the_panels_and_shows_the_model(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.click("#show-settings")
    assert browser.find_all("#list")
    width, height = PHONE
    browser.command(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
    )
    browser.wait_gone("#list")
    assert not browser.find_all("#settings")
    assert "fake-a" in browser.text("#model")
    browser.command(
        "Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False
    )
    browser.find("#list")
    browser.find("#settings")


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_and_found_again(browser: Browser, chat: Running) -> None:
    _open(browser, chat)
    browser.run("window.real = fetch; window.fetch = () => Promise.reject(new TypeError('gone'))")
    browser.wait_for("#model.gone", text="no answer, trying again")
    browser.run("window.fetch = window.real")
    browser.wait_for("#model.ready", text="fake-a")


async def _score(request: Request) -> JSONResponse:
    messages = json.loads(await request.body())["messages"]
    attributes = dict.fromkeys(ATTRIBUTES, 2.0) | {"helpfulness": float(len(messages))}
    return JSONResponse({"attributes": attributes, "reward": 1.25, "raw": []})


def test_two_models_answer_side_by_side_and_a_reward_model_judges_both(
    browser: Browser, chat: Running
) -> None:
    first = FakeEngine("from the first", name="fake-b", prompt_format=nemotron4())
    with serving_app(Starlette(routes=[Route("/score", _score, methods=["POST"])])) as reward_url:
        settings = ServerSettings(compare_with=RemoteServer(chat.url), reward_model=RemoteServer(reward_url))
        with serving(first, settings) as running:
            _open(browser, running)
            browser.click("#compare")
            _say(browser, "hello")
            browser.wait_for(".answer:nth-child(1) .text", text="from the first")
            browser.wait_for(".answer:nth-child(2) .text", text="You said: hello")
            names = [each.text.split()[:2] for each in browser.find_all(".answer h3")]
            assert names == [["A", "fake-b"], ["B", "fake-a"]]
            lefts = [each.rect["x"] for each in browser.find_all(".answer")]
            assert lefts[0] < lefts[1]
            for number in (1, 2):
                browser.wait_for(f".answer:nth-child({number}) .score", text="Reward 1.25")
                browser.click(f".answer:nth-child({number}) .score summary")
                shown = browser.text(f".answer:nth-child({number}) .score dl").split()
                assert shown[:4] == ["helpfulness", "2.00", "correctness", "2.00"]
            assert browser.problems() == []


@pytest.mark.slow
def test_raw_prompts_start_with_the_card_s_template(browser: Browser, chat: Running) -> None:
    browser.open(f"{chat.url}/#raw")
    browser.until(
        lambda: browser.run("return document.getElementById('raw-prompt')?.value ?? ''"), "the template"
    )
    browser.press("hello")  # typed over the card's question, which is selected
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.wait_for(".raw-output .text", text="You said: hello")
    assert browser.problems() == []


def test_a_raw_prompt_can_be_held_to_a_schema_and_its_tokens_saved(browser: Browser) -> None:
    with serving(FakeEngine(None, name="free", prompt_format=nemotron4())) as running:
        browser.open(f"{running.url}/#raw")
        browser.wait_for("#model.ready", text="free")
        browser.click("#show-settings")
        browser.fill("#schema", '{"enum": [')
        browser.click(".raw .primary")
        assert not browser.find_all(".raw-output .actions")  # a wrong setting is not sent
        browser.fill("#schema", '{"enum": ["red", "blue"]}')
        browser.click(".raw .primary")
        answer = browser.until(lambda: browser.text(".raw-output .text .tokens"), "an answer")
        assert json.loads(answer) in ("red", "blue")
        browser.click("[aria-label='Save the token probabilities']")
        saved = json.loads(browser.downloaded().read_text(encoding="utf-8"))
        assert json.loads("".join(token["text"] for token in saved)) in ("red", "blue")
        assert all(token["logprob"] <= 0 for token in saved)
        browser.run(
            "[...document.querySelectorAll('.raw button')].find(b => /Copy as/.test(b.textContent)).click()"
        )
        assert "POST " in browser.text("#snippet")
        assert "v1/completions" in browser.text("#snippet")
        assert browser.problems() == []


def test_the_page_asks_for_the_key_and_forgets_it_with_the_tab(browser: Browser) -> None:
    engine = FakeEngine(_answers, name="locked", prompt_format=nemotron4())
    with serving(engine, ServerSettings(api_keys=("the-key",))) as running:
        browser.open(running.url)
        browser.fill("#key", "wrong")
        browser.press(Keys.ENTER)
        browser.wait_for("#ask-key-wrong", text="not accepted")
        browser.fill("#key", "the-key")
        browser.press(Keys.ENTER)
        browser.wait_for("#model-name", text="locked")
        _say(browser, "hello")
        browser.wait_for(".answer .text", text="You said: hello")
        kept = browser.run(
            "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        )
        assert ["the-key" in each for each in kept] == [True, False, False]


@pytest.mark.slow
def test_the_picture_of_the_docs_shows_the_page_as_it_is(browser: Browser, tmp_path: Path) -> None:
    """Two settings side by side with token colours. NEMOTRON4_WRITE_PICTURES=1 writes docs/page.png."""
    picture = Path("docs/page.png") if os.environ.get("NEMOTRON4_WRITE_PICTURES") else tmp_path / "page.png"
    engine = FakeEngine(lambda _: DOCS_ANSWER, name="nemotron4-nano", prompt_format=nemotron4())
    with serving(engine) as running:
        _open(browser, running)
        browser.click("#compare")
        browser.click("#probabilities")
        _say(browser, "What do alpacas and llamas have in common?")
        for side in (1, 2):
            browser.wait_for(f".answer:nth-child({side}) .note", text="tokens/s")
        browser.run("document.getElementById('thread').scrollTop = 0")
        browser.click(".answer:nth-child(2) .token:nth-child(5)")
        browser.screenshot(picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert browser.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
def test_axe_finds_no_serious_problem_and_a_phone_has_no_sideways_scroll(
    browser: Browser, chat: Running, is_dark: bool
) -> None:
    _open(browser, chat, dark=is_dark, size=PHONE)
    _say(browser, "evil")
    browser.wait_for(".answer .note", text="tokens")
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    assert browser.accessibility_problems() == []
    browser.open(f"{chat.url}/#raw", dark=is_dark)
    browser.driver.refresh()
    browser.find("#raw-prompt")
    browser.click("#show-settings")
    assert browser.accessibility_problems() == []
    _open(browser, chat, dark=is_dark)
    browser.click("#compare")
    _say(browser, "a rich answer")
    for side in (1, 2):
        browser.wait_for(f".answer:nth-child({side}) .note", text="tokens/s")
    browser.find("#settings")
    assert browser.accessibility_problems() == []
    browser.run("document.querySelector('[aria-label^=\"Copy as\"]').click()")
    browser.find("#snippet")
    assert browser.accessibility_problems() == []


def test_a_red_team_session_is_recorded_rated_and_exported(browser: Browser, tmp_path: Path) -> None:
    with closing(SessionStore(tmp_path / "sessions.sqlite")) as store:
        tab = PageTab(**page_tab(store))
        engine = FakeEngine(_answers, name="target", prompt_format=nemotron4())
        with serving(engine, ServerSettings(api_keys=("the-key",)), [tab]) as running:
            browser.open(running.url)
            browser.fill("#key", "the-key")
            browser.press(Keys.ENTER)
            browser.wait_for("#model-name", text="target")
            _say(browser, "evil plan")
            browser.wait_for(".answer .note", text="tokens")
            browser.click("#views button:nth-child(3)")
            browser.fill("#annotator", "ann")
            browser.click(".judgments .record")
            browser.find("#technique")
            browser.choose("#technique", "role_play")
            browser.choose("#category", "malware")
            browser.fill("#session-notes", "too easy")
            browser.click(".questions .primary")
            browser.wait_for(".items .title", text="evil plan")
            assert browser.accessibility_problems() == []
            browser.click("[data-question=outcome] button.success")
            browser.wait_for(".items .outcome", text="success")
            for label in (
                "severity of the worst answer 3",
                "answer 1: helpfulness 4",
                "answer 1: verbosity 0",
            ):
                browser.click(f"[aria-label^='{label}']")
                pressed = f"[aria-label^='{label}'][aria-pressed=true]"
                browser.until(lambda: browser.find_all(pressed), f"{label} is saved")  # noqa: B023
            browser.click(".answer .edit")
            browser.press(Keys.CONTROL, "a", Keys.NULL, "I will not help with that.", Keys.ESCAPE)
            browser.wait_for(".answer h3", text="(edited)")
            browser.choose(".judgments .export", "preference")
            exported = json.loads(browser.downloaded().read_text(encoding="utf-8"))
            assert [each for each in browser.problems() if " 401 " not in each] == []
        [recorded] = store.sessions()
    assert recorded.session.messages[1].content.startswith("<script>")
    assert (recorded.session.technique, recorded.session.model) == ("role_play", "target")
    row = recorded.to_json()
    [assessment], [rating] = row["assessments"], row["ratings"]
    assert (assessment["annotator"], assessment["severity"], row["notes"]) == ("ann", 3, "too easy")
    assert rating["attributes"] == {"helpfulness": 4, "verbosity": 0}
    assert exported["chosen"] == "I will not help with that."
    assert exported["rejected"] == recorded.session.messages[1].content


@pytest.mark.slow
def test_fifty_long_messages_stay_smooth(browser: Browser) -> None:
    """While one more answer streams under them; the bounds leave room for a busy machine without a GPU."""
    sentence = "A paragraph of **some** length with `code` in it. "
    tokenizer = FakeTokenizer([sentence])  # so that the history is no work for the fake
    engine = FakeEngine(
        _answers, name="fake-a", delay_s=0.002, prompt_format=nemotron4(), tokenizer=tokenizer,
        context_length=10**5,
    )  # fmt: skip
    with serving(engine) as running:
        _open(browser, running)
        text = f"{sentence * 40}\n\n- item\n- item\n\n```\ncode\n```"
        browser.driver.execute_async_script(SEED, [text] * 50)
        browser.driver.refresh()
        browser.until(
            lambda: browser.run("return document.querySelectorAll('.turn').length") == 50, "50 turns"
        )
        browser.run(WATCH)
        _say(browser, "a long answer please")
        browser.wait_for(".turn:last-child .answer .note", text="tokens/s")
    frames, tasks = browser.run("return [window.frames_ms, window.tasks_ms]")
    assert len(frames) > 20
    assert sorted(frames)[int(0.95 * len(frames))] < 250
    assert max(tasks, default=0) < 1000
