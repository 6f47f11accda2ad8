"""What a row says reaches the tokens, or is refused by name: nothing of it is left out in silence."""

from __future__ import annotations

import csv
import datetime
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.cli.main import main
from nemotron4.errors import DataError
from nemotron4.records import FieldError, Message
from nemotron4.training import stage
from nemotron4.training.cache import source_hashes
from nemotron4.training.encoding import Encoder, Problem, ReadRow
from nemotron4.training.inputs import encoded, read_data
from nemotron4.training.preview import shown
from nemotron4.training.prompts import PromptKind
from nemotron4.training.reading import TrainingSource, hub_rows, read_rows
from nemotron4.training.recipe import build
from nemotron4.training.rows import Fields
from tests import tiny_models

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def parse(kind: str, row: dict[str, Any]) -> Any:
    fields = Fields(row)
    parsed = stage.kinds()[kind].parse(fields)
    fields.unread()
    return parsed


def read(path: Path, kind: str) -> list[ReadRow | Problem]:
    return list(read_rows(TrainingSource(path=str(path)), stage.kinds()[kind]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("lose") / "model")


def encoder_of(folder: Path, **settings: Any) -> Encoder:
    checkpoint = open_checkpoint(folder)
    return Encoder(checkpoint.tokenizer(), checkpoint.prompt_format(), **{"max_length": 200, **settings})


@pytest.mark.parametrize(
    ("kind", "row", "written"),
    [
        ("reward", {"messages": [USER, CALLS], "attributes": {"helpfulness": 3}}, '"name": "f"'),
        ("reward_pairs", {"prompt": [USER, CALLS, USER], "chosen": "A", "rejected": "B"}, '"name": "f"'),
        (
            "reward_pairs",
            {"prompt": [USER], "chosen": "A", "rejected": "B", "tools": [{"name": "fetch"}]},
            '"name": "fetch"',
        ),
    ],
)
def test_a_judged_conversation_keeps_its_tools_as_text(
    model: Path, tmp_path: Path, kind: str, row: dict[str, Any], written: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    encoder = encoder_of(model, max_length=2000)
    found = encoded(TrainingSource(path=str(tmp_path / "a.jsonl")), stage.kinds()[kind], encoder)
    assert not found.problems
    for segment in found.sample(0).segments:
        assert written in encoder.tokenizer.decode(segment.tokens)


def test_the_system_prompt_of_openorca_is_read_and_refused_where_it_has_no_place() -> None:
    row = {"id": "a", "system_prompt": "Be brief.", "question": "Hi?", "response": "Hello."}
    assert parse("sft", row).messages[0] == Message("system", "Be brief.")
    with pytest.raises(FieldError, match="a system text needs messages"):
        parse("sft", {"system_prompt": "Be brief.", "prompt": "Hi?", "response": "Hello."})


def test_an_answer_of_weight_0_is_refused_where_it_alone_would_train() -> None:
    with pytest.raises(FieldError, match="'completion' has no answer that trains"):
        parse("sft", {"prompt": [USER], "completion": [{**ANSWER, "weight": 0}]})


def test_a_text_before_answers_that_are_messages_is_the_user_s_turn() -> None:
    pair = parse(
        "preference", {"prompt": "Hi", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No"}]}
    )
    judged = parse("kto", {"prompt": "Hi", "completion": [ANSWER], "label": True})
    assert pair.prompt == judged.prompt == (Message("user", "Hi"),)
    assert parse("preference", {"prompt": "Hi", "chosen": "A", "rejected": "B"}).prompt == "Hi"
    chat = parse("sft", {"system": "Be brief.", "prompt": "Hi", "completion": [ANSWER]})
    assert chat.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
    )


@pytest.mark.parametrize("asked", [{"question": "Q"}, {"instruction": "Q"}])
@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_messages_are_the_prompt_also_next_to_a_question(asked: dict[str, str], name: str) -> None:
    row = {**asked, name: [{"role": "system", "content": "S"}, USER], "answer": "4"}
    found = PromptKind(is_row_judged=True).parse(Fields(row))
    assert [message.content for message in found.prompt] == ["S", "Hi"]
    assert found.fields == row


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"context": "A passage."}, "'question' or 'context'"),
        ({"images": ["a.png"]}, "'images' carries meaning"),
    ],
)
def test_what_a_prompt_would_have_shown_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        parse("prompts", {"question": "Q", "answer": "4", **more})


