"""The engine and the judges that policy-gradient training is given."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.client.fake import FakeBehaviour, fake_attributes
from nemotron4.client.fake_server import FakeServer
from nemotron4.client.own_code import called
from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.errors import ConfigError
from nemotron4.inference.reward import load_reward
from nemotron4.inference.rollouts import RolloutEngine
from nemotron4.records import JsonObject, Message
from nemotron4.training import rewards
from nemotron4.training.rewards import (
    FunctionJudge,
    GenerativeJudge,
    HttpJudge,
    ModelJudge,
    WeightedJudges,
    verifier,
)
from nemotron4.training.rollout_settings import RewardSource
from nemotron4.training.rollouts import Answer, RewardVerdict
from tests import tiny_models

PROMPT = (Message("user", "What is 1 plus 1?"),)


def answer(text: str, **fields: object) -> Answer:
    return Answer(PROMPT, text, fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama_directory(tmp_path_factory.mktemp("llama"))


# ---- generation


def draws(ids: tuple[int, ...], seeds: range, *, length: int = 8, temperature: float = 1.0) -> list:
    return [
        SamplingRequest(
            ids, SamplingParams(max_new_tokens=length, temperature=temperature, seed=seed, logprobs=0)
        )
        for seed in seeds
    ]


def test_answers_follow_the_weights_and_depend_on_their_own_seed_alone(llama: Path) -> None:
    base = open_checkpoint(llama)
    net, _ = load_transformer(base, dtype=torch.float32)
    generate = RolloutEngine(base)
    ids = tuple(base.tokenizer().encode("Shall I compare thee"))
    first = generate(net, draws(ids, range(1, 4)))
    assert len({c.token_ids for c in first}) == 3
    [alone] = generate(net, draws(ids, range(2, 3)))
    assert alone.token_ids == first[1].token_ids
    # The same draws together are the same bits: a resumed run relies on it.
    assert generate(net, draws(ids, range(1, 4))) == first
    greedy = generate(net, draws(ids, range(1, 4), temperature=0.0))
    assert len({c.token_ids for c in greedy}) == 1
    with torch.no_grad():
        net.model.embed_tokens.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(9))
    assert generate(net, draws(ids, range(1, 4))) != first


def test_an_answer_ends_with_the_stop_token_which_its_text_does_not_show(llama: Path) -> None:
    base = open_checkpoint(llama)
    net, _ = load_transformer(base, dtype=torch.float32)
    ids = tuple(base.tokenizer().encode("Shall I compare thee"))
    found = RolloutEngine(base)(net, draws(ids, range(40), length=60, temperature=3.0))
    finished = [c for c in found if c.finish_reason == "stop"]
    assert 0 < len(finished) < len(found)
    for c in found:
        assert len(c.logprobs or ()) == len(c.token_ids)
        assert (c.token_ids[-1] in (0, 1, 2)) == (
            c.finish_reason == "stop"
        )  # the markers of the tiny vocabulary
        assert "<|" not in c.text


# ---- verifiers


@pytest.mark.parametrize(
    ("source", "text", "fields", "value"),
    [
        ({"kind": "gsm8k"}, "1 + 1 = 2\n#### 2", {"answer": "so\n#### 2"}, 1.0),
        ({"kind": "gsm8k"}, "it is 2", {"answer": "2"}, 0.0),
        ({"kind": "gsm8k", "answer_field": "sum"}, "#### 1,002", {"sum": 1002}, 1.0),
        ({"kind": "boxed"}, r"\boxed{\frac{1}{2}}", {"answer": "0.5"}, 1.0),
        ({"kind": "pattern", "pattern": r"\d+"}, "42", {}, 1.0),
        ({"kind": "pattern", "pattern": r"\d+"}, "42.", {}, 0.0),
        (
            {"kind": "instructions"},
            "no commas here",
            {
                "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
                "kwargs": [{}, {"num_words": None}],
            },
            0.5,
        ),
    ],
)
def test_verifiers_decide_as_the_graders_do(source: dict, text: str, fields: dict, value: float) -> None:
    [verdict] = verifier(RewardSource(**source))([answer(text, **fields)])
    assert verdict == RewardVerdict(value, verdict.reason)


def test_a_row_that_cannot_be_verified_has_no_reward() -> None:
    bad = {"instruction_id_list": ["no:such"], "kwargs": [{}]}
    [verdict] = verifier(RewardSource(kind="instructions"))([answer("text", **bad)])
    assert verdict.value is None
    assert "unknown instruction" in verdict.reason
    [verdict] = verifier(RewardSource(kind="gsm8k"))([answer("#### 2", answer=None)])
    assert verdict.value is None


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="unterminated"):
        verifier(RewardSource(kind="pattern", pattern="[a"))


def test_rewards_add_up_and_a_missing_one_leaves_none() -> None:
    sources = [
        RewardSource(kind="pattern", pattern=r"\d+", weight=2.0, shift=0.5),
        RewardSource(kind="gsm8k", answer_field="sum"),
    ]
    judge = WeightedJudges(sources, [verifier(source) for source in sources])
    verdicts = judge([answer("7", sum="7"), answer("#### 7", sum="7"), answer("7", sum=[])])
    assert [verdict.value for verdict in verdicts] == [1.0, 0.0, None]


# ---- chains: what fails a gate is not shown to the judges after it


def test_a_gate_keeps_an_answer_from_the_judges_after_it() -> None:
    seen: list[str] = []

    class Watching:
        identity = ""

        def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
            seen.extend(each.text for each in answers)
            return [RewardVerdict(5.0) for _ in answers]

    sources = [
        RewardSource(kind="pattern", pattern=r"#### \d+", gate=1.0, weight=0.5),
        RewardSource(kind="gsm8k", weight=2.0),
    ]
    judge = WeightedJudges(sources, [verifier(sources[0]), Watching()])
    verdicts = judge([answer("#### 7"), answer("seven"), answer("#### 8")])
    assert [verdict.value for verdict in verdicts] == [10.5, 0.0, 10.5]
    assert seen == ["#### 7", "#### 8"]


# ---- the user's function


OWN = """
import os, time

