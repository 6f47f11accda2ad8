"""Stages and judges on the fake: what goes in, what comes out, and what is dropped for which reason."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4.client import FakeBehaviour, Sampling
from nemotron4.client.fake import Script, fake_attributes, scripted_reply
from nemotron4.errors import ConfigError, DataError
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.runs import IncompleteError
from nemotron4.synth.judges import CARD_WEIGHTS, judge_report
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.rows import decode, encode
from nemotron4.synth.stage import load_prompts
from nemotron4.synth.stages import KINDS
from nemotron4.synth.stages.dialogue import strip_politeness
from nemotron4.synth.stages.topic_following import parse_dialogue
from tests.synth.conftest import Bench

MakeRecipe = Callable[..., SynthRecipe]
PreparedStage = dict[str, Any]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return str(path)


def prompts_from(path: Path, rows: Sequence[dict[str, Any]], **knobs: Any) -> PreparedStage:
    knobs = {"file": write_lines(path, rows), "task": "test"} | knobs
    return {"name": "in", "kind": "prompt_file", "knobs": knobs}


def topics(*names: str, area: str = "general") -> PreparedStage:
    return {"name": "in", "kind": "given_topics", "knobs": {"topics": list(names), "area": area}}


def then(kind: str, takes: str = "in", name: str = "out", **fields: Any) -> PreparedStage:
    return {"name": name, "kind": kind, "takes": [takes], **fields}


def answering(*answers: str) -> Script:
    """A model that gives these answers in turn, by the sample's place, whatever is asked."""
    given: dict[str, int] = {}

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        number = given.get(messages[-1].content, 0)
        given[messages[-1].content] = number + 1
        return answers[number % len(answers)]

    return script


def values(bench: Bench, stage: str = "out") -> list[Any]:
    return [decode(row) for row in bench.rows(stage).values()]


def filtered(bench: Bench, recipe: SynthRecipe, stage: str = "out") -> dict[str, int]:
    return bench.accounting(recipe).stage(stage).filtered


def test_every_kind_has_its_prompts_in_the_book_and_every_text_is_used() -> None:
    book = load_prompts()
    used = {name for kind in KINDS.values() for name in kind.prompts}
    assert used == set(book.names())


