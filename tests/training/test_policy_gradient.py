"""Policy gradients from prompts to updates, on tiny real models, by the real engine."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.errors import ConfigError, DataError, TrainingError
from nemotron4.training import inputs, parallel, run
from nemotron4.training.advantages import actor_critic_advantages, advantages_of_group
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import Origin
from nemotron4.training.policy import ActorObjective, AnswerSample
from nemotron4.training.preview import check_invariance, compare_cuts, preview
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.rewards import connect
from nemotron4.training.rollout_settings import PolicyGradientSection, RewardSource
from nemotron4.training.rollouts import Answer, Connect, RewardVerdict, RolloutBackend
from nemotron4.training.samples import Segment
from nemotron4.training.scorer import PolicyScorer
from nemotron4.training.stages.policy_gradient import METHODS
from tests import tiny_models
from tests.training import tiny

PATTERN = {"kind": "pattern", "pattern": "[ -~]*"}  # the answer has visible ASCII characters only


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("nemotron"))


def prompts(folder: Path, num: int = 6, **fields: object) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"Add {i} and {i}"}], **fields} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder: Path, start: Path, algorithm: str, /, name: str = "run", **more: object) -> Recipe:
    values: dict[str, object] = {
        "stage": "policy-gradient",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [str(prompts(folder))], "max_length": 80},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 64, "row_tokens": 400},
        "run": {"directory": str(folder / name), "max_steps": 2, "save_every": 2},
        "policy_gradient": {
            "algorithm": algorithm, "rewards": [PATTERN], "num_prompts": 4, "group_size": 4,
            "max_new_tokens": 6, "unfinished": "judge",
        },
    }  # fmt: skip
    for key, value in more.items():
        old = values.get(key)
        values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return build(values)


def metrics(folder: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def judging(judge: object) -> Connect:
    """The real engine with a judge of the test's own."""

    def connected(recipe: Recipe, base: object) -> RolloutBackend:
        return replace(connect(recipe, base), judge=judge)  # type: ignore[arg-type]

    return connected


class LengthJudge:
    """Longer answers are better, by a hair the later ones too; with ``fails`` every third has no reward."""

    identity = "length"

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return [
            RewardVerdict(None, "the judge was away")
            if self.fails and i % 3 == 0
            else RewardVerdict(len(a.text) + i / 1000)
            for i, a in enumerate(answers)
        ]


# ---- one step


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce", "ppo"])
def test_the_first_update_is_on_policy_and_the_sampler_agrees_with_the_trainer(
    tmp_path: Path, nemotron: Path, algorithm: str
) -> None:
    recipe = make(tmp_path, nemotron, algorithm, data={"validation": [str(prompts(tmp_path))]})
    summary = run.train(recipe, connect=judging(LengthJudge()))
    first, second = metrics(tmp_path / "run")
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["sampler_gap"] < 1e-5
    assert (first["clip_fraction"], first["updates"]) == (0, 1)
    # The second round's answers come from the weights that the first has changed.
    assert second["sampler_gap"] < 1e-5
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-7
    assert ("critic_loss" in first) == (algorithm == "ppo")
    assert 0 < first["entropy"] <= torch.log(torch.tensor(512.0))
    assert [line["step"] for line in metrics(tmp_path / "run", "validation")] == [0, 2]
    assert summary.output is not None
    load_transformer(open_checkpoint(summary.output), dtype=torch.float32)


def worth(text: str) -> float:
    """A reward in 0..1 that has nothing to do with the model."""
    return zlib.crc32(text.strip().encode()) % 997 / 997


class WorthJudge(LengthJudge):
    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return [RewardVerdict(worth(answer.text)) for answer in answers]