calls = 0

def score(prompts, answers, rows):
    global calls
    calls += 1
    return [len(answer) + row["bonus"] + 100 * calls for answer, row in zip(answers, rows)]

def one(prompt, answer, row):
    if answer == "crash":
        os._exit(3)
    if answer == "hang":
        time.sleep(60)
    if answer == "bad":
        raise KeyError("no such thing")
    return {"none": None, "text": "seven"}.get(answer, prompt[0]["content"] == "What is 1 plus 1?")
"""


def test_a_function_judges_a_batch_in_a_process_that_stays(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(OWN)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score"))
    assert [v.value for v in judge([answer("a", bonus=1), answer("bcd", bonus=2)])] == [102, 105]
    assert [v.value for v in judge([answer("a", bonus=1)])] == [202]
    (tmp_path / "rewards.py").write_text(OWN + "# changed")
    changed = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score"))
    assert changed.identity != judge.identity


def test_what_the_function_does_wrong_costs_that_answer_its_reward_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(OWN)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:one"))
    texts = ["2", "crash", "bad", "none", "text", "3"]
    verdicts = judge([answer(text) for text in texts])
    assert [verdict.value for verdict in verdicts] == [1.0, None, None, None, None, 1.0]
    reasons = [verdict.reason for verdict in verdicts]
    assert "ended with status 3" in reasons[1]
    assert "KeyError" in reasons[2]
    assert "gave no reward" in reasons[3]
    assert "returned 'seven'" in reasons[4]


def test_a_judge_may_be_collected_while_another_loop_runs(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(OWN)
    kept = [FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:one"))]
    assert kept[0]([answer("2")])[0].value == 1.0

    async def drop() -> None:
        kept.clear()  # an error in there would be an unraisable one, which fails the test
        gc.collect()

    asyncio.run(drop())


def test_a_function_that_takes_too_long_gives_no_reward(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(OWN)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:one", timeout_s=1.5))
    [verdict] = judge([answer("hang")])
    assert verdict.value is None
    assert "no answer within 1.5 s" in verdict.reason


def test_what_the_file_prints_while_it_is_loaded_is_not_an_answer(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("import os\nprint('[]')\nos.system('echo more')\n" + OWN)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:one", timeout_s=20))
    assert [verdict.value for verdict in judge([answer("2"), answer("3")])] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("answer", "len(answer)"), ("row", "row['bonus']"), ("rows", "[row['bonus'] for row in rows]"),
        ("completions, **kwargs", "[len(text) for text in completions]"),
    ],
)  # fmt: skip
def test_a_single_parameter_is_what_its_name_says(signature: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(f"def score({signature}):\n    return {value}\n")
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score"))
    assert [verdict.value for verdict in judge([answer("seven", bonus=5)])] == [5]


def test_after_a_bad_answer_the_function_gets_batches_again(tmp_path: Path) -> None:
    text = "def score(answers):\n    assert 'bad' not in answers\n    return [len(answers)] * len(answers)\n"
    (tmp_path / "rewards.py").write_text(text)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score"))
    assert [v.value for v in judge([answer("a"), answer("bad")])] == [1, None]
    assert [v.value for v in judge([answer("a"), answer("b")])] == [2, 2]


def test_a_row_that_json_cannot_hold_has_no_reward(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(OWN)
    judge = FunctionJudge(RewardSource(kind="python", path=f"{tmp_path}/rewards.py:one"))
    [verdict] = judge([answer("2", day=datetime.date(2026, 11, 30))])
    assert verdict.value is None
    assert "date is not JSON serializable" in verdict.reason


@pytest.mark.parametrize(
    ("signature", "is_right"),
    [
        ("prompts, answers, rows", True), ("prompts, completions, **kwargs", True), ("answer", True),
        ("prompts, texts, rows", False), ("prompt, rows", False), ("prompt, answer, row, k=1, *, n", False),
    ],
)  # fmt: skip
def test_a_function_that_asks_for_what_no_answer_has_is_refused_before_it_runs(
    signature: str, is_right: bool, tmp_path: Path
) -> None:
    value = "[1.0] * len(prompts)" if signature.startswith("prompts") else "1.0"
    (tmp_path / "rewards.py").write_text(f"def score({signature}):\n    return {value}\n")
    source = RewardSource(kind="python", path=f"{tmp_path}/rewards.py:score")
    if is_right:
        [verdict] = FunctionJudge(source)([answer("yes")])
        assert verdict.value == 1
    else:
        with pytest.raises(ConfigError, match="expected prompt, answer and row, or lists of them"):
            FunctionJudge(source)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:score", "no such file"), ("score", "expected FILE.py:NAME"),
        (f"{__file__}:scor", "there is no function 'scor'"),
    ],
)  # fmt: skip
def test_a_function_that_is_not_there_is_refused_before_the_run(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FunctionJudge(RewardSource(kind="python", path=path))


# ---- reward models


def reward_directory(folder: Path) -> Path:
    """A trained reward model of the tiny Llama, whose vocabulary has no label marker."""
    from nemotron4.training import run
    from nemotron4.training.recipe import build

    start = tiny_models.llama_directory(folder / "start")
    row = {
        "messages": [m.to_json() for m in (*PROMPT, Message("assistant", "2"))],
        "attributes": {"helpfulness": 4},
    }
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = build(
        {
            "stage": "reward",
            "model": {"start": str(start), "device": "cpu"},
            "data": {"train": [str(folder / "rows.jsonl")], "max_length": 100},
            "optimizer": {"learning_rate": 1e-3},
            "batch": {"global_size": 1, "row_tokens": 100},
            "run": {"directory": str(folder / "run"), "max_steps": 1},
        },
    )
    output = run.train(recipe).output
    assert output is not None
    return output


def test_a_reward_model_judges_as_it_was_trained_to_read(tmp_path: Path) -> None:
    folder = reward_directory(tmp_path)
    source = RewardSource(kind="reward_model", model=str(folder), attribute="helpfulness")
    judge = ModelJudge(source, "cpu")
    long = answer("long " * 300)
    first, second, third = judge([answer("2"), long, answer("I do not know")])
    expected = load_reward(folder, device="cpu").score([[*PROMPT, Message("assistant", "2")]])
    assert first.value == pytest.approx(expected[0].attributes["helpfulness"], abs=1e-6)
    assert second.value is None
    assert "tokens; expected 1 to 256" in second.reason
    assert third.value is not None
    assert third.value != first.value


def test_an_unknown_attribute_is_refused_before_anything_loads() -> None:
    source = RewardSource(kind="reward_model", model="nowhere", attribute="helpfullness")
    with pytest.raises(ConfigError, match="unknown attribute 'helpfullness'"):
        ModelJudge(source, "cpu")


@contextlib.contextmanager
def serving(running: FakeServer) -> Iterator[FakeServer]:
    """The server in a thread."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with running:
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20)
    yield running
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """The fake reward server; it refuses what contains the word unfit."""
    with serving(FakeServer(FakeBehaviour(hopeless="unfit"), port=0)) as running:
        yield running


