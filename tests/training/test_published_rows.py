"""Rows as published data sets have them: each read whole, or refused by the name of what has no use."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.cli.main import main
from nemotron4.errors import ConfigError, DataError
from nemotron4.records import FieldError, Message
from nemotron4.training import stage
from nemotron4.training.dataset import Dataset
from nemotron4.training.encoding import Encoder, Problem, ReadRow
from nemotron4.training.inputs import build_encoder, encoded, read_data
from nemotron4.training.preview import marked
from nemotron4.training.reading import Ignored, TrainingSource, read_rows
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.rows import Fields
from tests import tiny_models
from tests.checkpoint.fake_hub import fake_hub

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def parse(kind: str, row: dict) -> object:
    fields = Fields(row)
    parsed = stage.kinds()[kind].parse(fields)
    fields.unread()
    return parsed


def said(messages: object) -> list[tuple[str, str]]:
    assert isinstance(messages, tuple)
    return [(message.role, message.content) for message in messages]


CHATS = {
    "alpaca": (
        {"instruction": "Name the capital of Peru.", "input": "", "output": "Lima."},
        [("user", "Name the capital of Peru."), ("assistant", "Lima.")],
    ),
    "alpaca with input": (
        {"instruction": "Say it.", "input": "The cat sleeps.", "output": "Le chat dort.", "system": "Brief."},
        [("system", "Brief."), ("user", "Say it.\n\nThe cat sleeps."), ("assistant", "Le chat dort.")],
    ),
    "alpaca with history": (
        {"instruction": "Chile?", "input": None, "output": "Santiago.", "history": [["Of Peru?", "Lima."]]},
        [("user", "Of Peru?"), ("assistant", "Lima."), ("user", "Chile?"), ("assistant", "Santiago.")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "sharegpt, open-perfectblend": (
        {
            "source": "x",
            "conversations": [
                {"from": "system", "value": "s"}, {"from": "human", "value": "Hi"},
                {"from": "bot", "value": "Yes"},
            ],
        },
        [("system", "s"), ("user", "Hi"), ("assistant", "Yes")],
    ),
    "tulu 3": (
        {"id": "a_1", "messages": [USER, ANSWER], "source": "ai2/x"},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "messages with a system column": (
        {"system": "Be brief.", "messages": [USER, ANSWER]},
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")],
    ),
    "nemo-rl": (
        {"messages": [USER, ANSWER], "task_name": "chat"},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), CHATS.values(), ids=CHATS)
def test_a_published_conversation_keeps_every_turn(row: dict, expected: list[tuple[str, str]]) -> None:
    assert said(parse("sft", row).messages) == expected


PAIRS = {
    "ultrafeedback binarized": (
        {
            "prompt": "Q", "prompt_id": "1", "score_chosen": 8.5, "score_rejected": 4.0,
            "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        },
        [("user", "Q")], ("A", "B"), (8.5, 4.0, None),
    ),
    "ultrafeedback, cleaned": (
        {
            "source": "evol", "prompt": "Q", "chosen-rating": 5.0, "chosen-model": "x",
            "rejected-rating": 2.5,
            "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
        },
        [("user", "Q")], ("A", "B"), (5.0, 2.5, None),
    ),
    "helpsteer2-preference": (
        {
            "split": "train", "prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": -2,
            "preference_statement": "@Response 1 is better", "preference_elaboration": "x",
            "three_most_similar_preferences": [{"statement": "y"}],
            "all_preferences_unprocessed": [{"strength": -2}],
        },
        [("user", "Q")], ("A", "B"), (None, None, 2.0),
    ),
    "helpsteer3": (
        {
            "domain": "general", "language": "english", "context": [{"role": "user", "content": "Q"}],
            "response1": "A", "response2": "B", "overall_preference": 1,
            "individual_preference": [{"score": 1, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
        },
        [("user", "Q")], ("B", "A"), (None, None, 1.0),
    ),
    "anthropic hh": (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: What?\n\nHuman: R\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nAssistant: What?\n\nHuman: R\n\nAssistant: B",
        },
        [("user", "Q"), ("assistant", "What?"), ("user", "R")], ("A", "B"), (None, None, None),
    ),
    "orca dpo": (
        {"system": "Think.", "question": "Q", "chosen": "A", "rejected": "B"},
        [("system", "Think."), ("user", "Q")], ("A", "B"), (None, None, None),
    ),
    "pku-saferlhf": (
        {
            "prompt": "Q", "response_0": "B", "response_1": "A", "prompt_source": "x",
            "response_0_source": "y",
            "is_response_0_safe": False, "is_response_1_safe": True, "response_0_severity_level": 2,
            "response_0_harm_category": {"x": True}, "better_response_id": 1, "safer_response_id": 1,
        },
        [("user", "Q")], ("A", "B"), (None, None, None),
    ),
    "nemo-rl": (
        {"context": [{"role": "user", "content": "Q"}], "completions": [
            {"rank": 0, "completion": [{"role": "assistant", "content": "A"}]},
            {"rank": 1, "completion": [{"role": "assistant", "content": "B"}]}]},
        [("user", "Q")], ("A", "B"), (None, None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "answers", "numbers"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("kind", ["preference", "reward_pairs"])
def test_a_published_pair_is_read_with_its_rewards(
    kind: str, row: dict, prompt: list[tuple[str, str]], answers: tuple[str, str], numbers: tuple[object, ...]
) -> None:
    pair = parse(kind, row)
    assert (said(pair.prompt), (pair.chosen, pair.rejected)) == (prompt, answers)
    assert (pair.chosen_reward, pair.rejected_reward, pair.strength) == numbers


def test_turn_markers_in_a_prompt_of_helpsteer2_are_turns() -> None:
    row = {
        "prompt": "Give me a fruit.\n<extra_id_1>Assistant\nApple.\n<extra_id_1>User\nAnother one.",
        "response": "Pear.", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1,
        "verbosity": 1,
    }  # fmt: skip
    assert said(parse("reward", row).conversation) == [
        ("user", "Give me a fruit."), ("assistant", "Apple."), ("user", "Another one."),
        ("assistant", "Pear."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "name"),
    [
        ("sft", {"system": "Be brief.", "prompt": "Q", "completion": "A"}, "system"),
        ("sft", {"messages": [USER, ANSWER], "history": [["a", "b"]]}, "history"),
        ("sft", {"messages": [USER, ANSWER], "rejected": "B"}, "rejected"),
        ("sft", {"messages": [USER, {**ANSWER, "reward": 3}]}, "reward"),
        ("sft", {"messages": [USER, ANSWER], "chosen-rating": 3}, "chosen-rating"),
        ("sft", {"messages": [USER, ANSWER], "Weight": 3}, "Weight"),
        ("preference", {"prompt": [USER], "chosen": "A", "rejected": "B", "weight": 0.5}, "weight"),
        ("reward", {"prompt": "Q", "response": "A", "helpfulness": 3, "score": 1}, "score"),
        ("kto", {"prompt": "Q", "completion": "A", "label": True, "images": ["x.png"]}, "images"),
        ("pretrain", {"text": "x", "loss_mask": [1]}, "loss_mask"),
        ("sft", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight"),
        ("sft", {"messages": [{"role": "humna", "content": "x"}, ANSWER]}, "humna"),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "image_url"),
    ],
)
def test_a_column_that_means_something_is_used_or_refused_by_name(kind: str, row: dict, name: str) -> None:
    with pytest.raises(FieldError, match=name):
        parse(kind, row)


def test_columns_without_meaning_are_named_once_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [USER, {**ANSWER, "model": "x", "refusal": None}], "source": "web", "id": 1}
    path.write_text(f"{json.dumps(row)}\n" * 3)
    ignored = Ignored()
    assert len(list(read_rows(TrainingSource(path=str(path)), stage.kinds()["sft"], ignored))) == 3
    assert ignored.lines() == [f"{path}: ignored: source, id, messages[].model"]


@pytest.fixture(scope="module")
def tools_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes tools, calls and what they return."""
    folder = tiny_models.nemotron_directory(tmp_path_factory.mktemp("model"))
    template = (
        "{% if tools %}{% for tool in tools %}T:{{ tool.function.name }}\n{% endfor %}{% endif %}"
        "{% for m in messages %}<extra_id_1>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}C:{{ c.function.name }} {{ c.function.arguments | tojson }}"
        "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<extra_id_1>assistant\n{% endif %}"
    )
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps(values | {"chat_template": template}))
    return folder