@pytest.mark.parametrize("num_rounds", [1, pytest.param(125, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("algorithm", "group_size"), [("reinforce", 4), ("grpo", 2)])
def test_a_steps_gradient_is_the_derivative_of_the_expected_reward(
    tmp_path: Path, nemotron: Path, algorithm: str, group_size: int, num_rounds: int
) -> None:
    """Answers of one token, so that the expectation over all of them can be written out.

    For pairs of answers GRPO's advantage is the sign of the difference of rewards over the root of two.
    """
    num_answers, temperature = 816, 0.5  # equally many to each of the six prompts
    settings = {
        "num_prompts": num_answers // group_size, "group_size": group_size, "max_new_tokens": 1,
        "temperature": temperature, "kl_coefficient": 0.0,
    }  # fmt: skip
    recipe = make(tmp_path, nemotron, algorithm, policy_gradient=settings)
    base = open_checkpoint(nemotron)
    config = inputs.model_config(recipe, base)
    prompts = inputs.read_data(recipe, inputs.build_encoder(recipe, base, config)).train
    origin, stage = Origin(recipe, base, config), recipe.kind.objective(recipe.settings)
    engine = parallel.build(origin, None, torch.device("cpu"))
    make_trainer = recipe.kind.trainer(recipe.settings)(origin, None, engine.device, judging(WorthJudge()))
    found: torch.Tensor | float = 0.0
    for seed in range(num_rounds):
        recipe = replace(recipe, run=replace(recipe.run, seed=seed))
        samples = make_trainer(recipe, engine, stage, Dataset(prompts, seed=0)).first_samples()
        engine.forward_backward(engine.rows(samples, 4000), stage)
        # Pairs with equal rewards have no gradient and do not count.
        found = found + flat_gradient(engine) * len(samples) / num_answers / num_rounds

    tokenizer, prompt_format = base.tokenizer(), base.prompt_format()
    assert prompt_format is not None
    stops = {*base.eos_token_ids, *prompt_format.stop_token_ids(tokenizer)}
    worth_V = torch.tensor(
        [worth("" if i in stops else tokenizer.decode([i])) for i in range(config.vocab_size)]
    )
    for prompt in prompts:
        logits_V = engine.scorer.net(torch.tensor([prompt.segments[0].tokens]))[0, -1] / temperature
        p_V = logits_V.softmax(0)
        advantage_V = worth_V - (p_V.detach() * worth_V).sum()
        if algorithm == "grpo":
            advantage_V = (worth_V[:, None] - worth_V).sign() @ p_V.detach() / 2**0.5
        (-(p_V * advantage_V).sum() / len(prompts)).backward()
    expected = flat_gradient(engine)
    # The standard error of one round is 0.1.
    assert float(found @ expected / (expected @ expected)) == pytest.approx(1, abs=0.35 / num_rounds**0.5)
    assert float(found @ expected / found.norm() / expected.norm()) > 1 - 0.1 / num_rounds


def flat_gradient(engine: TrainingEngine) -> torch.Tensor:
    """All gradients as one vector; the parameters have none afterwards."""
    flat = torch.cat([parameter.grad.flatten() for parameter in engine.trainable.values()])
    engine.scorer.zero_grad()
    return flat


def test_lora_trains_against_the_base_without_a_second_model(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(tmp_path, nemotron, "grpo", adapter={"kind": "lora", "rank": 2, "targets": ["all"]})
    summary = run.train(recipe, connect=judging(LengthJudge()))
    assert summary.output == tmp_path / "run" / "adapter"
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 0


@pytest.mark.parametrize("tables", [{}, {"adapter": {"kind": "lora", "rank": 2}}], ids=["whole", "lora"])
def test_with_16_bits_the_sampler_is_as_near_to_the_trainer_as_they_allow(
    tmp_path: Path, nemotron: Path, tables: dict[str, Any]
) -> None:
    recipe = make(tmp_path, nemotron, "ppo", model={"compute": "bfloat16"}, **tables)
    run.train(recipe, connect=judging(LengthJudge()))
    for line in metrics(tmp_path / "run"):
        assert 1e-5 < line["sampler_gap"] < 0.2
    assert metrics(tmp_path / "run")[0]["ratio"] == pytest.approx(1, abs=1e-2)


def test_p_tuning_trains_against_the_base_without_its_virtual_prompt(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(
        tmp_path, nemotron, "grpo", adapter={"kind": "p_tuning", "num_virtual_tokens": 3},
        data={"validation": [str(prompts(tmp_path))]},
        samples={"prompts": str(prompts(tmp_path)), "max_new_tokens": 4},
    )  # fmt: skip
    run.train(recipe, connect=judging(LengthJudge()))
    for line in metrics(tmp_path / "run"):
        assert line["sampler_gap"] < 1e-5
        assert line["kl"] > 1e-7
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 12


def test_a_critic_s_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, nemotron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, float("nan")])  # the policy's, then the critic's
    monkeypatch.setattr(TrainingEngine, "grad_norm", lambda _: next(norms))
    with pytest.raises(TrainingError, match="the critic's gradient's norm is nan at step 1"):
        run.train(make(tmp_path, nemotron, "ppo"), connect=judging(LengthJudge()))


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_training_raises_its_reward(tmp_path: Path, nemotron: Path, algorithm: str) -> None:
    recipe = make(
        tmp_path, nemotron, algorithm, run={"max_steps": 10, "save_every": 10},
        optimizer={"learning_rate": 3e-3},
        policy_gradient={"kl_coefficient": 0.0, "critic": {"learning_rate": 1e-2}, "group_size": 8},
    )  # fmt: skip
    run.train(recipe)
    rewards = [line["reward"] for line in metrics(tmp_path / "run")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_the_first_steps_gradient_is_the_same_under_every_cut(tmp_path: Path, nemotron: Path) -> None:
    cuts = check_invariance(make(tmp_path, nemotron, "grpo"), connect=judging(LengthJudge()))
    assert len({cut.num_rows for cut in cuts}) > 1
    assert not (tmp_path / "run").exists()


# ---- resuming


@pytest.mark.parametrize("algorithm", [pytest.param("reinforce", marks=pytest.mark.slow), "ppo"])
def test_an_interrupted_run_goes_on_with_the_same_curve(
    tmp_path: Path, nemotron: Path, algorithm: str
) -> None:
    settings = {"inner_epochs": 2, "entropy_bonus": 0.01}
    more = {"run": {"max_steps": 4}, "policy_gradient": settings, "batch": {"global_size": 8}}

    def die(progress: object) -> None:
        if progress.step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    whole = make(tmp_path, nemotron, algorithm, name="whole", **more)
    broken = make(tmp_path, nemotron, algorithm, name="broken", **more)
    run.train(whole, connect=judging(LengthJudge()))
    with pytest.raises(KeyboardInterrupt):
        run.train(broken, connect=judging(LengthJudge()), on_progress=die)
    run.train(broken, connect=judging(LengthJudge()))
    times = ("seconds", "rollout_seconds", "tokens_per_s", "memory_gb")
    curves = [
        [{k: v for k, v in line.items() if k not in times} for line in metrics(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert len(curves[0]) == 4
    assert curves[0] == curves[1]


# ---- what has no reward, and what teaches nothing


def test_answers_without_a_reward_are_left_out_and_counted(tmp_path: Path, nemotron: Path) -> None:
    run.train(make(tmp_path, nemotron, "grpo"), connect=judging(LengthJudge(fails=True)))
    first = metrics(tmp_path / "run")[0]
    assert first["share_without_reward"] == pytest.approx(6 / 16)
    assert first["trained_answers"] == 10


def test_a_step_without_any_reward_stops_the_run_and_says_why(tmp_path: Path, nemotron: Path) -> None:
    class Away(LengthJudge):
        def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
            return [RewardVerdict(None, "the judge was away") for _ in answers]

    with pytest.raises(TrainingError, match=r"no answer of step 1 got a reward: the judge was away \(16"):
        run.train(make(tmp_path, nemotron, "grpo"), connect=judging(Away()))


def test_a_changed_judge_is_refused_by_name(tmp_path: Path, nemotron: Path) -> None:
    code = tmp_path / "rewards.py"
    code.write_text("def score(answer):\n    return len(answer)\n")
    judge = {"kind": "python", "path": f"{code}:score"}
    more: dict = {"policy_gradient": {"rewards": [judge], "kl_coefficient": 0.0}}
    run.train(make(tmp_path, nemotron, "grpo", **more, run={"max_steps": 1}))
    code.write_text("def score(answer):\n    return -len(answer)\n")
    with pytest.raises(ConfigError, match=r"a judge.s function, prompt or weights.* have changed"):
        run.train(make(tmp_path, nemotron, "grpo", **more))


def test_a_run_whose_groups_never_differ_says_so_and_leaves_no_model(tmp_path: Path, nemotron: Path) -> None:
    anything = {"kind": "pattern", "pattern": ".*", "weight": 0.1}
    recipe = make(
        tmp_path, nemotron, "grpo", policy_gradient={"rewards": [anything]}, optimizer={"warmup_steps": 2}
    )
    message = "in none of 2 steps two answers to one prompt had different rewards: nothing was learnt"
    for _ in range(2):  # and so does the same command again
        with pytest.raises(TrainingError, match=message):
            run.train(recipe)
    for line in metrics(tmp_path / "run"):
        assert line["share_equal_groups"] == 1
        assert line["trained_answers"] == line["updates"] == 0
        assert "loss" not in line
    assert [line["learning_rate"] for line in metrics(tmp_path / "run")] == [1e-3 / 3, 2e-3 / 3]
    assert not (tmp_path / "run" / "model").exists()


def test_ppo_whose_rewards_were_all_one_value_says_so_and_leaves_no_model(
    tmp_path: Path, nemotron: Path
) -> None:
    same = {"kind": "pattern", "pattern": ".*", "weight": 0.1}
    of_one = {"rewards": [same], "group_size": 1, "num_prompts": 3}
    for _ in range(2):  # and so does the same command again
        recipe = make(
            tmp_path, nemotron, "ppo", policy_gradient=of_one, run={"max_steps": 2, "save_every": 1}
        )
        with pytest.raises(TrainingError, match="in all 2 steps every answer had the same reward: nothing"):
            run.train(recipe)
    assert [line["reward_std"] for line in metrics(tmp_path / "run")] == [0, 0]
    assert not (tmp_path / "run" / "model").exists()


def test_dynamic_sampling_draws_prompts_until_enough_groups_differ(tmp_path: Path, nemotron: Path) -> None:
    """The judge is fair to two of six prompts; of the four that a step takes others are passed over."""

    class Fair(LengthJudge):
        def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
            fair = ("Add 1 and 1", "Add 4 and 4")
            return [
                RewardVerdict(i / 1000 if a.prompt[-1].content in fair else 0.0)
                for i, a in enumerate(answers)
            ]

    recipe = make(tmp_path, nemotron, "grpo", policy_gradient={"num_prompts": 2, "max_resamples": 4})
    run.train(recipe, connect=judging(Fair()))
    for line in metrics(tmp_path / "run"):
        assert line["trained_answers"] == 8
        assert line["share_equal_groups"] == 0
    # Of six prompts two differ, so two steps of two went through all of them twice.
    assert line["samples_seen"] >= 8


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_published_method_takes_a_step_and_knows_its_prompts(
    tmp_path: Path, nemotron: Path, method: str
) -> None:
    settings = {"critic": {"learning_rate": 1e-3}} if method == "ppo" else {}
    recipe = make(
        tmp_path, nemotron, METHODS[method]["algorithm"],
        policy_gradient=METHODS[method] | settings, run={"max_steps": 1},
    )  # fmt: skip
    run.train(recipe, connect=judging(LengthJudge()))
    [line] = metrics(tmp_path / "run")
    assert line["updates"] == 1
    assert line["ratio"] == pytest.approx(1, abs=1e-5)
    assert line["grad_norm"] > 0


# ---- pairs of the policy's own answers


def online(folder: Path, start: Path, /, name: str = "run", **more: object) -> Recipe:
    rollouts = {
        "rewards": [PATTERN], "num_prompts": 4, "group_size": 4, "max_new_tokens": 6, "unfinished": "judge",
    }  # fmt: skip
    values: dict[str, object] = {
        "stage": "preference",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [str(prompts(folder))], "max_length": 80},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 64, "row_tokens": 400},
        "run": {"directory": str(folder / name), "max_steps": 2, "save_every": 1},
        "preference": {"loss": "rpo", "beta": 0.5, "pairs": "online", "rollouts": rollouts},
    }
    return build(values | more)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2, "targets": ["all"]}])
def test_online_pairs_are_the_best_and_worst_answers_against_the_start(
    tmp_path: Path, nemotron: Path, adapter: dict | None
) -> None:
    more = {} if adapter is None else {"adapter": adapter}
    recipe = online(tmp_path, nemotron, data={
        "train": [str(prompts(tmp_path))], "validation": [str(prompts(tmp_path))], "max_length": 80,
    }, **more)  # fmt: skip
    summary = run.train(recipe, connect=judging(LengthJudge()))
    first, second = metrics(tmp_path / "run")
    # Before the first update the policy is the reference: no margin, as exact as the sampler agrees.
    assert first["margin_beta"] == pytest.approx(0, abs=1e-4)
    assert (first["trained_answers"], first["updates"]) == (4, 1)
    assert first["sampler_gap"] < 1e-5
    assert abs(second["margin_beta"]) > 1e-3
    assert second["kl"] > 1e-7
    assert [line["step"] for line in metrics(tmp_path / "run", "validation")] == [0, 2]
    assert summary.output is not None


def test_an_online_run_that_was_killed_has_the_same_curve(tmp_path: Path, nemotron: Path) -> None:
    def die(progress: object) -> None:
        if progress.step == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    for name in ("whole", "broken"):
        recipe = online(tmp_path, nemotron, name=name, run={
            "directory": str(tmp_path / name), "max_steps": 3, "save_every": 1,
        })  # fmt: skip
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                run.train(recipe, connect=judging(LengthJudge()), on_progress=die)
        run.train(recipe, connect=judging(LengthJudge()))
    numbers = [[line.get("loss") for line in metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kto"}, "loss kto has none"),
        ({"pairs": "rows"}, "goes with a table"),
        ({"rollouts": None}, "goes with a table"),
        ({"rollouts": {"rewards": [PATTERN], "group_size": 1}}, r"rollouts.group_size is 1"),
        ({"rollouts": {"rewards": [PATTERN], "max_new_tokens": 80}}, "leaves no room for a prompt"),
    ],
)
def test_online_pairs_that_cannot_be_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    settings = {"loss": "dpo", "beta": 0.1, "pairs": "online", "rollouts": {"rewards": [PATTERN]}}
    table = {name: value for name, value in (settings | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        online(tmp_path, Path("none"), preference=table)


def test_unfinished_answers_are_left_out_by_default(tmp_path: Path, nemotron: Path) -> None:
    run.train(
        make(tmp_path, nemotron, "ppo", policy_gradient={"unfinished": "leave_out"}),
        connect=judging(LengthJudge()),
    )
    first = metrics(tmp_path / "run")[0]
    assert first["share_unfinished"] > 0
    assert first["trained_answers"] == pytest.approx(16 * (1 - first["share_unfinished"]))


@pytest.mark.parametrize(
    ("row", "rewards", "message"),
    [
        ({"text": "Add 1"}, [{"kind": "gsm8k"}], "field 'answer' is missing; the reward compares"),
        ({"text": "Add 1"}, [{"kind": "reward_model", "model": "x"}], "judges lists of messages"),
        ({"text": "Add 1 " * 60}, [PATTERN], "6 new ones; data.max_length is 80"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, [PATTERN], "ends with an assistant's"),
        ({"query": "?"}, [PATTERN], "expected prompt, messages, question or text"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_found_before_the_run(
    tmp_path: Path, nemotron: Path, row: dict, rewards: list, message: str
) -> None:
    recipe = make(tmp_path, nemotron, "grpo", policy_gradient={"rewards": rewards})
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"prompts\.jsonl:1: .*{message}"):
        run.train(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_gradient": {"group_size": 1}}, "grpo needs 2 or more"),
        ({"policy_gradient": {"rewards": []}}, "names no judge"),
        ({"policy_gradient": {"rewards": [{"kind": "http"}]}}, "url is missing"),
        ({"policy_gradient": {"rewards": [{"kind": "gsm8k", "url": "x"}]}}, "url has no meaning"),
        ({"policy_gradient": {"rewards": [{"kind": "gsm8k", "timeout_s": 5}]}}, "timeout_s has no meaning"),
        ({"policy_gradient": {"rewards": [PATTERN | {"answer_field": "x"}]}}, "answer_field has no meaning"),
        ({"policy_gradient": {"importance_cap": 0}}, "importance_cap is 0"),
        (
            {"model": {"preset": "nano", "tokenizer": "none", "start": None}, "adapter": {"kind": "lora"}},
            "fresh weights of model.preset",
        ),
        ({"policy_gradient": {"temperature": 0}}, "temperature is 0"),
        ({"policy_gradient": {"max_new_tokens": 80}}, "leaves no room for a prompt"),
        ({"stage": "sft"}, r"table \[policy_gradient\] has no meaning in stage sft"),
        ({"policy_gradient": None}, r"needs a table \[policy_gradient\]"),
    ],
)
def test_an_impossible_setting_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, Path("none"), "grpo", **change)


def test_a_preview_counts_prompts_and_steps(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(tmp_path, nemotron, "grpo", run={"max_steps": None, "epochs": 2})
    found = preview(recipe)
    assert (found.num_samples, found.num_steps) == (6, 3)
    assert "Add 0 and 0" in found.first_sample
    without = preview(make(tmp_path, nemotron, "grpo", policy_gradient={"kl_coefficient": 0.0}))
    assert found.weights_bytes - without.weights_bytes == 4 * found.num_parameters  # the reference
    ppo = preview(make(tmp_path, nemotron, "ppo", policy_gradient={"group_size": 1}))
    assert ppo.weights_bytes - found.weights_bytes == 4 * found.num_parameters  # the critic
    assert ppo.optimizer_bytes == 2 * found.optimizer_bytes
    # Each prompt is answered four times, with six tokens at most.
    assert found.tokens_per_epoch * found.trained_share == pytest.approx(6 * 4 * 6)


# ---- formulas, written out from their definitions


def test_grpo_advantages_are_trls() -> None:
    rewards = [1.0, 0.0, 0.5, 0.25]
    mean = sum(rewards) / 4
    deviation = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
    expected = [(r - mean) / (deviation + 1e-4) for r in rewards]
    assert advantages_of_group(rewards, "group") == pytest.approx(expected, abs=1e-12)


def test_reinforce_advantages_are_trls_leave_one_out() -> None:
    rewards = [1.0, -2.0, 0.5]
    expected = [r - (sum(rewards) - r) / 2 for r in rewards]
    assert advantages_of_group(rewards, "leave_one_out") == pytest.approx(expected, abs=1e-12)
    assert advantages_of_group([0.1, 0.1, 0.1], "group") == [0.0, 0.0, 0.0]
    assert advantages_of_group([3.0], "leave_one_out") is None


def test_actor_critic_advantages_are_discounted_sums_of_errors() -> None:
    rewards, values = [(0.0, -0.1, 1.0), (0.5,)], [(0.3, 0.2, 0.1), (-0.2,)]
    discount, decay = 0.9, 0.8
    advantages, returns = actor_critic_advantages(
        rewards, values, discount=discount, decay=decay, is_normalised=False
    )
    for row_r, row_v, row_a, row_r2 in zip(rewards, values, advantages, returns, strict=True):
        after = [*row_v[1:], 0.0]
        errors = [r + discount * n - v for r, n, v in zip(row_r, after, row_v, strict=True)]
        expected = [
            sum((discount * decay) ** (k - t) * errors[k] for k in range(t, len(errors)))
            for t in range(len(errors))
        ]
        assert row_a == pytest.approx(expected, abs=1e-12)
        assert row_r2 == pytest.approx([a + v for a, v in zip(expected, row_v, strict=True)], abs=1e-12)
    white, _ = actor_critic_advantages(rewards, values, discount=1.0, decay=1.0, is_normalised=True)
    flat = [x for row in white for x in row]
    assert sum(flat) / 4 == pytest.approx(0, abs=1e-9)
    assert sum(x * x for x in flat) / 4 == pytest.approx(1, abs=1e-6)


def answers(num: int = 6) -> list[AnswerSample]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(num):
        segment: Segment = tiny.segment(generator)
        size = segment.num_trained
        numbers = torch.randn(3, size, generator=generator).tolist()
        made.append(
            AnswerSample(
                (segment,),
                logprobs=tuple(-4.2 + 0.3 * x for x in numbers[0]),
                reference_logprobs=tuple(-4.2 + 0.3 * x for x in numbers[1]),
                advantages=tuple(numbers[2]),
            )
        )
    return made


def section(algorithm: str, **values: object) -> PolicyGradientSection:
    rewards = (RewardSource(kind="gsm8k"),)
    return PolicyGradientSection(algorithm=algorithm, rewards=rewards, **values)  # type: ignore[arg-type]


def test_the_grpo_step_is_trls_token_mean_with_its_k3_penalty_and_entropy() -> None:
    samples, beta, bonus = answers(), 0.3, 0.05
    scorer = PolicyScorer(tiny.logprob_scorer().net, temperature=0.7)
    engine = TrainingEngine(scorer)
    stage = ActorObjective(section("grpo", kl_coefficient=beta, entropy_bonus=bonus, clip_high=0.28))
    loss = engine.forward_backward(engine.rows(samples, 40), stage).loss
    total, count = 0.0, 0
    for sample in samples:
        tokens = torch.tensor(sample.segments[0].tokens)
        logits = scorer.net(tokens[None])[0] / 0.7
        places = [i for i, trained in enumerate(sample.segments[0].is_trained) if trained]
        for t, place in enumerate(places):
            distribution = torch.log_softmax(logits[place - 1].double(), 0)
            logp = distribution[tokens[place]]
            ratio = torch.exp(logp - sample.logprobs[t])
            advantage = sample.advantages[t]
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            log_ratio = sample.reference_logprobs[t] - logp
            kl = torch.exp(log_ratio) - log_ratio - 1
            entropy = -(distribution.exp() * distribution).sum()
            total += float((-gain + beta * kl - bonus * entropy).detach())
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_no_cut_into_rows_changes_the_gradient(algorithm: str) -> None:
    engine = TrainingEngine(PolicyScorer(tiny.logprob_scorer().net))
    stage = ActorObjective(section(algorithm, entropy_bonus=0.1))
    cuts = compare_cuts(engine, stage, answers(), 60)
    assert len({cut.num_rows for cut in cuts}) > 1
    assert max(cut.difference for cut in cuts) < 1e-5
