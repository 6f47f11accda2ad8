"""Stages of one's own: templates over columns, replies with several values, functions in a process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4.client import FakeBehaviour, Sampling
from nemotron4.errors import ConfigError
from nemotron4.records import Message
from nemotron4.runs import IncompleteError
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.export import export
from nemotron4.synth.stages.own import check_schema, find_object, in_words, objection, strict
from tests.synth.conftest import Bench, ServerThread, make_recipe

RATING = {"type": "object", "properties": {
    "score": {"type": "integer", "minimum": 1, "maximum": 5},
    "label": {"type": "string", "enum": ["good", "bad"]},
    "reason": {"type": "string"},
}}  # fmt: skip


def rows_from(path: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"name": "in", "kind": "row_file", "knobs": {"file": str(path)}}


def then(kind: str, **knobs: Any) -> dict[str, Any]:
    return {"name": "out", "kind": kind, "takes": ["in"], "knobs": knobs}


def always(text: str) -> FakeBehaviour:
    return FakeBehaviour(script=lambda messages, sampling: text)


def columns(bench: Bench, stage: str = "out") -> list[dict[str, Any]]:
    return [row["columns"] for row in bench.rows(stage).values()]


def test_a_template_names_any_columns_and_a_system_turn(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "Tea is old.", "lang": "French", "tags": ["a"]}])
    knobs = {
        "template": "To {lang} {x: 1}: {text} {tags}",
        "system": "You know {lang}.",
        "output": "translation",
    }
    bench.run(make_recipe([source, then("prompt", **knobs)]), always("Le thé."))
    [request] = bench.model.requests
    assert [m["content"] for m in request["messages"]] == [
        "You know French.",
        'To French {x: 1}: Tea is old. ["a"]',
    ]
    assert columns(bench) == [
        {"text": "Tea is old.", "lang": "French", "tags": ["a"], "translation": "Le thé."}
    ]


def test_a_schema_gives_several_columns_also_over_http(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": str(i)} for i in range(5)])
    with ServerThread() as server:
        recipe = make_recipe(
            [source, then("prompt", template="Rate: {text}", schema=RATING)],
            endpoint={"gen": {"url": server.url}},
        )
        run_recipe(recipe, bench.folder)
    made = columns(bench)
    assert len(made) == 5
    assert all(objection({k: row[k] for k in RATING["properties"]}, RATING) is None for row in made)  # type: ignore[attr-defined]


def test_a_reply_that_does_not_fit_is_asked_for_again(bench: Bench, tmp_path: Path) -> None:
    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        replies.append(1)
        return (
            '{"score": 9, "label": "good", "reason": "r"}'
            if len(replies) < 3
            else '```json\n{"score": 4, "label": "good", "reason": "r"}\n```'
        )

    replies: list[int] = []
    source = rows_from(tmp_path / "r.jsonl", [{"text": "a"}])
    recipe = make_recipe([source, then("prompt", template="{text}", schema=RATING)])
    bench.run(recipe, FakeBehaviour(script=script))
    assert columns(bench)[0]["score"] == 4
    other = Bench(bench.folder / "other")
    with pytest.raises(IncompleteError, match="1 content: schema"):
        other.run(recipe, always("no object"))


def test_rows_are_dropped_by_the_reply(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "a"}])
    recipe = make_recipe([source, then("prompt", template="{text}", schema=RATING, at_least={"score": 4})])
    bench.run(recipe, always('{"score": 3, "label": "good", "reason": ""}'))
    assert bench.accounting(recipe).stage("out").filtered == {"low score": 1}
    other = Bench(bench.folder / "other")
    recipe = make_recipe([source, then("prompt", template="{text}", schema=RATING, only={"label": ["good"]})])
    other.run(recipe, always('{"score": 3, "label": "bad", "reason": ""}'))
    assert other.accounting(recipe).stage("out").filtered == {"other label": 1}


def test_a_list_in_the_reply_makes_rows_of_any_type(bench: Bench, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"questions": {"type": "array", "items": {"type": "string"}}}}
    source = rows_from(tmp_path / "r.jsonl", [{"text": "Tea is old."}])
    knobs = {"template": "{text}", "schema": schema, "each": "questions", "makes": "prompt",
             "fields": {"prompt": "{text}\n\n{questions}", "task": "reading"}}  # fmt: skip
    stages = [
        source, then("prompt", **knobs),
        {"name": "answer", "kind": "respond", "takes": ["out"], "knobs": {"k": 1}},
        {"name": "sft", "kind": "single_answer", "takes": ["answer"]},
    ]  # fmt: skip
    recipe = make_recipe(stages, export={"sft": ["sft"], "records": ["answer"]})
    bench.run(recipe, always('{"questions": ["How old?", "Why?"]}'))
    assert sorted(row["messages"][0][1] for row in bench.rows("out").values()) == [
        "Tea is old.\n\nHow old?", "Tea is old.\n\nWhy?",
    ]  # fmt: skip
    folder = export(bench.folder, recipe).folder
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 2]
    record = json.loads((folder / "records.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["num_responses"] == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"template": "{question}"}, "stage 'out' .prompt.: no column question"),
        ({"template": "{prompt}", "makes": "dialogue"}, "a dialogue has user, assistant"),
        ({"template": "{prompt}", "each": "items"}, "are no columns of the reply"),
        ({"template": "{prompt}", "schema": {"type": "object", "anyOf": []}}, "anyOf"),
        ({"template": "{prompt}", "schema": {"type": "string"}}, "must be an object with properties"),
    ],
)
def test_a_stage_that_cannot_work_is_refused_first(
    bench: Bench, tmp_path: Path, knobs: dict[str, Any], message: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    source = {"name": "in", "kind": "prompt_file", "knobs": {"file": str(tmp_path / "p.jsonl"), "task": "t"}}
    with pytest.raises(ConfigError, match=message):
        bench.run(make_recipe([source, then("prompt", **knobs)]))
    assert bench.model.calls == 0


CODE = """
import os
def shout(row):
    print("noise")
    return {"text": row["text"].upper(), "process": os.getpid()}
