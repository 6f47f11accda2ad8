"""Words, numbers and languages of a text in any script, as the filters count them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from typing import Any

from nemotron4.errors import import_optional, unknown
from nemotron4.grading.language import detect_language

# Scripts that write no spaces between words, and how many of their characters make a word in the mean.
_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_SOUTH_EAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_PER_WORD = ((_HAN, 1.5), (_KANA, 2.5), (_SOUTH_EAST, 4.5))
_UNSPACED = re.compile(f"[{_HAN}{_KANA}{_SOUTH_EAST}]")
_TOKEN = re.compile(rf"[{_HAN}{_KANA}{_SOUTH_EAST}]|(?:(?![{_HAN}{_KANA}{_SOUTH_EAST}])\w)+")
_SIGN = r"\s*[-+*/^=<>×÷·]\s*"
_MATHS = re.compile(rf"(?<!\w)\d+(?:[.,]\d+)*|(?<=\d){_SIGN}(?=[\d(a-z])|(?<=[)a-z]){_SIGN}(?=[\d(])")
MIN_LETTERS = 40  # fewer say too little of the language within one script

# The script of each language that has one of its own; all others are written in Latin letters.
_SCRIPTS = {
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "he": "HEBREW", "el": "GREEK", "hi": "DEVANAGARI",
    "mr": "DEVANAGARI", "ne": "DEVANAGARI", "bn": "BENGALI", "gu": "GUJARATI", "pa": "GURMUKHI",
    "ta": "TAMIL", "te": "TELUGU", "kn": "KANNADA", "ml": "MALAYALAM", "th": "THAI", "ko": "HANGUL",
    "ja": "CJK", "zh": "CJK", "ru": "CYRILLIC", "uk": "CYRILLIC", "bg": "CYRILLIC", "mk": "CYRILLIC",
}  # fmt: skip


def tokens(text: str) -> list[str]:
    """Lower-case words; where no spaces are written, single characters."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """Words between spaces; scripts without spaces are counted by characters, rounded up."""
    if not _UNSPACED.search(text):
        return len(text.split())
    rest = _UNSPACED.sub(" ", text).split()
    number = float(sum(any(map(str.isalnum, part)) for part in rest))
    for script, per_word in _PER_WORD:
        number += len(re.findall(f"[{script}]", text)) / per_word
    return int(-(-number // 1))


def maths(text: str) -> tuple[str, ...]:
    """The numbers of a text and the signs between them: short questions that differ in them are two."""
    return tuple(found.strip() for found in _MATHS.findall(text.lower()))


def wrong_language(text: str, language: str) -> str | None:
    """What it looks like, if it is another language. A short text is judged by its script alone."""
    wanted = language.split("-")[0]
    scripts = Counter(_script(character) for character in text if character.isalpha())
    if not scripts:
        return None
    script, number = scripts.most_common(1)[0]
    expected = _SCRIPTS.get(wanted, "LATIN")
    if script != expected and number > 0.6 * scripts.total():
        return f"its letters are {script.title()}, not those of {language!r}"
    if scripts.total() < MIN_LETTERS and expected != "CJK":
        return None
    if expected == "CJK" and scripts.total() < MIN_LETTERS // 4:
        return None
    found = detect_language(text, seed=0)
    return (
        None if found is None or found.split("-")[0] == wanted else f"looks like {found!r}, not {language!r}"
    )


def check_language(language: str) -> None:
    """ConfigError for a language that nobody can detect."""
    if language:
        detector: Any = import_optional("langdetect.detector_factory", "detecting languages")
        known = sorted(name for name in os.listdir(detector.PROFILES_DIRECTORY) if len(name) < 6)
        if language not in {*known, "zh"}:
            raise unknown("language", language, known)


def language_of(text: str) -> str:
    """A guess to sort examples by: a language's code, the script of a short text, or "no letters"."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return "no letters"
    if len(letters) < MIN_LETTERS:
        return f"{Counter(map(_script, letters)).most_common(1)[0][0].title()}, short"
    return detect_language(text, seed=0) or "unknown"


def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0].removesuffix("-JAMO")
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "HALFWIDTH") else name
