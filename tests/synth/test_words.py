"""Words, numbers and languages of texts in any script."""

from __future__ import annotations

import pytest

from nemotron4.errors import ConfigError
from nemotron4.synth.duplicates import find_near_duplicates, find_similar_words
from nemotron4.synth.words import check_language, count_words, language_of, maths, tokens, wrong_language


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is light?", 3),
        ("什么是光合作用？", 5),
        ("光合成とは何ですか。", 5),
        ("การสังเคราะห์ด้วยแสงคืออะไร", 6),
        ("用 Python 写一个函数", 5),
    ],
)
def test_words_are_counted_in_every_script(text: str, words: int) -> None:
    assert count_words(text) == words


def test_tokens_of_scripts_without_spaces_are_characters() -> None:
    assert tokens("用 Python3 写") == ["用", "python3", "写"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Convert 10 km to miles", "en"), ("Hi", "en"), ("12 + 7 = ?", "en"), ("什么是光合作用？", "zh"),
        ("Wie geht es dir?", "en"), ("Please explain how the tides of the sea come about and why.", "en"),
    ],
)  # fmt: skip
def test_a_short_text_is_not_judged_by_its_language(text: str, language: str) -> None:
    assert wrong_language(text, language) is None


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("什么是光合作用？", "en", "its letters are Cjk"),
        ("Привет", "en", "its letters are Cyrillic"),
        ("Hello there, my dear friend", "ru", "its letters are Latin"),
        ("Wie geht es Ihnen heute und was machen Sie morgen in der Stadt?", "en", "looks like 'de'"),
        ("光合成とは何ですか。詳しく説明してください。", "zh", "looks like 'ja'"),
    ],
)
def test_another_language_is_named(text: str, language: str, reason: str) -> None:
    assert reason in str(wrong_language(text, language))


def test_an_unknown_language_is_refused() -> None:
    check_language("")
    check_language("zh")
    with pytest.raises(ConfigError, match="unknown language 'english'"):
        check_language("english")


def test_languages_of_examples() -> None:
    assert language_of("Hi") == "Latin, short"
    assert language_of("12") == "no letters"


def test_short_questions_with_other_numbers_are_two() -> None:
    assert find_near_duplicates(["What is 12+25?", "What is 12+26?", "What is 12-25?"], 0.5) == {}
    assert maths("Solve x = 3 for a well-known y") == ("=", "3")
    story = "A farmer has {} sheep and sells {} of them at the market. How many are left?"
    sums = [story.format(7, 6), story.format(9, 8)]
    assert find_near_duplicates(sums, 0.75) == {}
    assert find_similar_words(sums, 0.5) == {}
    long = "The committee met again and talked at length about the plan of the bridge. " * 8
    assert find_near_duplicates([f"{long} Page 12", f"{long} Page 13"], 0.75) == {1: 0}
