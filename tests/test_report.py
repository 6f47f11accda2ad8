"""One report, four forms: each says the same, escapes what came from a model, and keeps the verdict first."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron4.report import (
    Bar,
    Bars,
    Block,
    Folded,
    Heading,
    Links,
    Picture,
    Table,
    Text,
    as_html,
    as_json,
    as_markdown,
    numeric_columns,
    percent,
    print_report,
    write_report,
)
from tests.browser import PHONE, Browser

HOSTILE = "<b>|\x1b[31m"
BARS = Bars(
    "Attacks withstood",
    "%",
    [Bar("jailbreaks", 50.0, 30.0, 70.0, "5/10"), Bar("leaks", None, label="not run")],
    100,
)
BLOCKS: list[Block] = [
    Heading("Scan", 1),
    Text("Half of the attacks worked.", is_verdict=True),
    Table(["area", "rate"], [[HOSTILE, "50.0 %"], ["leaks", "-"]]),
    BARS,
    Picture("areas.png", "Areas"),
    Links([("item", "http://x/?a=1&b=2")]),
    Folded("one attack", [("prompt", HOSTILE)]),
]


def test_markdown_says_everything_and_keeps_cells_apart() -> None:
    text = as_markdown(BLOCKS)
    assert text.startswith("# Scan\n\n**Half of the attacks worked.**\n\n| area | rate |\n| --- | ---: |\n")
    assert "| &lt;b>\\|\\u001b[31m | 50.0 % |" in text
    assert "jailbreaks  ████████████████                  5/10" in text
    assert "&lt;b&gt;|&#92;u001b[31m" in text


def test_html_is_one_page_without_scripts_and_escapes_results() -> None:
    page = as_html(BLOCKS, "a <title>")
    assert "<title>a &lt;title&gt;</title>" in page
    assert "<b>|" not in page
    assert "<script" not in page
    assert 'class="verdict"' in page
    assert "width:50.00%" in page
    assert "left:30.00%;width:40.00%" in page
    assert '<td class="n">50.0 %</td>' in page
    assert "a=1&amp;b=2" in page


def test_a_narrow_report_can_be_read_with_keys_alone(browser: Browser, tmp_path: Path) -> None:
    wide = Table([f"a column of the table {number}" for number in range(9)], [["1"] * 9])
    path = tmp_path / "report.html"
    path.write_text(as_html([*BLOCKS[:4], wide], "Scan"), encoding="utf-8")
    browser.open(path.as_uri(), size=PHONE)
    assert browser.accessibility_problems() == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_json_names_the_kind_of_each_block() -> None:
    kinds = [block["kind"] for block in as_json(BLOCKS)]
    assert kinds == ["heading", "text", "table", "bars", "picture", "links", "folded"]


def test_the_terminal_shows_the_same_and_obeys_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(BLOCKS)
    shown = capsys.readouterr().out
    assert "Half of the attacks worked." in shown
    assert "\\u001b[31m" in shown
    assert "\x1b" not in shown
    assert "not run" in shown


def test_a_picture_stands_for_bars_in_markdown() -> None:
    bars = Bars("Areas", "%", BARS.bars, picture="areas.png")
    assert as_markdown([bars]) == "![Areas, %](areas.png)\n"


def test_columns_of_numbers_are_told_from_words() -> None:
    table = Table(["a", "b", "c"], [["x1", "1.5 %", "-"], ["2", "-", "-"]])
    assert numeric_columns(table) == [False, True, False]
    assert numeric_columns(Table(["a"], [])) == [False]
    told = Table(["p", "left"], [["0.0033, McNemar, exact; 99 won", "3 min 5 s"], ["1.0", "+2 [-1, 5]"]])
    assert numeric_columns(told) == [False, True]


def test_a_share_without_items_is_unscored() -> None:
    assert percent(None) == "unscored"
    assert percent(0.5) == "50.0 %"


def test_files_are_written_whole(tmp_path: Path) -> None:
    assert [path.name for path in write_report(tmp_path, "Scan", BLOCKS)] == ["report.md", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_words_of_a_model_open_nothing_where_the_markdown_is_shown(tmp_path: Path) -> None:
    hostile = '<img src=x onerror="alert(1)"> ![](http://x/track.png) p < 0.05 \ud83d'
    blocks: list[Block] = [
        Heading(hostile),
        Text(hostile),
        Table(["a"], [[hostile]], hostile),
        Links([(hostile, "b")]),
    ]
    markdown, _ = write_report(tmp_path, "t", blocks)
    text = markdown.read_text()
    assert "<img" not in text
    assert "![" not in text
    assert text.count("p < 0.05 \\ud83d") == 5
