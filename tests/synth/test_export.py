"""Files, forms, card, ancestry, merge of shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from nemotron4.cli.main import main
from nemotron4.errors import DataError
from nemotron4.records import Conversation, PreferencePair, read, read_json_lines, write
from nemotron4.synth.check import check
from nemotron4.synth.execute import parse_shard, run_recipe
from nemotron4.synth.export import _write_parquet, export
from nemotron4.synth.ledger import Reader, ancestry, find_record
from nemotron4.synth.merge import merge
from nemotron4.synth.recipe import SynthRecipe, load_saved_recipe
from tests.synth.conftest import PIPELINE, Bench

MakeRecipe = Callable[..., SynthRecipe]
SOURCES = {
    "licence": "cc-by-4.0",
    "sources": ["made up"],
    "preference": ["judge"],
    "sft": ["judge"],
    "prompts": ["open", "dedup"],
}


def test_every_row_is_written_in_every_form(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(export=SOURCES)
    bench.run(made)
    done = export(bench.folder, made)
    pairs = list(read(done.folder / "preference.jsonl", PreferencePair))
    assert len(pairs) == len(bench.rows("judge")) == done.counts["preference.jsonl"]
    assert [pair.id for pair in pairs] == sorted(record.hex() for record in bench.rows("judge"))
    assert all(pair.chosen_reward == 1.0 and pair.rejected_reward == 0.0 for pair in pairs)
    chats = list(read(done.folder / "sft.jsonl", Conversation))
    assert [chat.messages[-1].content for chat in chats] == [pair.chosen for pair in pairs]
    prompts = [row for _, row in read_json_lines(done.folder / "prompts.jsonl")]
    stages = [(stage, record.hex()) for stage in ("open", "dedup") for record in bench.rows(stage)]
    assert sorted((row["meta"]["stage"], row["id"]) for row in prompts) == sorted(stages)
    _, trl = next(read_json_lines(done.folder / "preference.trl.jsonl"))
    assert trl["chosen"] == [{"role": "assistant", "content": pairs[0].chosen}]
    _, aligner = next(read_json_lines(done.folder / "preference.nemo_aligner.jsonl"))
    question = pairs[0].prompt[0].content
    expected = f"<extra_id_0>System\n\n<extra_id_1>User\n{question}\n<extra_id_1>Assistant\n"
    assert aligner["prompt"] == expected
    assert aligner["chosen_response"] == f"{pairs[0].chosen}\n<extra_id_1>"


def test_rows_of_several_stages_name_their_own(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(export={"prompts": ["open", "dedup"]})
    bench.run(made)
    rows = [row for _, row in read_json_lines(export(bench.folder, made).folder / "prompts.jsonl")]
    for stage in ("open", "dedup"):
        named = [row["id"] for row in rows if row["meta"]["stage"] == stage]
        assert named == sorted(record.hex() for record in bench.rows(stage))


def test_parquet_holds_the_same_rows(bench: Bench, recipe: MakeRecipe) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made = recipe(export=SOURCES)
    bench.run(made)
    done = export(bench.folder, made)
    card = (done.folder / "README.md").read_text("utf-8")
    files = [line.split()[-1] for line in card.splitlines() if "data_files:" in line]
    assert files == ["sft.parquet", "preference.parquet", "prompts.parquet"]  # one format, or none is loaded
    assert [len(parquet.read_table(done.folder / file)) for file in files] == [
        done.counts[file.replace("parquet", "jsonl")] for file in files
    ]
    table = parquet.read_table(done.folder / "preference.parquet")
    assert table.column("chosen").to_pylist() == [
        row["chosen"] for _, row in read_json_lines(done.folder / "preference.jsonl")
    ]


def test_an_export_without_pyarrow_says_that_there_is_no_parquet(
    bench: Bench, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(export=SOURCES)
    bench.run(made)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = export(bench.folder, made)
    assert not list(done.folder.glob("*.parquet"))
    [note] = done.notes
    assert "no Parquet was written: Parquet needs the package pyarrow" in note


def test_the_card_says_where_rows_come_from_and_what_was_left_out(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(export=SOURCES)
    bench.run(made)
    card = (export(bench.folder, made).folder / "README.md").read_text("utf-8")
    for text in (
        "license: cc-by-4.0",
        "made up",
        "config_name: preference",
        "judge disagrees with itself",
        "50 % is no position bias",
        "chosen answer is the longer one",
        "not compared with any benchmark",
        "contain errors",
    ):
        assert text in card


def test_an_unfinished_run_is_exported_only_when_asked(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(budget={"calls": 60})
    bench.run(made)
    with pytest.raises(DataError, match="pieces of work are pending"):
        export(bench.folder, made)
    done = export(bench.folder, made, is_partial_allowed=True)
    assert "was not finished" in (done.folder / "README.md").read_text("utf-8")


def test_an_export_that_fails_leaves_the_old_one(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(PIPELINE[:5], export={"prompts": ["dedup"]})
    bench.run(made)
    before = (export(bench.folder, made).folder / "prompts.jsonl").read_bytes()
    wrong = recipe(PIPELINE[:5], export={"preference": ["respond"]})
    with pytest.raises(DataError, match="preference needs judged pairs"):
        export(bench.folder, wrong)
    assert (bench.folder / "export" / "prompts.jsonl").read_bytes() == before
    assert not list(bench.folder.glob(".export*"))


def test_a_saved_recipe_is_the_recipe(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(export=SOURCES)
    bench.run(made)
    assert load_saved_recipe(bench.folder) == made


def test_every_row_explains_itself(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe())
    record = next(iter(bench.rows("judge")))
    with Reader(bench.folder / "ledger.sqlite") as ledger:
        steps = ancestry(ledger, find_record(ledger, record.hex()[:14]))
    assert [step["stage"] for step in steps] == [
        "root:macro", "macro", "sub", "open", "dedup", "respond", "judge",
    ]  # fmt: skip
    assert steps[1]["row"]["topic"] in steps[0]["calls"][0]["reply"]["text"]
    assert len(steps[4]["calls"]) == 2
    assert {call["reply"]["text"].strip() for call in steps[5]["calls"]} <= {"[[A]]", "[[B]]"}
    with (
        Reader(bench.folder / "ledger.sqlite") as ledger,
        pytest.raises(DataError, match="no record's id starts with 'zz'"),
    ):
        find_record(ledger, "zz")


def sharded(roots: int) -> list[dict[str, Any]]:
    return [PIPELINE[0] | {"knobs": {"n": 3, "roots": roots}}, *PIPELINE[1:]]


def test_shards_merge_into_the_run_that_was_never_cut(tmp_path: Path, recipe: MakeRecipe) -> None:
    made = recipe(sharded(6), export={"prompts": ["judge"]})
    run_recipe(made, tmp_path / "whole")
    whole = export(tmp_path / "whole", made)
    shards = [tmp_path / f"shard{i}" for i in range(3)]
    for i, shard in enumerate(shards):
        run_recipe(made, shard, shard=(i, 3))
    for name, order in (("merged", shards), ("merged again", shards[::-1])):
        merge(order, tmp_path / name, check(made))
        merge(order[:1], tmp_path / name, check(made))  # what is in already changes nothing
        run_recipe(made, tmp_path / name)
        done = export(tmp_path / name, made)
        for path in whole.folder.iterdir():
            assert (done.folder / path.name).read_bytes() == path.read_bytes()


def test_shards_of_another_recipe_are_refused(tmp_path: Path, recipe: MakeRecipe) -> None:
    run_recipe(recipe(sharded(2)), tmp_path / "a", shard=(0, 2))
    run_recipe(recipe(sharded(3)), tmp_path / "b", shard=(1, 2))
    with pytest.raises(DataError, match="another recipe"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", check(recipe(sharded(2))))


def test_a_shard_is_written_as_index_and_number() -> None:
    assert parse_shard("2/8") == (2, 8)
    for wrong in ("8/8", "x/2", "1", "-1/2"):
        with pytest.raises(Exception, match="expected INDEX/NUMBER"):
            parse_shard(wrong)


TOML = """
name = "cli"
durable = "kill"
[endpoint.gen]
form = "fake"
[[stage]]
name = "macro"
kind = "macro_topics"
knobs = {n = 2, roots = 4}
[[stage]]
name = "open"
kind = "open_questions"
takes = ["macro"]
knobs = {n = 3}
[export]
prompts = ["open"]
"""


def test_the_commands_work_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> str:
        assert main(["synth", *arguments]) == 0
        return capsys.readouterr().out

    path, out = tmp_path / "recipe.toml", str(tmp_path / "run")
    path.write_text(TOML, "utf-8")
    done = json.loads(command("run", str(path), "--out", out, "--json"))
    assert done["ending"] == "finished"
    assert done["accounting"]["balanced"] is True
    assert "the accounting balances" in command("status", out)
    plan = json.loads(command("plan", str(path), "--like", out, "--json"))
    assert plan["calls"] == done["calls"] == 12
    exported = json.loads(command("export", out, "--json"))
    assert exported["rows"]["prompts.jsonl"] == 24
    shown = json.loads(command("preview", str(path), "-n", "1", "--set", "stage.1.knobs.n=1", "--json"))
    assert shown["rows"]["open"]["task"] == "open_qa"
    first = json.loads(Path(exported["folder"], "prompts.jsonl").read_text("utf-8").splitlines()[0])
    assert json.loads(command("show", out, first["id"]))[-1]["id"] == first["id"]
    assert command("retry", out, "--quiet") == ""
    assert main(["synth", "status", str(tmp_path / "nowhere")]) == 1
    assert "there is no ledger here" in capsys.readouterr().err


def test_texts_that_look_like_dates_stay_texts_in_parquet(tmp_path: Path) -> None:
    row = {
        "id": "2024-01-01",
        "messages": [{"content": "2024-05-05"}],
        "meta": {"topic": "2024-06-06"},
        "n": 1,
    }
    counts = {"sft.jsonl": write(tmp_path / "sft.jsonl", [row] * 2)}
    _write_parquet(tmp_path, counts)
    assert pyarrow.parquet.read_table(tmp_path / "sft.parquet").to_pylist() == [row] * 2
