"""Answers under a grammar fit it, whatever the model, batch and settings; what cannot fit is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLParserLimits

import nemotron4
from nemotron4.engine import ModelInfo, SamplingParams
from nemotron4.errors import RequestError
from nemotron4.inference.engine import Engine
from nemotron4.inference.fake_tokenizer import FakeTokenizer
from nemotron4.inference.torch_runner import ModelRunner
from nemotron4.model.kv_cache import KVCache
from nemotron4.records import Message
from nemotron4.text import structured_output
from tests.inference.small_engine import SMALL, random_model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "maximum": 99, "minimum": 0},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}
# A random model would hardly ever close a string or a list.
CLOSING = {FakeTokenizer().encode(text)[0]: 9.0 for text in '"}]'}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = FakeTokenizer()
    config = replace(SMALL, vocab_size=tokenizer.vocab_size + 13, context_length=2048)
    model = random_model(config)
    info = ModelInfo(
        name="small",
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        num_parameters=0,
        dtype="float32",
        device="cpu",
        eos_token_ids=(tokenizer.eos_id or 0,),
    )
    cache = KVCache(config, 512, dtype=torch.float32, device=torch.device("cpu"))
    made = Engine(
        ModelRunner(model, cache), info, tokenizer, None, max_running=16, max_waiting=999, max_step_tokens=128
    )
    with made:
        yield made


def some_schema(draw: random.Random, depth: int = 2) -> Any:
    """A schema of any of the kinds that people write."""
    leaves: list[Any] = [
        {"type": "string", "maxLength": draw.randrange(1, 9)},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "time", "date-time", "email"])},
        {"type": "integer", "minimum": -5, "maximum": draw.randrange(10, 5000)},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["a", 'q"uote', "back\\slash", "zeile\n", "héllo", "你好", "🎉", 7, None, True]},
        {"const": {"fixed": [1, "two"]}},
        {"type": ["integer", "null"], "minimum": 3, "maximum": 30},
    ]
    if depth == 0:
        return draw.choice(leaves)
    known = ["name", "größe", "名前", "a b", 'q"', "x\\y", "tags", "", "$ref_"]
    names = draw.sample(known, draw.randrange(1, 4))
    inner = {name: some_schema(draw, depth - 1) for name in names}
    fixed = {"type": "object", "properties": inner, "additionalProperties": False}
    pair = {"type": "array", "prefixItems": [some_schema(draw, 0), some_schema(draw, 0)], "items": False}
    return draw.choice(
        [
            *leaves[:2],
            fixed | {"required": names},
            fixed | {"required": names[:1]},
            {"type": "object", "additionalProperties": some_schema(draw, 0), "maxProperties": 3},
            {"type": "array", "items": some_schema(draw, depth - 1), "minItems": 1, "maxItems": 3},
            pair | {"minItems": 2},
            {"anyOf": [some_schema(draw, depth - 1), some_schema(draw, depth - 1)]},
            {"$defs": {"node": NODE}, "$ref": "#/$defs/node"} if depth == 2 else {"type": "boolean"},
        ]
    )


def test_answers_to_200_schemas_parse_and_validate(engine: Engine) -> None:
    draw = random.Random(11)
    schemas = [some_schema(draw) for _ in range(200)]
    params = [
        SamplingParams(
            max_new_tokens=1000,
            temperature=draw.choice([0.0, 1.0]),
            seed=i,
            logit_bias=CLOSING,
            grammar=structured_output.json_schema(schema),
        )
        for i, schema in enumerate(schemas)
    ]
    results = engine.generate_each([engine.request("Say it:", each) for each in params])
    num_whole = 0
    kind = jsonschema.Draft202012Validator
    for schema, result in zip(schemas, results, strict=True):
        if result.finish_reason == "stop":
            num_whole += 1
            kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(result.text))
        else:
            assert len(result.token_ids) == 1000
    assert num_whole >= 180


def test_the_schema_of_generate_is_followed_and_the_token_limit_is_honest(engine: Engine) -> None:
    [whole] = engine.generate("Who?", schema=PERSON, max_new_tokens=200, logit_bias=CLOSING, seed=1)
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.text), PERSON)
    [cut] = engine.generate("Who?", schema=PERSON, max_new_tokens=5, seed=1)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)


def test_tokens_are_the_same_in_any_batch_and_with_log_probabilities(engine: Engine) -> None:
    grammar = structured_output.json_schema(PERSON)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 4, "top_p": 0.9, "top_k": 40},
    ]
    params = [
        SamplingParams(max_new_tokens=80, grammar=grammar, logit_bias=CLOSING, **each) for each in settings
    ]
    alone = [engine.generate_each([engine.request("Who?", each)])[0].token_ids for each in params]
    others = [SamplingParams(max_new_tokens=60, seed=i) for i in range(9)]
    together = engine.generate_each([engine.request("Who?", each) for each in [*params, *others]])
    assert [result.token_ids for result in together[:3]] == alone
    scored = engine.generate_each([engine.request("Who?", replace(each, logprobs=1)) for each in params])
    assert [result.token_ids for result in scored] == alone
    # Raw: those of the model, as if there were no grammar.
    ids = [*engine.tokenizer.encode("Who?"), *alone[0]]
    [raw] = engine.score(token_ids=[ids])
    assert scored[0].logprobs == pytest.approx(raw[-len(alone[0]) :], abs=1e-4)


def test_forced_tokens_cost_no_step_of_the_model(engine: Engine) -> None:
    grammar = structured_output.choice(["the only one"])
    steps = engine.collect([engine.request("Say", SamplingParams(max_new_tokens=50, grammar=grammar))])[0]
    assert engine.tokenizer.decode([step.token_id for step in steps if step.token_id is not None]) == (
        "the only one"
    )
    assert steps[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("grammar", "form"),
    [
        (structured_output.choice(["[[A]]", "[[B]]", "[[A>>B]]"]), r"\[\[(A|B|A>>B)\]\]"),
        (structured_output.regex(r"[0-9]{1,2}/10"), r"\d{1,2}/10"),
        (structured_output.grammar('start: ("yes" | "no") "!"'), r"(yes|no)!"),
        (structured_output.grammar('root ::= "yes" | "no " [0-9]+ "."'), r"yes|no \d+\."),
    ],
)
def test_choices_expressions_and_grammars_are_followed(engine: Engine, grammar: Any, form: str) -> None:
    params = SamplingParams(max_new_tokens=300, grammar=grammar)
    for result in engine.generate_each(
        [engine.request("Verdict:", replace(params, seed=i)) for i in range(5)]
    ):
        assert result.finish_reason == "length" or re.fullmatch(form, result.text), result.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: structured_output.json_schema({"not": {"type": "string"}}),
            'Unimplemented keys: \\["not"\\]',
        ),
        (lambda: structured_output.json_schema({"type": "text"}), "Invalid type: text"),
        (lambda: structured_output.json_schema("{"), "it is no JSON schema"),
        (lambda: structured_output.json_schema("5"), "JSON schema cannot be followed"),
        (lambda: structured_output.regex("(a"), "unclosed group"),
        (lambda: structured_output.grammar("start: missing"), "unknown name"),
        (lambda: structured_output.choice([]), "expected one text or more"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_a_grammar_that_fails_while_it_is_followed_is_the_requests_fault(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=20, grammar=structured_output.grammar("root ::= root"))
    with pytest.raises(RequestError, match=r"the grammar could not be followed: \w+$"):
        engine.generate_each([engine.request("Say", params)])


def test_stop_ids_outside_the_vocabulary_end_nothing(engine: Engine) -> None:
    least: dict[str, Any] = {"min_new_tokens": 2, "temperature": 0}
    outside: dict[str, Any] = {**least, "stop_token_ids": [10**6, -1]}
    free, same = (engine.generate("Say", **each) for each in (least, outside))
    [formed] = engine.generate("Say", grammar=structured_output.choice(["yes"]), **outside)
    assert (same, formed.text) == (free, "yes")


def test_the_minimum_of_tokens_does_not_break_a_document(engine: Engine) -> None:
    grammar = structured_output.choice(["yes"])
    params = SamplingParams(max_new_tokens=50, min_new_tokens=20, grammar=grammar)
    [result] = engine.generate_each([engine.request("Say", params)])
    assert (result.text, result.finish_reason) == ("yes", "stop")


DESCRIPTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.demo_model
def test_the_demo_model_writes_verdicts_and_documents(demo_model: Path) -> None:
    question = "Which answer is better? [[A]], [[B]] or [[C]] for a tie.\nA: Paris is in France.\nB: No. {}"
    form = structured_output.choice(["[[A]]", "[[B]]", "[[C]]"])
    with nemotron4.load(str(demo_model)) as engine:
        params = [SamplingParams(max_new_tokens=256, grammar=form, seed=i) for i in range(16)]
        turns = [[Message("user", question.format(i))] for i in range(16)]
        judged = [engine.request(turn, each) for turn, each in zip(turns, params, strict=True)]
        assert all(re.fullmatch(r"\[\[[ABC]\]\]", each.text) for each in engine.generate_each(judged))
        made = engine.generate(
            [[{"role": "user", "content": f"Describe person {i} as JSON."}] for i in range(2)],
            schema=DESCRIPTION, max_new_tokens=120, temperature=0.7, seed=3,
        )  # fmt: skip
    for each in made:
        assert each.finish_reason in ("stop", "length")
        if each.finish_reason == "stop":
            jsonschema.validate(json.loads(each.text), DESCRIPTION)
    assert sum(each.finish_reason == "stop" for each in made) >= 1


def test_a_pattern_of_a_million_letters_is_refused_by_the_bound_on_its_work() -> None:
    """The time is llguidance's; that it keeps to less than its own bound is ours."""
    tokenizer = FakeTokenizer()
    vocabulary = structured_output.GrammarVocabulary(tokenizer, tokenizer.vocab_size)
    follower = vocabulary.follow(structured_output.regex("(a{1000}){1000}"))

    def follow() -> None:
        for token_id in tokenizer.encode("a a a a"):
            follower.allowed()
            follower.consume(token_id)

    with pytest.raises(RequestError, match="could not be followed"):
        follow()
    assert LLParserLimits().initial_lexer_fuel > structured_output.LEXER_FUEL