def test_an_http_scorer_gives_the_servers_rewards_and_none_where_it_refuses(server: FakeServer) -> None:
    source = RewardSource(kind="http", url=server.url, attribute="correctness")
    verdicts = HttpJudge(source)([answer("2"), answer("unfit"), answer("3")])
    for verdict, text in ((verdicts[0], "2"), (verdicts[2], "3")):
        expected = fake_attributes([*PROMPT, Message("assistant", text)])["correctness"]
        assert verdict.value == pytest.approx(expected)
    assert verdicts[1].value is None
    # The fake sends attributes alone, so there is no scalar to take.
    [verdict] = HttpJudge(RewardSource(kind="http", url=server.url))([answer("2")])
    assert verdict.value is None
    assert "name one of them" in verdict.reason


def test_a_server_that_is_away_gives_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "RETRIES", rewards.RetryPolicy(max_attempts=2, first_wait_s=0.01))
    [verdict] = HttpJudge(RewardSource(kind="http", url="http://127.0.0.1:9"))([answer("2")])
    assert verdict.value is None
    assert verdict.reason


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_KEY", raising=False)
    source = RewardSource(kind="http", url="http://127.0.0.1:9", api_key_env="REWARD_KEY")
    with pytest.raises(ConfigError, match="REWARD_KEY is empty"):
        HttpJudge(source)