def both(rows):
    return [[{"n": len(rows)}, {"n": 0}] for row in rows]
def some(row):
    if row["text"] == "a":
        return None
    if row["text"] == "b":
        raise ValueError("b is bad")
    if row["text"] == "c":
        os._exit(3)
    return row
def hang(row):
    import time
    time.sleep(60)
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return str(path)


def test_a_function_runs_in_a_process_of_its_own(bench: Bench, tmp_path: Path, code: str) -> None:
    import os

    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}, {"text": "milk"}])
    bench.run(make_recipe([source, then("python", function=f"{code}:shout")]))
    assert sorted(row["text"] for row in columns(bench)) == ["MILK", "TEA"]
    assert len({row["process"] for row in columns(bench)} | {os.getpid()}) == 2


def test_a_function_of_rows_gets_several_and_may_make_several(
    bench: Bench, tmp_path: Path, code: str
) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": str(i)} for i in range(6)])
    knobs = {"function": f"{code}:both", "makes": "topic", "fields": {"topic": "{text} of {n}"}}
    bench.run(make_recipe([source, then("python", **knobs)]))
    assert len(bench.rows("out")) == 12


def test_a_bad_row_costs_only_itself(bench: Bench, tmp_path: Path, code: str) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": t} for t in "abcde"])
    recipe = make_recipe([source, then("python", function=f"{code}:some")])
    bench.run(recipe)
    stage = bench.accounting(recipe).stage("out")
    assert (stage.done, stage.filtered, stage.failed) == (2, {"python": 1}, {"content: python": 2})


def test_a_function_that_hangs_is_ended(bench: Bench, tmp_path: Path, code: str) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "a"}])
    with pytest.raises(IncompleteError, match="1 content: python"):
        bench.run(make_recipe([source, then("python", function=f"{code}:hang", timeout_s=0.5)]))


def test_a_changed_function_is_run_again(bench: Bench, tmp_path: Path, code: str) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}])
    recipe = make_recipe([source, then("python", function=f"{code}:shout")])
    bench.run(recipe)
    Path(code).write_text(CODE.replace("upper", "title"), encoding="utf-8")
    bench.run(recipe)
    assert columns(bench)[0]["text"] == "Tea"


CHATTY = """
import os
print("loading")
def tell(row):
    os.system("echo hi")
    return {"n": row["n"], "made": float("nan") if row["n"] == 4 else row["n"]}
"""


def test_nothing_that_is_printed_gives_a_row_the_answer_of_another(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY, encoding="utf-8")
    source = rows_from(tmp_path / "r.jsonl", [{"n": n} for n in range(5)])
    knobs = {"function": f"{tmp_path}/chatty.py:tell", "batch_size": 1}
    recipe = make_recipe([source, then("python", **knobs)])
    bench.run(recipe)
    assert sorted((row["n"], row["made"]) for row in columns(bench)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert bench.accounting(recipe).stage("out").failed == {"content: python": 1}  # NaN is no value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(row)\n", "mine.py: cannot be loaded: SyntaxError"),
        ("import no_such_module\n", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("raise SystemExit(0)\n", "cannot be loaded: SystemExit: 0"),
        ("async def f(row): return row\n", "f is an async function"),
        ("# caf\xe9\n", "no function 'f'"),
    ],
)
def test_a_file_that_makes_no_function_is_refused_first(
    bench: Bench, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.py").write_bytes(text.encode("latin-1"))
    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}])
    with pytest.raises(ConfigError, match=message):
        bench.run(make_recipe([source, then("python", function=f"{tmp_path}/mine.py:f")]))


