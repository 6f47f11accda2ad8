"""Answers that fit a JSON schema, a regular expression, a list of choices or a grammar.

llguidance (Rust; what vLLM, SGLang and llama.cpp use) compiles the grammar and says which tokens may follow.
Any engine asks a ``Follower`` before it draws a token and tells it the token that was drawn.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from nemotron4.engine import Grammar, Tokenizer
from nemotron4.errors import RequestError

# Between the tokens of a document: nothing, a space, or line breaks with an indentation. Without a bound a
# weak model can write spaces until its limit.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"
# A tenth of llguidance's own bound on the work before the first token: "(a{1000}){1000}" would hold up every
# request for seconds, and the 1,385 schemas of JSONSchemaBench that were tried need less.
LEXER_FUEL = 100_000


def json_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
    """A JSON document that validates against the schema, given as a value or as JSON."""
    source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return checked(Grammar("json", source))


def json_object() -> Grammar:
    return Grammar("json", '{"type": "object"}')


def regex(pattern: str) -> Grammar:
    return checked(Grammar("regex", pattern))


def choice(texts: Sequence[str]) -> Grammar:
    """Exactly one of the texts."""
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"the choices are {list(texts)!r:.60}; expected one text or more, none empty")
    return checked(Grammar("choice", json.dumps(list(texts), ensure_ascii=False)))


def grammar(text: str) -> Grammar:
    """A grammar in Lark's form or in llama.cpp's (GBNF)."""
    return checked(Grammar("grammar", text))


def checked(wanted: Grammar) -> Grammar:
    """The grammar itself; RequestError with the library's reason if it cannot be expressed."""
    definition = _definition(wanted)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(definition)
    if is_error:
        raise _refusal(wanted, messages[0])
    return wanted


@functools.lru_cache(maxsize=64)
def _definition(wanted: Grammar) -> str:
    """The grammar in llguidance's own form."""
    if wanted.kind == "json":
        try:
            schema = json.loads(wanted.source)
            if schema is True:  # JSON Schema's "anything"; the library takes objects only
                schema = {}
            return str(
                LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
            )
        except (ValueError, RecursionError, TypeError) as error:
            raise _refusal(wanted, f"it is no JSON schema: {error}") from error
    try:
        return str(grammar_from(wanted.kind, wanted.source))
    except Exception as error:  # the parser of GBNF has no class of errors that it always uses
        raise _refusal(wanted, str(error)) from error


def _refusal(wanted: Grammar, reason: str) -> RequestError:
    names = {"json": "JSON schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}
    return RequestError(
        f"the {names[wanted.kind]} cannot be followed: {' '.join(reason.split())[:300]}",
        hint="remove what it cannot express, or check the answer after it is written",
    )


class Follower:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """For each id whether the text may go on with it; the ends of a model are not among them."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def forced(self) -> list[int]:
        """The tokens that must follow, where the grammar leaves one way."""
        return list(self._matcher.compute_ff_tokens())

    def consume(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n<state>")[0]  # behind it is the parser's state
            raise RequestError(f"the grammar could not be followed: {reason[:300]}")


class GrammarVocabulary:
    """One tokenizer's vocabulary, as grammars see it. Made once for an engine."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if not tokenizer.decodes_each_token:
            raise RequestError("this tokenizer's decoder looks at several tokens; no grammar can be followed")
        self._vocab_size = vocab_size
        self._library = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))
        self._matcher = functools.lru_cache(maxsize=32)(self._compile)

    def follow(self, wanted: Grammar) -> Follower:
        """From the beginning of an answer. RequestError for a grammar that cannot be followed."""
        return Follower(self._matcher(wanted).deep_copy(), self._vocab_size)

    def _compile(self, wanted: Grammar) -> LLMatcher:
        limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL)
        matcher = LLMatcher(self._library, _definition(wanted), log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        return matcher


class _Vocabulary:
    """What llguidance asks of a tokenizer. The end of a document is an id of its own behind the vocabulary,
    so that it does not matter which ids end a text for the model; markers are never part of a document.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        markers = {tokenizer.token_id(marker) for marker in tokenizer.markers}
        pieces = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece or i in markers]
        self.special_token_ids.append(vocab_size)
        names = [piece or f"<{i}>".encode() for i, piece in enumerate(pieces)]
        self.tokens = [*names, b"<end of document>"]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(), parse_special=False, continues=True)