def test_rows_survive_the_ledger(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe([topics("tea"), then("open_questions", name="q"), then("if_single", "q", "c"),
                   then("respond", "c", "r"), then("judge_llm", "r", "j")])  # fmt: skip
    bench.run(
        made, FakeBehaviour(script=lambda m, s: "[[A]]" if "[[A]]" in m[-1].content else scripted_reply(m, s))
    )
    for stage in ("in", "q", "c", "r", "j"):
        for row in bench.rows(stage).values():
            assert encode(decode(row)) == row


def test_maths_topics_are_asked_for_per_school_level(bench: Bench, recipe: MakeRecipe) -> None:
    macro = {"name": "in", "kind": "macro_topics", "knobs": {"n": 2, "area": "math", "levels": ["a", "b"]}}
    bench.run(
        recipe(
            [
                macro,
                then("subtopics", name="sub", knobs={"n": 2}),
                then("math_problems", "sub", knobs={"n": 3}),
            ]
        )
    )
    assert [len(bench.rows(name)) for name in ("in", "sub", "out")] == [4, 12, 36]
    assert {row.level for row in values(bench, "in")} == {"a", "b"}
    assert {row.task for row in values(bench)} == {"math"}


def test_python_problems_are_written_for_each_audience(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe([topics("dict", area="python"), then("python_problems", knobs={"n": 2})]))
    assert sorted(row.meta["level"] for row in values(bench)) == [
        "advanced", "advanced", "beginner", "beginner", "intermediate", "intermediate",
    ]  # fmt: skip


def test_writing_tasks_draw_materials_for_each_topic(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(
        recipe([topics("tea", "bread"), then("writing_tasks", knobs={"n": 3, "materials_per_topic": 2})])
    )
    assert len(values(bench)) == 12
    assert len({(row.topic, row.meta["material"]) for row in values(bench)}) == 4


def test_revisions_stand_beside_their_draft(bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(
        recipe(
            [
                topics("tea"),
                then("open_questions", name="q", knobs={"n": 2}),
                then("revise", "q", knobs={"n": 3}),
            ]
        )
    )
    forms = [row.form for row in values(bench)]
    assert (forms.count("draft"), forms.count("revision")) == (2, 6)


def test_closed_questions_carry_document_and_request(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    text = "Tea {document} grows on hills. " * 20
    file = write_lines(tmp_path / "d.jsonl", [{"id": "d1", "text": text}, {"id": "d2", "text": "too short"}])
    made = recipe(
        [
            {"name": "in", "kind": "documents", "knobs": {"file": file}},
            then("closed_questions", knobs={"n": 4}),
        ]
    )
    bench.run(made)
    assert filtered(bench, made, "in") == {"document length": 1}
    assert len(values(bench)) == 4
    for row in values(bench):
        assert text in row.text
        assert row.meta["request"] in row.text
        assert row.document_id == "d1"


def test_keywords_pass_by_the_first_word_of_the_verdict(bench: Bench, recipe: MakeRecipe) -> None:
    def verdict(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        return "Yes, it is." if "integral" in text else "No" if "poem" in text else "Perhaps"

    made = recipe([topics("integral", "poem", "cloud"), then("entity_filter", knobs={"area": "math"})])
    bench.run(made, FakeBehaviour(script=verdict))
    accounting = bench.accounting(made).stage("out")
    assert [row.topic for row in values(bench)] == ["integral"]
    assert accounting.filtered == {"not math": 1}
    assert accounting.failed == {"content: no_verdict": 1}


@pytest.mark.parametrize("kind", ["if_single", "if_persistent"])
def test_constraints_are_said_in_the_prompt(kind: str, bench: Bench, recipe: MakeRecipe) -> None:
    bench.run(recipe([topics("tea"), then("open_questions", name="q", knobs={"n": 20}), then(kind, "q")]))
    drafts = {row.text for row in values(bench, "q")}
    for row in values(bench):
        assert row.task == "instructions"
        assert 1 <= len(row.constraints) <= 2
        assert all(constraint.text in row.text for constraint in row.constraints)
        assert any(draft in row.text for draft in drafts)


def test_the_second_turn_asks_to_revise_the_first_answer(bench: Bench, recipe: MakeRecipe) -> None:
    questions = then("open_questions", name="q", knobs={"n": 3})
    bench.run(recipe([topics("tea"), questions, then("respond", "q", "r"),
                      then("if_second_turn", "r")]))  # fmt: skip
    for row in values(bench):
        assert [message.role for message in row.messages] == ["user", "assistant", "user"]
        assert row.constraints[0].text in row.text


def test_only_the_drawn_share_gets_constraints(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(
        [
            topics("tea"),
            then("open_questions", name="q", knobs={"n": 40}),
            then("if_single", "q", knobs={"share": 0.5}),
        ]
    )
    bench.run(made)
    assert 8 < len(values(bench)) < 32
    assert filtered(bench, made)["not drawn"] == 40 - len(values(bench))


GSM8K = [{"question": "2 + 2?", "answer": "Easy.\n#### 4"}]
KNOBS = {"text_field": "question", "answer_field": "answer", "answer_after": "####"}


def judged(bench: Bench, made: SynthRecipe, script: Script) -> dict[str, int]:
    bench.run(made, FakeBehaviour(script=script))
    return filtered(bench, made)


def test_truth_pairs_a_right_with_a_wrong_answer(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", GSM8K, **KNOBS)
    made = recipe([prompts, then("respond", name="r", knobs={"k": 3}),
                   then("judge_truth", "r")])  # fmt: skip
    judged(bench, made, answering("It is 5.", "It is 4.", "It is 6."))
    (row,) = values(bench)
    assert (row.chosen.text, row.rejected.text, row.judge) == ("It is 4.", "It is 5.", "truth")
    assert (row.chosen_reward, row.rejected_reward) == (1.0, 0.0)


def test_a_right_number_written_otherwise_is_not_rejected(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", GSM8K, **KNOBS)
    made = recipe([prompts, then("respond", name="r"), then("judge_truth", "r")])
    assert judged(bench, made, answering("It is $4.00.", "It is 4.")) == {"all right": 1}


@pytest.mark.parametrize(("answers", "rule"), [(("4 it is", "So: 4"), "all right"), (("5", "6"), "all wrong"),
                                               (("4", "4."), "identical answers")])  # fmt: skip
def test_prompts_without_a_pair_are_counted_by_reason(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path, answers: tuple[str, str], rule: str
) -> None:
    made = recipe(
        [
            prompts_from(tmp_path / "p.jsonl", GSM8K, **KNOBS),
            then("respond", name="r"),
            then("judge_truth", "r"),
        ]
    )
    assert judged(bench, made, answering(*answers)) == {rule: 1}


def test_truth_grades_constraints_and_says_when_there_is_none(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": "Tell me about tea."}])
    constrained = then("if_single", name="c", knobs={"types": ["punctuation:no_comma"]})
    made = recipe([prompts, constrained, then("respond", "c", "r"), then("judge_truth", "r")])
    judged(bench, made, answering("Tea, a drink.", "Tea is a drink."))
    assert values(bench)[0].chosen.text == "Tea is a drink."
    plain = recipe([prompts, then("respond", name="r"), then("judge_truth", "r")])
    assert judged(bench, plain, answering("Tea, a drink.", "Tea is a drink.")) == {"no ground truth": 1}


def test_truth_runs_the_tests_of_code(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    from nemotron4.grading.sandbox import SandboxError, open_sandbox

    try:
        open_sandbox()
    except SandboxError as error:
        pytest.skip(error.message)
    rows = [{"prompt": "Write double(x).", "tests": ["assert double(2) == 4", "assert double(-1) == -2"]}]
    made = recipe([prompts_from(tmp_path / "p.jsonl", rows, tests_field="tests"), then("respond", name="r"),
                   then("judge_truth", "r")])  # fmt: skip
    wrong, right = (
        "```python\ndef double(x):\n    return x * x\n```",
        "~~~\ndef double(x):\n    # asserts nothing\n    return 2 * x\n~~~",
    )
    judged(bench, made, answering(wrong, right))
    assert values(bench)[0].chosen.text == right


def verdicts(first: str, second: str) -> Script:
    """A judge that prefers the longer answer, or says fixed things in the two orders."""
    answer = answering("short", "a longer answer")

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        if "=== answer A ===" not in text:
            return answer(messages, sampling)
        is_forward = text.index("short") < text.index("a longer answer")
        letter = first if is_forward else second
        return f"[[{letter}]]" if "[[A]]" in text else letter

    return script


def llm_recipe(recipe: MakeRecipe, tmp_path: Path, **knobs: Any) -> SynthRecipe:
    return recipe(
        [
            prompts_from(tmp_path / "p.jsonl", [{"prompt": "Say it."}]),
            then("respond", name="r"),
            then("judge_llm", "r", knobs=knobs),
        ]
    )


def test_the_llm_judge_counts_only_when_both_orders_agree(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = llm_recipe(recipe, tmp_path)
    judged(bench, made, verdicts("B", "A"))
    (row,) = values(bench)
    assert (row.chosen.text, row.scores["verdicts"]) == ("a longer answer", ["B", "A"])
    with Reader(bench.folder / "ledger.sqlite") as ledger:
        report = judge_report(ledger, made)
    assert "100.0% got agreeing verdicts" in report[0]
    assert "50.0% of the decided verdicts" in report[0]
    assert "longer one in 100.0% of 1 pairs" in report[1]


@pytest.mark.parametrize(("backward", "drops"), [("A", {}), ("B", {"judge disagrees with itself": 1})])
def test_the_llm_judge_reads_the_likelier_letter_of_one_token(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path, backward: str, drops: dict[str, int]
) -> None:
    made = llm_recipe(recipe, tmp_path, verdict="logprob")
    assert judged(bench, made, verdicts("B", backward)) == drops
    requests = [r for r in bench.model.requests if "one letter" in r["messages"][0]["content"]]
    assert [(request["max_tokens"], request["temperature"]) for request in requests] == [(1, 0.0)] * 2
    for row in values(bench):
        forward, swapped = row.scores["log_odds"]
        assert (row.chosen.text, forward < 0 < swapped) == ("a longer answer", True)
    with Reader(bench.folder / "ledger.sqlite") as ledger:
        assert f"{'0.0' if drops else '100.0'}% got agreeing verdicts" in judge_report(ledger, made)[0]


def test_a_chosen_verdict_can_be_nothing_else(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    assert judged(bench, llm_recipe(recipe, tmp_path, verdict="choice"), verdicts("B", "A")) == {}
    requests = [r for r in bench.model.requests if "[[A]]" in r["messages"][0]["content"]]
    assert [request["choice"] for request in requests] == [["[[A]]", "[[B]]", "[[C]]"]] * 2


@pytest.mark.parametrize(("first", "second", "rule"), [("A", "A", "judge disagrees with itself"),
                         ("A", "C", "judge disagrees with itself"),
                         ("C", "C", "judge sees a tie")])  # fmt: skip
def test_verdicts_that_make_no_pair(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path, first: str, second: str, rule: str
) -> None:
    assert judged(bench, llm_recipe(recipe, tmp_path), verdicts(first, second)) == {rule: 1}


def test_a_judge_without_a_verdict_is_asked_again_and_then_fails(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        return "[[A]] or [[B]]" if "[[A]]" in messages[-1].content else str(sampling.seed)

        return "[[A]] or [[B]]" if "[[A]]" in messages[-1].content else str(sampling.seed)

    made = llm_recipe(recipe, tmp_path)
    with pytest.raises(IncompleteError, match="1 content: no_verdict"):
        bench.run(made, FakeBehaviour(script=script))
    assert bench.accounting(made).stage("out").failed == {"content: no_verdict": 1}
    assert bench.model.calls == 2 + 3


def test_the_reward_judge_weighs_attributes_as_the_card_does(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": f"Question {i}?"} for i in range(8)])
    made = recipe(
        [
            prompts,
            then("respond", name="r", knobs={"k": 3}),
            then("judge_reward", "r", knobs={"min_gap": 0.5}),
        ]
    )
    bench.run(made)
    assert values(bench)
    for row in values(bench):
        attributes = fake_attributes((*row.prompt.messages, Message("assistant", row.chosen.text)))
        expected = sum(CARD_WEIGHTS[name] * attributes[name] for name in ATTRIBUTES)
        assert row.chosen_reward == pytest.approx(expected)
        assert row.chosen_reward == max(row.scores["values"])
        assert row.chosen_reward - row.rejected_reward >= 0.5
    assert len(values(bench)) + filtered(bench, made).get("small gap", 0) == 8


def test_blank_replies_are_asked_for_again_with_a_new_seed(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = recipe([prompts_from(tmp_path / "p.jsonl", [{"prompt": "Hi"}]), then("respond", knobs={"k": 1})])
    bench.run(made, FakeBehaviour(script=answering(" ", "hello")))
    assert values(bench)[0].responses[0].text == "hello"
    assert len({request["seed"] for request in bench.model.requests}) == 2
    silent = Bench(bench.folder / "silent")
    with pytest.raises(IncompleteError, match="1 content: blank"):
        silent.run(made, FakeBehaviour(script=answering("")))
    assert silent.accounting(made).stage("out").failed == {"content: blank": 1}


def test_quality_names_the_rule_of_each_dropped_row(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": f"Question number {i}"} for i in range(4)])
    made = recipe([prompts, then("respond", name="r"), then("quality", "r", knobs={"max_words": 50})])

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        number = int(messages[-1].content[-1])
        fine = f"A decent answer of some words, drawn with {sampling.seed}."
        return (fine, "Sorry, I cannot.", "word " * 60, "No.")[number]

    bench.run(made, FakeBehaviour(script=script))
    assert filtered(bench, made) == {"refusal": 1, "too long": 1, "too short": 1}


def test_of_three_answers_the_bad_one_goes_and_the_row_stays(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": "Say something nice"}])
    made = recipe([prompts, then("respond", name="r", knobs={"k": 3}), then("quality", "r")])
    bench.run(made, FakeBehaviour(script=answering("A good answer.", "No.", "Another good one.")))
    assert [response.text for response in values(bench)[0].responses] == [
        "A good answer.",
        "Another good one.",
    ]


def test_unsafe_prompts_leave_the_sft_part_and_stay_in_preference(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Prompt number {i} of many", "bad": i % 4 == 0} for i in range(40)]
    made = recipe([
        prompts_from(tmp_path / "p.jsonl", rows, unsafe_field="bad"),
        then("split", name="sft", knobs={"part": "sft"}),
        then("split", name="preference", knobs={"part": "preference"}),
        then("drop_tagged", "sft", "safe"),
    ])  # fmt: skip
    bench.run(made)
    texts = {name: {row.text for row in values(bench, name)} for name in ("sft", "preference", "safe")}
    assert not texts["sft"] & texts["preference"]
    assert len(texts["sft"] | texts["preference"]) == 40
    assert all("unsafe" not in row.tags for row in values(bench, "safe"))
    assert any("unsafe" in row.tags for row in values(bench, "preference"))


def test_a_model_can_tag_prompts(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": "How do I bake?"}, {"prompt": "How do I rob?"}])
    script = lambda messages, sampling: "Yes." if "rob" in messages[-1].content else "No."  # noqa: E731
    bench.run(recipe([prompts, then("safety_tag")]), FakeBehaviour(script=script))
    assert {row.text: row.tags for row in values(bench)} == {
        "How do I bake?": (),
        "How do I rob?": ("unsafe",),
    }


def test_contaminated_rows_name_the_benchmark_item(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    item = "A farmer picked ninety six apples on the first day and then half as many on the second"
    benchmark = write_lines(tmp_path / "bench.jsonl", [{"question": item}])
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": f"Solve: {item}!"}, {"prompt": "Solve this."}])
    made = recipe([prompts, then("decontaminate", knobs={"files": [benchmark]})])
    bench.run(made)
    assert filtered(bench, made) == {"contaminated": 1}
    with Reader(bench.folder / "ledger.sqlite") as ledger:
        reasons = [work[3] for record, _, _ in ledger.inputs("out") for work in ledger.work_of(record)]
    assert any(reason and reason.startswith("bench.jsonl:1: ") for reason in reasons)


def test_each_task_is_capped(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe(
        [
            topics("tea", "bread"),
            then("open_questions", name="q", knobs={"n": 5}),
            then("sample", "q", knobs={"n": 4}),
        ]
    )
    bench.run(made)
    assert len(values(bench)) == 4
    assert filtered(bench, made) == {"sample": 6}


def test_several_models_share_the_prompts(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": f"Question {i}"} for i in range(20)])
    endpoints = {name: {"form": "fake", "model": f"model-{name}"} for name in ("gen", "b", "c")}
    made = recipe(
        [prompts, then("respond", knobs={"k": 2, "endpoints": ["gen", "b", "c"]})], endpoint=endpoints
    )
    bench.run(made)
    pairs = [tuple(response.model for response in row.responses) for row in values(bench)]
    assert all(first != second for first, second in pairs)
    assert len(set(pairs)) > 3


@pytest.mark.parametrize(
    ("rows", "knobs", "message"),
    [
        ([{"text": "x"}], {}, "p.jsonl:1: neither 'messages' nor a text in field 'prompt'"),
        (
            [{"messages": [{"role": "assistant", "content": "x"}]}],
            {},
            "p.jsonl:1: the conversation has no user turn",
        ),
        ([{"prompt": "x", "a": ""}], {"answer_field": "a"}, "p.jsonl:1: field 'a' holds no answer"),
        ([{"prompt": "x", "a": None}], {"answer_field": "a"}, "p.jsonl:1: field 'a' holds no answer"),
        (
            [{"prompt": "x", "a": "7"}],
            {"answer_field": "a", "answer_after": "##"},
            "no answer after '##': '7'",
        ),
        ([{"prompt": "x"}], {"tests_field": "t"}, "p.jsonl:1: field 't' holds no tests: None"),
        ([{"prompt": "x", "t": [5]}], {"tests_field": "t"}, "p.jsonl:1: field 't' holds no tests"),
    ],
)
def test_a_bad_line_of_a_source_is_named(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path, rows: list[dict[str, Any]], knobs: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        bench.run(recipe([prompts_from(tmp_path / "p.jsonl", rows, **knobs)]))


def test_lines_that_change_in_a_source_are_done_again(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Question {i}"} for i in range(4)]
    made = recipe([prompts_from(tmp_path / "p.jsonl", rows), then("respond")])
    bench.run(made)
    write_lines(tmp_path / "p.jsonl", [*rows[:2], {"prompt": "Something else"}])
    assert bench.run(made).calls == 2
    assert sorted(row.prompt.text for row in values(bench)) == ["Question 0", "Question 1", "Something else"]


def test_the_prompt_book_refuses_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[subtopic]\nversion = 1\ntext = "x"\n', "utf-8")
    with pytest.raises(ConfigError, match="unknown prompt 'subtopic'") as caught:
        load_prompts(path)
    assert caught.value.hint == "did you mean 'subtopics'?"
    path.write_text('[subtopics]\nversion = 1\ntext = "Give {n} of {theme}."\n', "utf-8")
    with pytest.raises(ConfigError, match=r"expected \['n', 'topic'\]"):
        load_prompts(path)


def test_braces_in_values_and_texts_stay(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[subtopics]\nversion = 1\ntext = '{\"json\": {n}} about {topic}'\n", "utf-8")
    assert load_prompts(path).render("subtopics", {"n": 3, "topic": "{n} {x}"}) == '{"json": 3} about {n} {x}'


def test_two_turn_prompts_end_with_the_persona(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe([prompts_from(tmp_path / "p.jsonl", [{"prompt": "Tell me of tea."}]), then("two_turn")])

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        return 'Person: "And coffee?"' if "=== conversation ===" in messages[-1].content else "Tea is old."

    bench.run(made, FakeBehaviour(script=script))
    (row,) = values(bench)
    turns = [(message.role, message.content) for message in row.messages]
    assert turns == [("user", "Tell me of tea."), ("assistant", "Tea is old."), ("user", "And coffee?")]


def test_a_dialogue_has_three_turns_each_and_no_politeness(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = recipe([prompts_from(tmp_path / "p.jsonl", [{"prompt": "Tell me of tea."}]), then("dialogue")])

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        if "=== conversation ===" not in text:
            return f"Answer {len(messages)}."
        assert "Person: Tell me of tea.\n\nAssistant: Answer 1." in text
        return "Thank you so much! That is very helpful. And what else?"

    bench.run(made, FakeBehaviour(script=script))
    (row,) = values(bench)
    assert [message.content for message in row.messages] == [
        "Tell me of tea.", "Answer 1.", "And what else?", "Answer 3.", "And what else?", "Answer 5.",
    ]  # fmt: skip
    assert all(request["temperature"] == 0 for request in bench.model.requests)
    assert bench.model.calls == 5


@pytest.mark.parametrize(
    ("said", "outcome"),
    [("Thanks a lot!", "only politeness"), ("Assistant: Here is more.", "content: no_user_turn")],
)
def test_user_turns_that_are_none(
    said: str, outcome: str, bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    made = recipe([prompts_from(tmp_path / "p.jsonl", [{"prompt": "Tell me of tea."}]), then("dialogue")])

    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        return said if "=== conversation ===" in messages[-1].content else "Tea is old."

    with contextlib.suppress(IncompleteError):
        bench.run(made, FakeBehaviour(script=script))
    accounting = bench.accounting(made).stage("out")
    assert {**accounting.filtered, **accounting.failed} == {outcome: 1}


def test_a_dialogue_ends_before_the_call_that_would_be_too_long(
    bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": "Tell me of tea."}])
    made = recipe([prompts, then("dialogue", knobs={"max_words": 20})])
    bench.run(
        made,
        FakeBehaviour(script=lambda messages, sampling: "Ten words of text that say nothing new at all?"),
    )
    (row,) = values(bench)
    assert [message.role for message in row.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Thank you! What about rain?", "What about rain?"),
        ("Thanks for that, it helps. Now do it in French.", "Now do it in French."),
        ("I'd be happy to. Which one is older?", "Which one is older?"),
        ("Could you thank them for me?", "Could you thank them for me?"),
        ("Write a thank you note.", "Write a thank you note."),
        ("Thanks!", ""),
    ],
)
def test_politeness_goes_and_requests_stay(text: str, rest: str) -> None:
    assert strip_politeness(text) == rest


def test_what_cannot_be_done_is_declined(bench: Bench, recipe: MakeRecipe) -> None:
    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        if "list of" in text:
            return "1. Fetch my parcel.\n2. Read my e-mail."
        return "I cannot read your e-mail: I only see text." if "e-mail" in text else "Done, it is fetched!"

    made = recipe([topics("post"), then("incapable_tasks", name="t", knobs={"n": 2}), then("decline", "t")])
    bench.run(made, FakeBehaviour(script=script))
    (row,) = values(bench)
    assert row.messages[1].content.startswith("I cannot read")
    assert bench.accounting(made).stage("out").failed == {"content: no_refusal": 1}


def test_dialogues_below_the_threshold_are_dropped(bench: Bench, recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = prompts_from(tmp_path / "p.jsonl", [{"prompt": f"Prompt {i}"} for i in range(12)])
    single = then("dialogue", name="d", knobs={"user_turns": 1})
    made = recipe([prompts, single, then("score_dialogue", "d", knobs={"min_helpfulness": 2.0})])
    bench.run(made)
    assert all(row.scores["helpfulness"] >= 2.0 for row in values(bench))
    assert 0 < filtered(bench, made)["low helpfulness"] < 12


TALK = "User: I lost my card.\nAssistant: I can block it.\nUser: Do so.\nAssistant: It is blocked."
TALK += "\nUser: And now?\nAssistant: A new one comes by post.\nUser: When?\nAssistant: On Friday."
STRAYING = [
    {"bot turn": "It is blocked.", "distractor user turn": "Who invented the block of flats?"},
    {"bot turn": "On Friday!", "distractor user turn": "Fridays are for films; which do you like?"},
    {"bot turn": "Something it never said.", "distractor user turn": "Hm?"},
]


def test_dialogues_with_distractors_find_their_way_back(bench: Bench, recipe: MakeRecipe) -> None:
    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        if "list of" in text:
            return "1. A customer has lost a card."
        if "JSON array" in text:
            return f"Here you are:\n```json\n{json.dumps(STRAYING)}\n```"
        return TALK if "Begin every turn" in text else "You help with\nlost cards only."

    stages = [
        topics("banking"),
        then("topic_scenarios", name="s", knobs={"n": 1}),
        then("topic_following", "s"),
    ]
    bench.run(recipe(stages), FakeBehaviour(script=script))
    (row,) = values(bench)
    said = [message.content for message in row.messages]
    assert row.messages[0] == Message("system", "You help with lost cards only.")
    assert [said[place] for place in row.meta["distractors"]] == [
        "Who invented the block of flats?", "Fridays are for films; which do you like?",
    ]  # fmt: skip
    assert [said[place - 1] for place in row.meta["distractors"]] == ["It is blocked.", "On Friday."]
    assert all("I can only help" in said[place + 1] for place in row.meta["distractors"])
    assert [message.role for message in row.messages[1:]] == ["user", "assistant"] * 6
    assert bench.accounting(recipe(stages)).stage("out").counters["distractors_without_place"] == 1


@pytest.mark.parametrize("talk", ["", "Assistant: Hi.", "User: Hi.", "User: a\nUser: b\nAssistant: c"])
def test_what_is_no_dialogue_is_not_read_as_one(talk: str) -> None:
    assert parse_dialogue(talk) == []


def test_colonies_grow_to_their_size_with_fit_members_only(bench: Bench, recipe: MakeRecipe) -> None:
    def script(messages: Sequence[Message], sampling: Sampling) -> str:
        text = messages[-1].content
        if "Is the task clear" in text:
            return "No." if "rivers" in text else "Yes, it is."
        if "Solve this task" in text:
            return "```python\nprint(1)\n```\nIt prints."
        return scripted_reply(messages, sampling)

    stages = [
        {
            "name": "out",
            "kind": "genetic_code",
            "knobs": {"colonies": 2, "size": 6, "children_per_crossover": 1},
        }
    ]
    bench.run(recipe(stages), FakeBehaviour(script=script))
    rows = values(bench)
    assert [sum(row.meta["colony"] == i for row in rows) for i in (0, 1)] == [6, 6]
    assert all("rivers" not in row.messages[0].content for row in rows)
    assert {row.meta["made_by"] for row in rows} == {"crossover", "mutation"}
    again = Bench(bench.folder / "again")
    again.run(recipe(stages), FakeBehaviour(script=script))
    assert again.rows("out") == bench.rows("out")


def test_a_colony_without_fit_children_fails_after_its_steps(bench: Bench, recipe: MakeRecipe) -> None:
    made = recipe([{"name": "out", "kind": "genetic_code", "knobs": {"colonies": 1, "max_steps": 3}}])
    with pytest.raises(IncompleteError, match="1 content: barren"):
        bench.run(made)
    assert bench.accounting(made).stage("out").failed == {"content: barren": 1}


GLAIVE = {
    "system": "SYSTEM: You have the function add(a, b).",
    "chat": 'USER: 2 and 3?\n\n\nASSISTANT: <functioncall> {"name": "add"} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"sum": 5}\n\n\nASSISTANT: It is 5. <|endoftext|>\n',
}
TABLE = {
    "text": "Sales in tons.",
    "table": [["year", "tea"], [2020, "7|8"]],
    "question": "How much?",
    "answer": [7, 8],
}


@pytest.mark.parametrize(
    ("form", "row", "turns"),
    [
        (
            "messages",
            {"messages": [{"role": "User", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            "glaive",
            GLAIVE,
            [
                ("system", "You have the function add(a, b)."),
                ("user", "2 and 3?"),
                ("assistant", '<functioncall> {"name": "add"}'),
                ("tool", '{"sum": 5}'),
                ("assistant", "It is 5."),
            ],
        ),
        (
            "table_qa",
            TABLE,
            [
                ("user", "Sales in tons.\n\n| year | tea |\n| --- | --- |\n| 2020 | 7\\|8 |\n\nHow much?"),
                ("assistant", "7, 8"),
            ],
        ),
    ],
)
def test_finished_conversations_are_imported(
    form: str, row: Any, turns: Any, bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    knobs = {"file": write_lines(tmp_path / "d.jsonl", [row]), "task": "import", "form": form}
    bench.run(recipe([{"name": "out", "kind": "dialogue_file", "knobs": knobs}]))
    (found,) = values(bench)
    assert [(message.role, message.content) for message in found.messages] == turns


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("glaive", {"chat": "nothing labelled"}),
        ("table_qa", {"table": [], "question": "?", "answer": 1}),
    ],
)
def test_a_conversation_without_an_answer_is_named_by_line(
    form: str, row: Any, bench: Bench, recipe: MakeRecipe, tmp_path: Path
) -> None:
    knobs = {"file": write_lines(tmp_path / "d.jsonl", [row]), "task": "import", "form": form}
    with pytest.raises(DataError, match=r"d\.jsonl:1: expected"):
        bench.run(recipe([{"name": "out", "kind": "dialogue_file", "knobs": knobs}]))