def encoder_of(folder: Path, max_length: int = 200, **settings: object) -> Encoder:
    checkpoint = open_checkpoint(folder)
    return Encoder(checkpoint.tokenizer(), checkpoint.prompt_format(), max_length, **settings)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_ROW = {
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "x"}, {"role": "assistant", "content": "Two."},
    ],
}  # fmt: skip
SHAREGPT_TOOL_ROW = {
    "tools": '[{"name": "add", "parameters": {}}]',
    "conversations": [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."},
    ],
}  # fmt: skip


@pytest.mark.parametrize("row", [TOOL_ROW, SHAREGPT_TOOL_ROW], ids=["openai", "sharegpt"])
def test_tools_and_their_calls_reach_the_template(tools_model: Path, row: dict) -> None:
    encoder = encoder_of(tools_model)
    kind = stage.kinds()["sft"]
    (segment,) = kind.sample(kind.parse(Fields(row)), encoder).segments
    text = marked(segment, encoder.tokenizer)
    assert text.startswith("T:add\n<extra_id_1>user\n1+1?<extra_id_1>assistant\n")
    assert '[[C:add {"a": 1}' in text
    assert "tool\n2<extra_id_1>" in text
    assert "[[Two." in text


def test_a_format_without_a_place_for_tools_refuses_them_by_name(tmp_path: Path) -> None:
    folder = tiny_models.nemotron_directory(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TOOL_ROW) + "\n")
    (problem,) = encoded(TrainingSource(path=str(path)), stage.kinds()["sft"], encoder_of(folder)).problems
    assert "tools" in problem.message


