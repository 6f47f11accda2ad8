"""The two libraries behind five of the checkers: language detection and English sentence splitting.

Both must give the numbers of the original IFEval checkers, so they are the same libraries: langdetect
(seeded per call instead of by its process-wide setting) and NLTK's Punkt splitter and word tokenizer.
The Punkt model is shipped next to this file, so that nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from importlib import resources
from typing import Any

from nemotron4.errors import import_optional


@lru_cache(maxsize=1)
def _language_profiles() -> Any:
    found = import_optional("langdetect.detector_factory", "detecting a language")
    factory = found.DetectorFactory()
    factory.load_profile(found.PROFILES_DIRECTORY)
    return factory


def detect_language(text: str, *, seed: int) -> str | None:
    """The code of the most likely language, or None if the text has no letters to tell from."""
    from_profiles = _language_profiles()
    from langdetect.lang_detect_exception import LangDetectException

    detector = from_profiles.create()
    detector.seed = seed
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


@lru_cache(maxsize=1)
def _sentence_splitter() -> Any:
    punkt = import_optional("nltk.tokenize.punkt", "counting sentences")
    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(_rows("abbrev_types.txt"))
    parameters.sent_starters = set(_rows("sent_starters.txt"))
    parameters.collocations = {tuple(row.split("\t")) for row in _rows("collocations.tab")}
    contexts = (row.split("\t") for row in _rows("ortho_context.tab"))
    parameters.ortho_context = defaultdict(int, {word: int(flags) for word, flags in contexts})
    return punkt.PunktSentenceTokenizer(parameters)


def _rows(name: str) -> list[str]:
    text = (resources.files("nemotron4.grading") / "punkt" / name).read_text(encoding="utf-8")
    return [row for row in text.split("\n") if row]


def count_sentences(text: str) -> int:
    return len(_sentence_splitter().tokenize(text))


@lru_cache(maxsize=1)
def _word_tokenizer() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def tokenize_words(text: str) -> list[str]:
    """Treebank-style tokens of each sentence: ``U.S.`` stays whole, ``don't`` becomes ``do`` and ``n't``."""
    sentences = _sentence_splitter().tokenize(text)
    return [token for sentence in sentences for token in _word_tokenizer().tokenize(sentence)]