def test_a_completion_may_be_calls_and_answers() -> None:
    tool = {"role": "tool", "content": "3"}
    found = parse("sft", {"prompt": [USER, ANSWER, USER], "completion": [CALLS, tool, ANSWER]})
    assert [m.trains for m in found.messages if m.role == "assistant"] == [False, True, True]
    assert found.messages[3].more["tool_calls"]


def test_a_prompt_that_repeats_a_turn_of_the_messages_is_read() -> None:
    assert len(parse("sft", {"prompt": "Hi", "messages": [USER, ANSWER]}).messages) == 2
    with pytest.raises(FieldError, match="'prompt' carries meaning"):
        parse("sft", {"prompt": "Other", "messages": [USER, ANSWER]})


@pytest.mark.parametrize("more", [{"train_detail": [{}]}, {"trainable": False}, {"reasoning": "So."}])
def test_what_says_how_a_message_trains_is_no_ignored_column(more: dict[str, Any]) -> None:
    untrained = {**ANSWER, "training": False}
    assert not parse("sft", {"messages": [USER, untrained, USER, ANSWER]}).messages[1].trains
    with pytest.raises(FieldError, match="carries meaning"):
        parse("sft", {"messages": [USER, {**ANSWER, **more}]})


def test_a_mapped_column_may_be_null_in_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [USER, ANSWER], "sys": text} for text in ("Be brief.", None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = TrainingSource(path=str(tmp_path / "a.parquet"), map={"system": "sys"})
    found = [each.row for each in read_rows(source, stage.kinds()["sft"]) if isinstance(each, ReadRow)]
    assert [len(row.messages) for row in found] == [3, 2]


def test_a_data_set_of_the_hub_has_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: object, split: str) -> list[object]:
        asked.append((*names, split))
        return []

    fake = SimpleNamespace(load_dataset=load, Dataset=list)
    monkeypatch.setattr("nemotron4.training.reading.import_optional", lambda *_: fake)
    for name in ("org/name/main:train", "org/name:test"):
        hub_rows(f"hub:{name}")
    assert asked == [("org/name", "main", "train"), ("org/name", None, "test")]


@pytest.mark.parametrize("name", ["train", "loss"])
def test_a_user_s_message_that_should_train_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match=f"{name!r} is True, and only the assistant's messages can train"):
        parse("sft", {"messages": [{**USER, name: True}, ANSWER]})
    assert parse("sft", {"messages": [{**USER, name: False}, {**ANSWER, name: True}]}).messages[1].trains


@pytest.mark.parametrize("arguments", ["not json", "[1]", 3])
def test_arguments_of_a_call_are_an_object(arguments: object) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(FieldError, match="expected a JSON object"):
        parse("sft", {"messages": [USER, {**CALLS, "tool_calls": [call]}]})
    called = {"from": "tool_call", "value": json.dumps({"name": "f", "arguments": arguments})}
    with pytest.raises(FieldError, match="expected a JSON object"):
        parse("sft", {"conversations": [{"from": "human", "value": "Hi"}, called]})