def test_a_message_of_weight_0_is_context_only(tools_model: Path) -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "Again"}]}
    kind, encoder = stage.kinds()["sft"], encoder_of(tools_model)
    (segment,) = kind.sample(kind.parse(Fields(row)), encoder).segments
    text = marked(segment, encoder.tokenizer)
    assert "[[Hello" not in text
    assert "[[Again" in text


def problems_of(folder: Path, kind: str, rows: list[object], tmp_path: Path, **settings: object) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    found = encoded(TrainingSource(path=str(path)), stage.kinds()[kind], encoder_of(folder, **settings))
    return [str(problem).removeprefix(f"{path}:") for problem in found.problems]


def test_a_lone_surrogate_or_nul_is_a_bad_row_with_file_and_line(tools_model: Path, tmp_path: Path) -> None:
    good = {"messages": [USER, ANSWER]}
    broken = r'{"messages":[{"role":"user","content":"emoji \ud83d"},{"role":"assistant","content":"x"}]}'
    nul = r'{"messages":[{"role":"user","content":"a\u0000b"},{"role":"assistant","content":"x"}]}'
    found = problems_of(tools_model, "sft", [broken, good, nul], tmp_path)
    assert [line[:2] for line in found] == ["1:", "3:"]
    assert "surrogate" in found[0]
    assert "NUL" in found[1]


def test_an_empty_answer_that_would_train_is_said(tools_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**ANSWER, "content": " "}]}, {"messages": [USER, ANSWER]}]
    (line,) = problems_of(tools_model, "sft", rows, tmp_path)
    assert line.startswith("1: messages[1] is an empty answer")


def test_a_pair_that_cutting_made_identical_is_said(tools_model: Path, tmp_path: Path) -> None:
    same = "word " * 30
    rows = [{"prompt": [USER], "chosen": same + "yes", "rejected": same + "no"}]
    (line,) = problems_of(tools_model, "preference", rows, tmp_path, max_length=20, over_long="cut")
    assert "the same after the cut" in line


