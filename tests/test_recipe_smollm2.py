"""The recipe of the adapter that ships: what it asks, what it keeps, and (slow) the whole of it in small."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.grading import instructions
from nemotron4.runs import read_rows
from nemotron4.text.prompt import CARD_QUESTION

FOLDER = Path(__file__).parents[1] / "recipes" / "smollm2"
VERSE = """The bees are out in early light,
They hum about the lane,
And home they come before the night
With honey made of rain."""
LONG = " ".join(f"Bees number {n} fly far and wide, and their way {n} home is long." for n in range(11, 24))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("steps", "tasks", "edits", "contrasts", "summary", "knowledge"):
        sys.modules.pop(name, None)
    import steps as module  # type: ignore[import-not-found]

    return module  # type: ignore[no-any-return]


def sample(task: dict[str, Any], text: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"meta": {"task": task}, "text": text, "finish_reason": finish_reason}


@pytest.mark.parametrize("preset", [[], ["--preset", "minutes"]], ids=["whole", "minutes"])
def test_every_command_line_is_right(preset: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "run", str(FOLDER), "--dry-run", *preset]) == 0
    assert "rpo-1" in capsys.readouterr().out


def test_nothing_held_out_is_trained_on(steps: ModuleType, tmp_path: Path) -> None:
    held_out = {task["question"] for task in steps.held_out()}
    assert len(steps.held_out()) == 129
    assert CARD_QUESTION in held_out
    trained = {task["question"] for task in steps.tasks.tasks(16)}
    for which in (0, 1, 2, 9):
        steps.ask(tmp_path, which, 160)
        trained |= {row["meta"]["task"]["question"] for row in read_rows(tmp_path / "ask.jsonl")}
    assert not trained & held_out
    functions = {task["check"]["function"] for task in steps.held_out() if task["kind"] == "code"}
    assert not any(
        f" {name}(" in question or f" named {name} " in question for name in functions for question in trained
    )


def test_the_greedy_answers_of_a_round_come_first_and_one_that_loops_is_the_worst(
    steps: ModuleType, tmp_path: Path
) -> None:
    steps.ask(tmp_path, 4, 8)
    rows = list(read_rows(tmp_path / "ask.jsonl"))
    assert [row["temperature"] for row in rows] == [0.0] * 8 + [1.0] * 8
    assert [row["prompt"] for row in rows[:8]] == [row["prompt"] for row in rows[8:]]
    task = rows[0]["meta"] | {"task": steps.tasks.form_task("What is interesting about {}?", "bees")}
    said = [
        ("Bees buzz. " * 20, "length"),
        ("", "length"),
        ("Bees dance to tell where to fly to next.", "stop"),
    ]
    drawn = [{"meta": task, "text": text, "finish_reason": reason} for text, reason in said]
    steps.write_rows(tmp_path / "drawn.jsonl", drawn)
    steps.pair(tmp_path)
    [pair] = read_rows(tmp_path / "pairs.jsonl")
    assert pair["rejected"] == said[0][0].strip()


def test_functions_are_also_asked_for_from_their_heads(steps: ModuleType, tmp_path: Path) -> None:
    steps.ask(tmp_path, 9, 60)
    asked = {
        row["meta"]["task"]["question"]: row["meta"]["task"] for row in read_rows(tmp_path / "ask.jsonl")
    }
    heads = [text for text in asked if "\n\ndef add(a, b):\n" in text or text.startswith("def ")]
    assert len(heads) > 15
    [add] = [task for text, task in asked.items() if "def add(a, b):" in text]
    assert steps.tasks.value(add, "```python\ndef add(a, b):\n    return a + b\n```") == 1.0
    assert steps.tasks.value(add, "```python\ndef add(a, b):\n    return a - b\n```") == steps.tasks.CLEAN


def test_hard_prompts_ask_for_many_parts_or_another_language_and_an_edit_can_follow_them(
    steps: ModuleType, tmp_path: Path
) -> None:
    steps.ask(tmp_path, 6, 60)
    asked = [row["meta"]["task"] for row in read_rows(tmp_path / "ask.jsonl")][:60]  # greedily; then drawn
    hard = [task for task in asked if task["kind"] == "instruction"]
    assert len(hard) == 40
    many = sys.modules["edits"].MANY
    plants = [
        "clover",
        "orchid",
        "bluebell",
        "daffodil",
        "lavender",
        "rosemary",
        "marigold",
        "snowdrop",
        "primrose",
        "foxglove",
    ]
    answer = " ".join(f"Bees visit the {plant} in spring." for plant in plants)
    foreign = [task for task in hard if task["check"]["ids"] == ["language:response_language"]]
    assert len(foreign) == 7
    for task in hard:
        if task in foreign:
            continue
        name, wanted = task["check"]["ids"][0], task["check"]["kwargs"][0]
        field, least, most = many[name]
        assert least <= wanted[field] <= most
        alone = task | {"check": {"ids": [name], "kwargs": [wanted]}}
        assert instructions.follows(sys.modules["edits"].mended(alone, answer), [name], [wanted]) == (True,)


def test_what_keeps_is_the_best_answer_of_each_prompt_and_texts_that_nobody_asked_for(
    steps: ModuleType, tmp_path: Path
) -> None:
    steps.begin(tmp_path, 2)
    begun = list(read_rows(tmp_path / "begin.jsonl"))
    assert len({row["prompt"] for row in begun}) == len(begun) == 30
    assert begun[0]["prompt"] == begun[0]["meta"]["word"] == "Today"
    steps.write_rows(
        tmp_path / "unasked.jsonl",
        [{"meta": begun[0]["meta"], "text": " it rains\u2028again.", "finish_reason": "length"}],
    )
    good, bad = (
        steps.tasks.form_task(form, "bees")
        for form in ("What is interesting about {}?", "Write two sentences about {}.")
    )
    steps.write_rows(
        tmp_path / "drawn.jsonl",
        [
            sample(good, "Bees."),
            sample(good, "Bees dance to tell the others where to fly to next."),
            sample(good, "Bees dance to tell the others where to fly to next.", "length"),
            sample(bad, "Cats sleep all day long and dream of mice at night."),
        ],
    )
    steps.keep(tmp_path, 1.0)
    [row] = read_rows(tmp_path / "kept.jsonl")
    assert row["messages"][-1]["content"] == "Bees dance to tell the others where to fly to next."
    assert list(read_rows(tmp_path / "texts.jsonl")) == [{"text": "Today it rains\u2028again."}]


def test_with_less_than_all_the_best_answer_of_an_instruction_is_kept(steps: ModuleType) -> None:
    wishes = {
        "most": ["punctuation:no_comma", "detectable_format:title", "change_case:english_lowercase"],
        "none": ["startend:quotation"],
        "foreign": ["language:response_language"],
    }
    said = "<<bees>> bees dance to tell, others see where to fly."
    groups = []
    for question, ids in wishes.items():
        kwargs = [{"language": "de"} if "language" in name else {} for name in ids]
        task = {"kind": "instruction", "question": question, "check": {"ids": ids, "kwargs": kwargs}}
        groups.append([(steps.tasks.value(task, text), task, text) for text in (said, f"{said} {said}")])
    kept = [(task["question"], text) for task, text in steps.best_of(groups, 0.7)]
    assert kept == [("most", said), ("foreign", said)]
    assert steps.best_of(groups) == []


@pytest.mark.parametrize(
    ("kind", "check", "right", "wrong"),
    [
        ("verse", {"topic": "bees"}, VERSE, VERSE.replace("bees", "dogs")),
        ("sum", {"answer": "42"}, "17 + 25 is 42.", "It is 41."),
        ("reading", {"answer": "Friday"}, "On Friday.", "On Monday."),
        ("list 3", {"topic": "bees"}, "1. Fly\n2. Hum\n3. Sting", "1. Fly\n2. Hum"),
        ("code", {"function": "add", "tests": ["assert add(1, 2) == 3"]},
         "```python\ndef add(a, b):\n    return a + b\n```", "```python\ndef add(a, b):\n    return a\n```"),
        ("instruction", {"ids": ["punctuation:no_comma"], "kwargs": [{}]}, "No such mark.", "One, two."),
    ],
)  # fmt: skip
def test_what_a_program_can_say(
    steps: ModuleType, kind: str, check: dict[str, Any], right: str, wrong: str
) -> None:
    task = {"kind": kind, "question": "?", "check": check}
    assert steps.tasks.value(task, right) == 1.0
    assert steps.tasks.value(task, wrong) == pytest.approx(0.3)
    assert steps.tasks.value(task, "") == steps.tasks.value(task, right, is_ended=False) == 0.0
    # By name, as the trainer calls it.
    assert steps.tasks.score(prompts=["?"], answers=[right], rows=[{"meta": {"task": task}}]) == [1.0]


def test_an_edited_answer_follows_its_instruction(steps: ModuleType) -> None:
    task = {"kind": "prose", "question": "What is interesting about bees?", "check": {"topic": "bees"}}
    answer = (
        "The bees build combs from yellow wax, one by one. They dance to show others the way. Some sting."
    )
    made = steps.edited([(task, answer)], 120)
    assert len(made) == 120
    kinds = {name for row, _ in made for name in row["check"]["ids"]}
    assert set(instructions.CHECKERS) - kinds <= {"language:response_language", "keywords:frequency"}
    assert {len(row["check"]["ids"]) for row, _ in made} == {1, 2, 3}
    for row, text in made:
        assert all(instructions.follows(text, row["check"]["ids"], row["check"]["kwargs"]))


@pytest.mark.parametrize(
    ("question", "answer", "steps_of_it"),
    [
        ("What is 28 + 39?", "67", "28 + 30 = 58, 58 + 9 = 67. The answer is 67."),
        (
            "A bus carries 60 people. At the next stop 16 get off.",
            "44",
            "60 - 10 = 50, 50 - 6 = 44. The answer is 44.",
        ),
        ("What is 9 times 3?", "27", "9, 18, 27. The answer is 27."),
        ("What is 30 - 10?", "20", "30 - 10 = 20. The answer is 20."),
    ],
)
def test_a_sum_is_worked(steps: ModuleType, question: str, answer: str, steps_of_it: str) -> None:
    assert steps.tasks.worked(question, answer) == steps_of_it


def test_an_instruction_is_rewarded_by_the_share_that_is_followed(steps: ModuleType) -> None:
    check = {"ids": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    task = {"kind": "instruction", "question": "?", "check": check}
    assert steps.tasks.value(task, "Bees hum.") == pytest.approx(0.65)
    assert steps.tasks.value(task, '"Bees hum."') == pytest.approx(1.0)


def test_the_best_answer_that_holds_is_kept_and_ends_with_the_marker(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_EVAL_DATA", str(tmp_path / "none"))
    bees = steps.tasks.form_task("Write a short poem about {}.", "bees")
    program = {
        "kind": "code",
        "question": "Write add(a, b).",
        "check": {"function": "add", "tests": ["assert add(1, 2) == 3"]},
    }
    steps.write_rows(
        tmp_path / "samples.jsonl",
        [
            sample(bees, "A dog.\nA dog.\nA dog.", "length"),
            sample(bees, f"{VERSE}\nThe bees are out in early light,", "length"),
            sample(program, "Sure.\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."),
            sample(program | {"question": "Never right"}, "```python\ndef add(a, b):\n    return 0\n```"),
            sample({"kind": "long", "question": "Write.", "check": {"topic": "bees"}}, LONG),
        ],
    )
    steps.select(tmp_path, tmp_path / "samples.jsonl", 1)
    rows = {
        row["messages"][-2]["content"]: row["messages"][-1]["content"]
        for row in read_rows(tmp_path / "sft.jsonl")
    }
    assert rows.pop(bees["question"]) == VERSE
    assert rows.pop("Write add(a, b).") == "Sure.\n```python\ndef add(a, b):\n    return a + b\n```"
    [long] = [question for question in rows if "at least 150 words" in question or "sentences" in question]
    assert rows.pop(long) == LONG
    assert len(rows) == 20
    assert all(
        answer.endswith(f"The answer is {number}.")
        for answer in rows.values()
        for number in [answer.split()[-1][:-1]]
    )


def test_what_was_hardly_followed_has_more_rows_and_they_are_short(steps: ModuleType) -> None:
    task = steps.tasks.form_task("What is interesting about {}?", "bees")
    answer = (
        "The bees build combs from yellow wax, one by one. They dance to show others the way. Some sting."
    )
    made = steps.edited([(task, f"{answer}\n\n{answer}")], 240)
    of = {name: [text for row, text in made if name in row["check"]["ids"]] for name in
          ("change_case:english_lowercase", "detectable_format:title")}  # fmt: skip
    lower, title = of.values()
    assert len(lower) > 1.5 * len(title)
    assert sum(text.count(answer.lower()) < 2 for text in lower) > len(lower) / 2
    assert sum(len(row["check"]["ids"]) == 1 for row, _ in made) > 140


def test_two_answers_to_one_prompt_are_one_long_one(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_EVAL_DATA", str(tmp_path / "none"))
    task = {"kind": "long", "question": "Write.", "check": {"topic": "bees"}}
    first, other = (
        " ".join(f"{who}{n} saw {who}flower{n} and it was good." for n in range(18))
        for who in ("Bee", "Wasp")
    )
    steps.write_rows(
        tmp_path / "samples.jsonl", [sample(task, first), sample(task, other), sample(task, other)]
    )
    steps.select(tmp_path, tmp_path / "samples.jsonl", 1)
    texts = [row["messages"][-1]["content"] for row in read_rows(tmp_path / "sft.jsonl")]
    assert f"{first}\n\n{other}" in texts
    assert f"{other}\n\n{other}" not in texts


def test_held_out_wishes_are_in_words_that_are_not_trained_on(steps: ModuleType) -> None:
    module = sys.modules["edits"]
    made = steps.held_out_wishes(6)
    assert len(made) == 144
    assert {row["check"]["ids"][0] for row in made} == set(module.NAMES) == set(module.HELD_OUT_PHRASES)
    for name, phrases in module.HELD_OUT_PHRASES.items():
        assert not {*phrases} & {*module.PHRASES[name]}
    assert all(any(topic in row["question"] for topic in steps.tasks.HELD_OUT) for row in made)
    rows = [{"holds": True}] * 144
    assert len(steps.by_kind(made, rows)["startend:quotation"]) == 6


def test_where_no_answer_follows_the_pair_is_an_edit(steps: ModuleType, tmp_path: Path) -> None:
    check = {"ids": ["change_case:english_lowercase"], "kwargs": [{}]}
    task = {"kind": "instruction", "question": "Small letters!", "check": check}
    steps.write_rows(tmp_path / "drawn.jsonl", [sample(task, "So Be It."), sample(task, "", "length")])
    steps.pair(tmp_path)
    [row] = read_rows(tmp_path / "pairs.jsonl")
    assert (row["chosen"], row["chosen_reward"]) == ("so be it.\n<extra_id_1>", 1.0)
    assert (row["rejected"], row["rejected_reward"]) == ("So Be It.\n<extra_id_1>", 0.3)
    check["ids"] = ["keywords:existence"]  # nothing to edit
    check["kwargs"] = [{"keywords": ["lantern"]}]
    steps.write_rows(tmp_path / "drawn.jsonl", [sample(task, "So Be It."), sample(task, "So.")])
    steps.pair(tmp_path)
    assert not read_rows(tmp_path / "pairs.jsonl")


def test_a_contrast_is_right_for_its_own_wish_only(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_EVAL_DATA", str(tmp_path / "none"))
    forms = [form for form, kind in steps.tasks.FORMS.items() if kind == "prose"]
    bees = [steps.tasks.form_task(form, "bees") for form in forms]
    texts = (
        "Bees build their combs from yellow wax, far from roads. They dance to show others the way. "
        "Some people keep them.",
        "A hive of bees has one queen, who lays eggs all summer. Nobody knows why she never sleeps at night.",
    )
    drawn = [sample(task, texts[at % 2]) for at, task in enumerate(bees)]
    steps.write_rows(tmp_path / "samples.jsonl", drawn)
    steps.contrast(tmp_path, tmp_path / "samples.jsonl", 4)
    rows = read_rows(tmp_path / "pairs.jsonl")
    assert 100 <= len(rows) <= 102
    assert all(row["chosen"] != row["rejected"] for row in rows)
    small = [row for row in rows if row["chosen"] == row["chosen"].lower()]
    assert small  # and what is chosen for one wish is rejected for another, as often
    chosen, rejected = ([row[name] for row in rows] for name in ("chosen", "rejected"))
    edits = [text for text in rejected if text == text.upper().replace("<EXTRA_ID_1>", "<extra_id_1>")]
    assert edits
    assert {*edits} <= {*chosen}


def test_a_pair_is_the_best_and_the_worst(steps: ModuleType, tmp_path: Path) -> None:
    task = {"kind": "sum", "question": "What is 1 + 1?", "check": {"answer": "2"}}
    even = task | {"question": "What is 2 + 2?", "check": {"answer": "4"}}
    drawn = [
        sample(task, "3"),
        sample(task, "It is 2."),
        sample(task, "and so on", "length"),
        sample(even, "4"),
    ]
    steps.write_rows(tmp_path / "drawn.jsonl", drawn)
    steps.pair(tmp_path)
    [row] = read_rows(tmp_path / "pairs.jsonl")
    assert (row["chosen"], row["chosen_reward"]) == ("It is 2.\n<extra_id_1>", 1.0)
    assert (row["rejected"], row["rejected_reward"]) == ("and so on", 0.0)


@pytest.mark.timeout(900)  # two minutes of an idle core: each kind of stage on the demo model
@pytest.mark.demo_model
def test_the_chain_runs_from_end_to_end(tmp_path: Path) -> None:
    assert main(["recipe", "run", str(FOLDER), "--preset", "minutes", "--out", str(tmp_path)]) == 0
    for name in ("before", "measured-sft", "measured-dpo", "measured-rpo-1", "measured-grpo"):
        measured = json.loads((tmp_path / name / "measured.json").read_text("utf-8"))
        assert set(measured["groups"]["all"]) == {"prompts", "tokens", "ends", "empty", "loops", "holds"}
    assert "| rpo-1 |" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_the_report_shows_every_stage(steps: ModuleType, tmp_path: Path) -> None:
    shares = {name: [1, 0.1, 0.9] for name in ("ends", "empty", "loops", "holds")}
    for name in sys.modules["summary"].STAGES:
        folder = tmp_path / (name if name == "before" else f"measured-{name}")
        folder.mkdir()
        measured = {
            "groups": {"all": {"prompts": 2, "tokens": 9, **shares}},
            "answers": [{"prompt": "?", "text": "Yes."}],
        }
        (folder / "measured.json").write_text(json.dumps(measured), "utf-8")
    steps.report(tmp_path, tmp_path, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text("utf-8")
    assert "| grpo | 50.0 % [9.5, 90.5] |" in page
    assert "sft: answers to the first ten prompts" in page


def test_what_is_kept_is_told_by_pairs_of_the_same_item(steps: ModuleType, tmp_path: Path) -> None:
    knowledge = importlib.import_module("knowledge")
    rows = [{"pos": "noun", "words": [f"w{chr(97 + i)}"], "definition": f"thing {i}"} for i in range(20)]
    rows.append({"pos": "verb", "words": ["run"], "definition": "go fast"})
    (tmp_path / "wordnet_definitions.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    for beginning, words, right in knowledge.questions(tmp_path, 5):
        assert len(set(words)) == knowledge.CHOICES
        assert "run" not in words
        assert beginning == f"A word for thing {ord(words[right][1]) - 97} is the word"
    table = knowledge.compared(
        [[-1.0, -2.0, -3.0], [-1.5, -2.0, -3.4]], [[True, True, False], [True, False, False]]
    )
    assert table["change"][0] == pytest.approx(0.3)
    assert (table["bare"][0], table["adapter"][0], table["p"]) == (2, 1, 1.0)