def test_a_missing_function_is_refused_first(bench: Bench, tmp_path: Path, code: str) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}])
    for function, message in (
        (f"{code}:none", "no function"),
        ("none.py:f", "no such file"),
        ("x", "FILE.py:NAME"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench.run(make_recipe([source, then("python", function=function)]))


def test_schemas_in_words_and_in_checks() -> None:
    assert in_words(RATING) == (
        'Answer with one JSON object and nothing else. Its keys: "score" (an integer from 1 to 5), '
        '"label" (one of "good", "bad"), "reason" (a string).'
    )
    assert find_object('Sure: {"a": {"b": 1}} ok') == {"a": {"b": 1}}
    nested = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
    }
    check_schema(nested)
    assert objection({"a": [1, 2.5]}, nested) is None
    assert objection({"a": [1, "x"]}, nested) == 'reply.a[1] is "x"; expected a number'
    assert objection({"a": [1, 2, 3]}, nested) == "reply.a is 3; allowed:  to 2"
    assert objection({}, nested) == "reply lacks a"
    assert strict({"type": "object", "properties": {"a": {"type": "string"}}}) == {
        "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    assert objection({"a": True}, {"type": "object", "properties": {"a": {"type": "integer"}}}) is not None


@pytest.mark.parametrize("bad", ['{"n": 123456789012345678901}', '{"n": 1, "t": "\\ud83d"}'])
def test_a_value_that_no_row_can_hold_is_asked_for_again(bench: Bench, tmp_path: Path, bad: str) -> None:
    replies = [bad, '{"n": 2}']
    source = rows_from(tmp_path / "r.jsonl", [{"text": "a"}])
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    behaviour = FakeBehaviour(script=lambda messages, sampling: replies.pop(0))
    bench.run(make_recipe([source, then("prompt", template="{text}", schema=schema)]), behaviour)
    assert columns(bench) == [{"text": "a", "n": 2}]


def test_a_row_of_a_function_that_cannot_be_kept_fails_alone(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(row):\n    return {'n': 10 ** (30 if row['n'] == 0 else 3)}\n")
    source = rows_from(tmp_path / "r.jsonl", [{"n": n} for n in range(3)])
    recipe = make_recipe([source, then("python", function=f"{tmp_path}/f.py:f")])
    bench.run(recipe)
    assert columns(bench) == [{"n": 1000}] * 2
    assert bench.accounting(recipe).stage("out").failed == {"content: row": 1}


def test_a_column_of_any_name_can_be_in_braces(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"Best Answer": "tea", "source-id": 7}])
    bench.run(make_recipe([source, then("prompt", template="{Best Answer} {source-id} {no column}")]))
    [request] = bench.model.requests
    assert request["messages"][0]["content"] == "tea 7 {no column}"


@pytest.mark.parametrize("template", ["{{ text }}", "{{text|upper}}", "{% for t in text %}{text}"])
def test_a_template_of_jinja_is_refused(tmp_path: Path, bench: Bench, template: str) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}])
    with pytest.raises(ConfigError, match="is of Jinja"):
        bench.run(make_recipe([source, then("prompt", template=template)]))


def test_a_true_and_false_is_chosen_by_its_word(bench: Bench, tmp_path: Path) -> None:
    source = rows_from(tmp_path / "r.jsonl", [{"text": "tea"}])
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    knobs: dict[str, Any] = {"template": "{text}", "schema": schema, "only": {"ok": ["true"]}}
    bench.run(make_recipe([source, then("prompt", **knobs)]), always('{"ok": true}'))
    assert columns(bench) == [{"text": "tea", "ok": True}]
    with pytest.raises(ConfigError, match=r"only\.ok is"):
        bench.run(make_recipe([source, then("prompt", **knobs | {"only": {"ok": ["True"]}})]))


def test_a_program_that_reads_its_input_gets_no_row(bench: Bench, tmp_path: Path) -> None:
    code = "import subprocess\ndef f(row):\n    subprocess.run(['cat'], check=True)\n    return row\n"
    (tmp_path / "f.py").write_text(code)
    source = rows_from(tmp_path / "r.jsonl", [{"n": n} for n in range(3)])
    bench.run(make_recipe([source, then("python", function=f"{tmp_path}/f.py:f", timeout_s=20.0)]))
    assert len(columns(bench)) == 3


def test_columns_of_any_type_are_sampled_and_dropped_by_their_tag(bench: Bench, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"task": ["qa"], "tags": "not unsafe"}, {"task": "qa", "tags": 3}, {"task": "qa", "tags": ["unsafe"]},
    ]  # fmt: skip
    kept = {"name": "kept", "kind": "drop_tagged", "takes": ["in"]}
    stages = [rows_from(tmp_path / "r.jsonl", rows), kept, then("sample", n=1) | {"takes": ["kept"]}]
    bench.run(make_recipe(stages))
    assert len(columns(bench, "kept")) == len(columns(bench)) == 2
