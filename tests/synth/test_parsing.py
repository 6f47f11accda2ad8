"""Lists out of hard replies: several hundred generated from styles and contents, and those made by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.synth.parsing import normalise, parse_list

LONG = ", ".join(["in a calm tone"] * 9)
CONTENTS = {
    "plain": ["Tea ceremonies", "The history of bread", "Rivers in spring", "Glass making"],
    "colons": ["Renewable energy: solar and wind", "Health: sleep", "Law: wills", "Art: murals"],
    "looks typed": ["42", "No", "2001-09-11", "3.14 and other constants"],
    "code": ["*args", "@property", "% operator", '"Loop" in python'],
    "marks": ["Use of # comments", "What is C++?", "Is 1 > 0?", "Email a@b.org, then call"],
    "questions": ["What is rain?", "Why do cats purr?", "How far is it to Mars?", "Who was Ada?"],
    "german": ["Geschichte der Städte", "Bäume im Winter", "Größe und Maß", "Straßenbahnen"],
    "chinese": ["茶的历史", "河流与城市", "如何学习数学", "春天的诗"],
    "arabic": ["تاريخ الخبز", "الأنهار", "صناعة الزجاج", "الشعر القديم"],
    "quotes inside": ["The word 'set'", 'Say "yes" to life', "Don't panic", "Rock'n'roll"],
    "long": [f"Write {word} letter, {LONG}, and sign it." for word in ("a", "one", "my", "her")],
    "parentheses": ["Energy (solar)", "(Nearly) free software", "Taxes [2024]", "Birds {of prey}"],
}
Style = Callable[[list[str]], str]


def numbered(mark: str) -> Style:
    return lambda items: "\n".join(mark.format(i=i, item=item) for i, item in enumerate(items, 1))


def lettered(items: list[str]) -> str:
    return "\n".join(f"{letter}) {item}" for letter, item in zip("abcd", items, strict=True))


def roman(items: list[str]) -> str:
    return "\n".join(f"{mark}. {item}" for mark, item in zip(("i", "ii", "iii", "iv"), items, strict=True))


STYLES: dict[str, Style] = {
    "1.": numbered("{i}. {item}"),
    "1)": numbered("{i}) {item}"),
    "(1)": numbered("({i}) {item}"),
    "1:": numbered("{i}: {item}"),
    "1 -": numbered("{i} - {item}"),
    "indented": numbered("   {i}. {item}"),
    "blank lines": numbered("{i}. {item}\n"),
    "bold": numbered("{i}. **{item}**"),
    "bold all": numbered("**{i}. {item}**"),
    "bold number": numbered("**{i}.** {item}"),
    "heading": numbered("### {i}. {item}"),
    "label": numbered("Question {i}: {item}"),
    "bold label": numbered("**Task {i}:** {item}"),
    "foreign label": numbered("Frage {i}: {item}"),
    "-": numbered("- {item}"),
    "*": numbered("* {item}"),
    "•": numbered("• {item}"),
    "–": numbered("– {item}"),
    "quoted": numbered("- “{item}”"),
    "letters": lettered,
    "roman": roman,
    "json": lambda items: json.dumps(items, ensure_ascii=False),
    "json indented": lambda items: json.dumps(items, ensure_ascii=False, indent=2),
    "json object": lambda items: json.dumps({"topics": items}, ensure_ascii=False),
    "yaml wrapper": lambda items: "topics:\n" + "\n".join(f"  - {item}" for item in items),
    "yaml fence": lambda items: "```yaml\n" + "\n".join(f"- {item}" for item in items) + "\n```",
    "json fence": lambda items: "```json\n" + json.dumps(items, ensure_ascii=False) + "\n```",
    "crlf": lambda items: "\r\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
}
AROUND = {
    "bare": ("", ""),
    "polite": ("Sure! Here are four topics:\n\n", "\n\nLet me know if you need more!"),
    "hope": ("Here is the list you asked for.\n", "\n\nI hope this helps."),
    "thinking": ("<think>\n1. plan\n2. write\n</think>\n\n", ""),
}
CASES = [
    pytest.param(style, content, around, id=f"{style}|{content}|{around}")
    for (style, content), around in zip(
        itertools.product(STYLES, CONTENTS), itertools.cycle([*AROUND, "bare"]), strict=False
    )
]


@pytest.mark.parametrize(("style", "content", "around"), CASES)
def test_every_style_gives_back_every_content(style: str, content: str, around: str) -> None:
    items = CONTENTS[content]
    before, after = AROUND[around]
    reply = before + STYLES[style](items) + after
    parsed = parse_list(reply, expected=4)
    assert parsed.texts == items
    for item in parsed.items:
        if parsed.parser != "json":
            assert reply[item.start : item.end] == item.text


def test_there_are_several_hundred_generated_replies() -> None:
    assert len(CASES) == len(STYLES) * len(CONTENTS) > 300


BY_HAND = [
    ("items keep their further lines",
     "1. Write a letter:\n   - to the mayor\n   - about trees\n2. Write a poem", 2,
     ["Write a letter:\n   - to the mayor\n   - about trees", "Write a poem"]),
    ("wrapped lines belong to their item", "1. A question that goes\non in the next line?\n2. Another?", 2,
     ["A question that goes\non in the next line?", "Another?"]),
    ("inner bullets are the list when their number fits",
     "1. Science:\n   - Physics\n   - Biology\n   - Geology", 3, ["Physics", "Biology", "Geology"]),
    ("numbers that start again", "1. a1\n2. b1\n\n1. c1\n2. d1", 4, ["a1", "b1", "c1", "d1"]),
    ("numbers out of order", "3. tea\n1. milk\n7. bread", 3, ["tea", "milk", "bread"]),
    ("one line of numbers", "1. tea 2. milk and honey 3. bread", 3, ["tea", "milk and honey", "bread"]),
    ("one line of commas", "tea, milk, and bread", 3, ["tea", "milk", "bread"]),
    ("commas after a label", "Topics: tea, milk, bread", 3, ["tea", "milk", "bread"]),
    ("semicolons keep commas", "tea, green; milk, cold; bread, old", 3,
     ["tea, green", "milk, cold", "bread, old"]),
    ("Chinese enumeration comma", "茶、面包、河流", 3, ["茶", "面包", "河流"]),
    ("full-width numbers", "１．茶\n２．面包", 2, ["茶", "面包"]),
    ("Chinese numbers", "1、茶\n2、面包", 2, ["茶", "面包"]),
    ("circled numbers", "①茶\n②面包", 2, ["茶", "面包"]),
    ("no space after the mark", "1.Tea\n2.Bread", 2, ["Tea", "Bread"]),
    ("plain lines", "Tea\nBread\nRivers", 3, ["Tea", "Bread", "Rivers"]),
    ("plain lines after an announcement", "Here are some:\nTea\nBread", 2, ["Tea", "Bread"]),
    ("a table", "| # | Topic |\n|---|---|\n| 1 | Tea time |\n| 2 | Bread |", 2, ["Tea time", "Bread"]),
    ("check boxes", "- [ ] Tea\n- [x] Bread", 2, ["Tea", "Bread"]),
    ("block quote", "> 1. Tea\n> 2. Bread", 2, ["Tea", "Bread"]),
    ("rulers around", "---\n- Tea\n- Bread\n---", 2, ["Tea", "Bread"]),
    ("code in an item",
     "1. Explain `x = [1, 2]`.\n2. Fix this:\n   ```python\n   for i in x\n   ```\n3. Why?", 3,
     ["Explain `x = [1, 2]`.", "Fix this:\n   ```python\n   for i in x\n   ```", "Why?"]),
    ("bold title with text", "1. **Tea**: how to brew\n2. **Bread**: how to bake", 2,
     ["**Tea**: how to brew", "**Bread**: how to bake"]),
    ("python list", "['tea', 'it\\'s bread']", 2, ["tea", "it's bread"]),
    ("json escapes", '["say \\"hi\\"", "caf\\u00e9"]', 2, ['say "hi"', "café"]),
    ("json cut in the middle", '["tea", "bread", "riv', 3, ["tea", "bread"]),
    ("json objects", '[{"topic": "tea"}, {"topic": "bread"}]', 2, ["tea", "bread"]),
    ("trailing commas", '- "tea",\n- "bread",', 2, ["tea", "bread"]),
    ("a lone numbered line", "1. Tea", 1, ["Tea"]),
    ("one item without mark", "Write about tea.", 1, ["Write about tea."]),
    ("empty marks", "1.\n2. Tea\n3. \n4. Bread", 2, ["Tea", "Bread"]),
    ("decimals do not number", "3.5 is a number\n2.5 is another", 2, ["3.5 is a number", "2.5 is another"]),
    ("explanations between items", "1. Tea\n\nThis is a drink.\n\n2. Bread\n\nThis is food.", 2,
     ["Tea", "Bread"]),
    ("no-break spaces", "1.\u00a0Tea\n2.\u00a0Bread", 2, ["Tea", "Bread"]),
    ("a second list afterwards",
     "1. Tea\n2. Bread\n\nNotes:\n\n- short\n- sweet\n- old", 2, ["Tea", "Bread"]),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "n", "items"), [pytest.param(*case[1:], id=case[0]) for case in BY_HAND])
def test_hard_replies_made_by_hand(reply: str, n: int, items: list[str]) -> None:
    assert parse_list(reply, expected=n).texts == items


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("1. Tea\n2. I'm sorry, but I can't write that.\n3. Bread", "refusal"),
        ("1. Tea\n2. [Topic 2]\n3. Bread", "placeholder"),
        ("1. Tea\n2. ...\n3. Bread", "empty"),
        ("1. Tea\n2. **tea.**\n3. Bread", "repeated"),
        ("Sure:\n1. Tea\n2. Bread", "before the list"),
        ("1. Tea\n2. Bread\n\nWould you like more?", "after the list"),
        ("1. Tea\n\nA drink.\n\n2. Bread", "between items"),
    ],
)
def test_one_bad_part_costs_no_good_item(reply: str, reason: str) -> None:
    parsed = parse_list(reply, expected=3)
    assert parsed.texts == ["Tea", "Bread"]
    assert reason in [reject.reason for reject in parsed.rejects]


def test_a_cut_reply_loses_its_last_item_only() -> None:
    parsed = parse_list("1. Tea\n2. Bread\n3. How do riv", expected=5, is_truncated=True)
    assert parsed.texts == ["Tea", "Bread"]
    assert parsed.rejects[-1].reason == "truncated"


def test_more_items_than_asked_for_are_all_kept() -> None:
    assert len(parse_list("\n".join(f"{i}. item {i}" for i in range(1, 31)), expected=5).items) == 30


@pytest.mark.parametrize("reply", ["", "   \n ", "I cannot help with that request.", "One sentence only."])
def test_no_list_is_no_list(reply: str) -> None:
    assert parse_list(reply, expected=5).items == ()


def test_a_word_inside_a_word_is_no_repetition_of_it() -> None:
    assert parse_list("- Heat transfer\n- eat\n- eat", expected=3).texts == ["Heat transfer", "eat"]


def test_normalising_ignores_form_but_not_words() -> None:
    assert normalise("“**Tea**  time!”") == normalise("tea\ntime")
    assert normalise("tea time") != normalise("tea times")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.integers(1, 6), st.booleans())
def test_any_text_is_parsed_without_inventing(reply: str, n: int, is_truncated: bool) -> None:
    parsed = parse_list(reply, expected=n, is_truncated=is_truncated)
    for item in parsed.items:
        assert item.text.strip()
        if parsed.parser != "json":
            assert reply[item.start : item.end] == item.text
    starts = [item.start for item in parsed.items]
    assert starts == sorted(starts)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.from_regex(r"[A-Z][a-z]{2,8}( [a-z]{2,8}){0,6}[?.]?", fullmatch=True),
        min_size=2,
        max_size=12,
        unique_by=normalise,
    ),
    st.sampled_from([style for style in STYLES if style not in ("letters", "roman")]),
)
def test_what_was_listed_comes_back(items: list[str], style: str) -> None:
    assert parse_list(STYLES[style](items), expected=len(items)).texts == items


def test_half_of_a_character_pair_stays_as_it_is_written() -> None:
    texts = parse_list('["tea \\ud83d", "milk \\ud83e\\udd5b"]', expected=2).texts
    assert texts == ["tea \\ud83d", "milk \U0001f95b"]