# ---- a generative judge


def rating_server(text: str) -> FakeServer:
    """Answers every chat with one text and keeps what was asked."""
    asked: list[str] = []

    def odd(number: int, body: JsonObject) -> tuple[int, bytes, float | None]:
        asked.append(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode(), None

    server = FakeServer(port=0, odd=odd)
    server.asked = asked  # type: ignore[attr-defined]
    return server


@pytest.mark.parametrize(("text", "value"), [("Fine, if dry. [[7]]", 7.0), ("Rather good.", None)])
def test_a_generative_judge_gives_the_rating_it_wrote_or_none(
    tmp_path: Path, text: str, value: float | None
) -> None:
    (tmp_path / "judge.txt").write_text("{prompt} / {answer} / {gold} / {other}: [[n]]?")
    with serving(rating_server(text)) as server:
        source = RewardSource(
            kind="genrm", url=f"{server.url}/v1", model="judge", prompt=str(tmp_path / "judge.txt")
        )
        [verdict] = GenerativeJudge(source)([answer("{gold}", gold="2")])
    assert verdict.value == value
    assert value is not None or verdict.reason == "no rating"
    # What the answer contains is not filled in.
    assert server.asked == ["What is 1 plus 1? / {gold} / 2 / {other}: [[n]]?"]


def test_a_reward_function_of_trl_gets_the_columns_of_the_rows() -> None:
    rows = [
        {"prompt": "Q", "answer": said, "completion": said, "row": {"answer": gold, "level": 1}}
        for said, gold in (("4", "4"), ("5", "6"))
    ]

    def named(completions: list[str], answer: list[str], **kwargs: list[int]) -> list[float]:
        assert kwargs["level"] == [1, 1]
        assert kwargs["prompts"] == ["Q", "Q"]
        return [float(a == b) for a, b in zip(completions, answer, strict=True)]

    def ours(completions: list[str], rows: list[dict[str, str]]) -> list[float]:
        return [float(a == row["answer"]) for a, row in zip(completions, rows, strict=True)]

    assert called(named, ("completions", "answer"), rows, by_name=True) == [1.0, 0.0]
    assert called(ours, ("completions", "rows"), rows, by_name=True) == [1.0, 0.0]


def test_an_async_reward_function_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("async def score(completions, **kwargs):\n    return [0.0]\n")
    with pytest.raises(ConfigError, match="async function"):
        FunctionJudge(RewardSource(kind="python", path=f"{tmp_path / 'r.py'}:score"))