def test_the_mismatch_of_kto_is_an_answer_to_another_prompt(tools_model: Path, tmp_path: Path) -> None:
    def row(prompt: str, completion: str) -> dict:
        return {"prompt": [{**USER, "content": prompt}], "completion": completion, "label": True}

    path = tmp_path / "kto.jsonl"
    rows = [row("P", "a"), row("P", "b"), row("Q", "c")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    encoder, kind = encoder_of(tools_model), stage.kinds()["kto"]
    others = [
        marked(sample.segments[1], encoder.tokenizer)
        for sample in encoded(TrainingSource(path=str(path)), kind, encoder)[:]
    ]
    assert [text.partition("[[")[2][0] for text in others] == ["c", "c", "a"]
    one, _ = problems_of(tools_model, "kto", rows[:2], tmp_path)
    assert "two prompts or more" in one


# ---- files


def texts_of(path: object, **settings: object) -> list[str]:
    found = list(read_rows(TrainingSource(path=str(path), **settings), stage.kinds()["pretrain"]))
    assert all(isinstance(row, ReadRow) for row in found), found
    return [row.row.text for row in found if isinstance(row, ReadRow)]


def test_a_file_that_begins_with_a_byte_order_mark_reads(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    assert texts_of(tmp_path / "a.jsonl") == ["x", "y"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_list_reads(tmp_path: Path, name: str) -> None:
    data = json.dumps([{"text": "x"}, {"text": "y"}], indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts_of(tmp_path / name) == ["x", "y"]


def test_lines_in_a_file_named_json_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert texts_of(tmp_path / "a.json") == ["x", "y"]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_table_of_texts_reads_numbers_and_lists_in_its_cells(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["prompt", "response", "helpfulness"], ["two\nlines", 'say "x"', 3]])
    (read,) = read_rows(TrainingSource(path=str(tmp_path / name)), stage.kinds()["reward"])
    assert isinstance(read, ReadRow)
    assert said(read.row.conversation) == [("user", "two\nlines"), ("assistant", 'say "x"')]
    assert read.row.attributes == {"helpfulness": 3}


def test_latin_1_is_named_and_reads_when_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"byte 0xe9, which is 'é' in Latin-1"):
        texts_of(tmp_path / "a.jsonl")
    assert texts_of(tmp_path / "a.jsonl", encoding="latin-1") == ["café"]


def test_utf_16_is_named_and_not_taken_for_latin_1(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "café"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16, not UTF-8"):
        texts_of(tmp_path / "a.jsonl")


def test_a_pattern_names_files_and_a_limit_the_first_rows(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    assert texts_of(tmp_path / "*.jsonl") == ["a1", "a2", "b1", "b2"]
    assert texts_of(tmp_path / "*.jsonl", limit=3) == ["a1", "a2", "b1"]
    with pytest.raises(DataError, match="no file has such a name"):
        texts_of(tmp_path / "*.csv")


def test_zstandard_frames_one_after_the_other_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(f'{{"text": "{text}"}}\n'.encode()) for text in "xy"]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts_of(tmp_path / "a.jsonl.zst") == ["x", "y"]


def test_columns_are_renamed_and_left_out_by_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"frage": "Q", "antwort": "A", "reward": 1}\n')
    settings = {"map": {"question": "frage", "answer": "antwort"}, "ignore": ("reward",)}
    (read,) = read_rows(TrainingSource(path=str(tmp_path / "a.jsonl"), **settings), stage.kinds()["sft"])
    assert isinstance(read, ReadRow)
    assert read.row.messages == (Message("user", "Q"), Message("assistant", "A"))
    (missing,) = read_rows(
        TrainingSource(path=str(tmp_path / "a.jsonl"), map={"prompt": "x"}), stage.kinds()["sft"]
    )
    assert isinstance(missing, Problem)


def test_repeated_warnings_are_one_line(
    tmp_path: Path, tools_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": [USER], "chosen": f"yes {i}", "rejected": "no"} for i in range(15)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["doctor", "data", str(tmp_path / "pairs.jsonl"), "--kind", "preference"]
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text(json.dumps({"q": " ".join(f"w{i}" for i in range(20))}) + "\n")
    more = ["--report", str(tmp_path / "report"), "--benchmark", str(benchmark)]
    assert main([*command, "--model", str(tools_model), *more]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2  # this template has no stop marker
    assert all("(and 14 more rows)" in line for line in warnings)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "trained tokens" in page
    assert "15 of 15 rows can train" in page
    assert f"compared with {benchmark}" in page
    assert "without rewards" in page


def test_a_row_that_repeats_a_benchmark_is_found(tmp_path: Path, tools_model: Path) -> None:
    from nemotron4.training.doctor import examine

    text = " ".join(f"w{i}" for i in range(20))
    (tmp_path / "bench.jsonl").write_text(json.dumps({"q": text}) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"So, {text.upper()}!"}) + "\n")
    found = examine(
        [TrainingSource(path=str(tmp_path / "a.jsonl"))],
        stage.kinds()["pretrain"],
        str(tools_model),
        benchmarks=[tmp_path / "bench.jsonl"],
    )
    assert [finding.topic for finding in found.findings] == ["contamination"]


def test_rows_are_rendered_once(tmp_path: Path, tools_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n{bad\n")
    kind, encoder = stage.kinds()["sft"], encoder_of(tools_model)
    first = encoded(TrainingSource(path=str(path)), kind, encoder)
    monkeypatch.setattr(Encoder, "chat", lambda *_: pytest.fail("rendered again"))
    second = encoded(TrainingSource(path=str(path)), kind, encoder)
    assert list(second) == list(first)
    assert second.problems == first.problems
    path.write_text(json.dumps({"messages": [USER, {**ANSWER, "content": "Other"}]}) + "\n")
    with pytest.raises(pytest.fail.Exception):
        encoded(TrainingSource(path=str(path)), kind, encoder)


def test_a_data_set_by_id_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the place of the id: the same call, and no network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split, num in (("train", 3), ("test", 1)):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{split}{i}"}}\n' for i in range(num)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts_of(f"hub:{folder}:train") == ["train0", "train1", "train2"]
    with pytest.raises(DataError, match="with the splits"):
        texts_of(f"hub:{folder}")


READ_HUB = """
import sys
from nemotron4.errors import DataError
from nemotron4.training.encoding import PlainText
from nemotron4.training.reading import TrainingSource, read_rows
for name in sys.argv[1:]:
    try:
        for read in read_rows(TrainingSource(path=name), PlainText()):
            print(read.where, read.row.text)
    except DataError as error:
        print(error.message, error.hint or "")
"""


def test_a_data_set_of_a_hub_is_fetched_once_and_read(tmp_path: Path) -> None:
    """In a process of its own (3 s), because the libraries read the hub's address when they are imported."""
    pytest.importorskip("datasets")
    files = {
        f"{split}.jsonl": "".join(f'{{"text": "{split}{i}"}}\n' for i in range(num)).encode()
        for split, num in (("train", 2), ("test", 1))
    }
    with fake_hub() as hub:
        hub.repositories["datasets/org/name"] = files
        names = ["hub:org/name:test", "hub:org/name:train", "hub:org/name", "hub:org/other"]
        done = subprocess.run(
            [sys.executable, "-c", READ_HUB, *names],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert sorted(hub.downloads) == sorted(files)
    said = done.stdout.splitlines()
    assert said[:2] == ["hub:org/name:test:1 test0", "hub:org/name:train:1 train0"], done.stderr
    assert said[2] == "hub:org/name:train:2 train1"
    assert "with the splits" in said[3]
    assert "hub:org/other: cannot be read" in said[4]


def test_sources_are_mixed_by_weight_in_every_stage(tmp_path: Path) -> None:
    model = tiny_models.nemotron_directory(tmp_path / "model")
    for name, word in (("a", "Apple"), ("b", "Pear")):
        rows = [{"messages": [USER, {**ANSWER, "content": f"{word} {i}"}]} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.jsonl").write_text('{"text": "A document."}\n')

    def build_recipe(*train: dict) -> Recipe:
        return build(
            {
                "stage": "sft",
                "model": {"start": str(model), "device": "cpu"},
                "data": {"train": list(train), "max_length": 100},
                "optimizer": {"learning_rate": 1e-3},
                "run": {"directory": str(tmp_path / "run"), "max_steps": 1},
            }
        )

    paths = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    recipe = build_recipe(
        {"path": paths[0], "weight": 3, "limit": 2},
        {"path": paths[1], "weight": 1},
        {"path": paths[2], "weight": 0.0, "kind": "pretrain"},
    )
    checkpoint = open_checkpoint(model)
    read = read_data(recipe, build_encoder(recipe, checkpoint, checkpoint.config))
    assert read.source_sizes == (2, 4, 1)
    data = Dataset(read.train, 0, read.source_sizes, recipe.data.shares)
    drawn = [data.at(i).where for i in range(400)]
    shares = [sum(where.startswith(path) for where in drawn) / 400 for path in paths]
    assert shares == pytest.approx([0.75, 0.25, 0], abs=0.06)
    assert len({where for where in drawn if where.startswith(paths[0])}) == 2
    with pytest.raises(ConfigError, match="give all of them one"):
        build_recipe({"path": paths[0], "weight": 3}, {"path": paths[1]})
    with pytest.raises(ConfigError, match=r"unknown key 'data.train\[0\].wieght'"):
        build_recipe({"path": paths[0], "wieght": 3})