def test_messages_in_the_cells_of_a_table_do_not_train_as_text(tmp_path: Path) -> None:
    answers = [[USER, ANSWER], [USER, {**ANSWER, "content": "Go"}]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow(["Hi", *map(json.dumps, answers)])
        writer.writerow(["Hi", *map(str, answers)])  # as pandas writes them
    good, bad = read(tmp_path / "a.csv", "preference")
    assert isinstance(good, ReadRow)
    assert (good.row.prompt, good.row.chosen) == ((Message("user", "Hi"),), "Hello")
    assert isinstance(bad, Problem)
    assert "not in JSON" in bad.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n'),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]'),
        ("a.csv", "prompt,prompt\na,b\n"),
    ],
)
def test_of_two_columns_with_one_name_none_is_taken_in_silence(
    tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    try:
        [problem] = read(path, "prompts")
        assert isinstance(problem, Problem)
        message = problem.message
    except DataError as error:
        message = error.message
    assert "twice" in message or "one name" in message


def test_a_second_prompt_is_refused_unless_a_judge_reads_it() -> None:
    rows = (
        {"prompt": "a", "messages": [USER]},
        {"prompt": "a", "question": "b"},
        {"instruction": "a", "text": "b"},
    )
    for row in rows:
        with pytest.raises(FieldError, match="carries meaning, and nothing reads it"):
            parse("prompts", row)
    for kind in (PromptKind(is_row_judged=True), PromptKind(row_fields=("text",))):
        fields = Fields({"prompt": "a", "text": "b"})
        assert kind.parse(fields).prompt == "a"
        assert fields.unread() == []


def test_arguments_of_other_calls_do_not_come_with_a_table_s_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": {name: 1}}}]}]}
        for name in "ab"
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [each.row for each in read(tmp_path / "a.parquet", "sft") if isinstance(each, ReadRow)]
    calls = [row.messages[1].more["tool_calls"][0]["function"]["arguments"] for row in found]
    assert calls == [{"a": 1}, {"b": 1}]


def test_rows_that_are_cut_are_told(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [USER, {**ANSWER, "content": text}]} for text in ("word " * 90, "ok", "word " * 99)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = encoder_of(model, max_length=60, over_long="cut")
    for _ in range(2):  # made, and from the cache
        found = encoded(TrainingSource(path=str(path)), stage.kinds()["sft"], encoder)
        assert found.facts["ignored"] == [f"{path}: 2 rows cut to data.max_length, 60 tokens"]


def test_a_weighted_source_without_a_row_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    (tmp_path / "b.jsonl").write_text("")

    def read_weighted(weight: float) -> int:
        train = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}]
        train += [{"path": str(tmp_path / "b.jsonl"), "weight": weight}]
        recipe = build(
            {
                "stage": "sft",
                "model": {"start": str(model), "device": "cpu"},
                "data": {"train": train, "max_length": 100},
                "optimizer": {"learning_rate": 1e-3},
                "run": {"directory": str(tmp_path / "run"), "max_steps": 1},
            }
        )
        return len(read_data(recipe, encoder_of(model)).train)

    assert read_weighted(0) == 1
    with pytest.raises(DataError, match=r"b\.jsonl: no row of it can train, and its weight is 0\.5"):
        read_weighted(0.5)


def test_clean_rows_of_a_table_with_dates_are_written(model: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"prompt": "Hi", "response": "Yes", "when": datetime.datetime(2026, 11, 30)}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    clean = tmp_path / "clean.jsonl"
    options = ["--kind", "sft", "--model", str(model), "--write-clean", str(clean)]
    assert main(["doctor", "data", str(tmp_path / "a.parquet"), *options]) == 0
    assert json.loads(clean.read_text())["when"] == "2026-11-30 00:00:00"


def test_a_new_version_of_a_hub_s_data_set_is_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for version in "ab":
        data = SimpleNamespace(cache_files=[{"filename": f"/cache/{version}/train.arrow"}])
        monkeypatch.setattr("nemotron4.training.cache.hub_rows", lambda _, data=data: data)
        found.append(source_hashes(TrainingSource(path="hub:org/name:train")))
    assert found[0] != found[1]


def test_a_document_ends_with_the_end_of_text(model: Path) -> None:
    encoder = encoder_of(model)
    tokenizer = encoder.tokenizer
    assert tokenizer.bos_id != tokenizer.eos_id
    assert shown(encoder.document("Hi").tokens, tokenizer) == "<s>Hi</s>"


def test_compressed_rows_that_are_cut_short_are_an_error(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(10_000))
    data = zstandard.compress(lines)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data)
    assert len(read(path, "pretrain")) == 10_000
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut short"):
        read(path, "pretrain")


def test_an_empty_text_of_a_corpus_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    first, second = read(path, "pretrain")
    assert isinstance(first, ReadRow)
    assert isinstance(second, Problem)
    assert str(second) == f"{path}:2: field 'text' is empty, so nothing would train"
