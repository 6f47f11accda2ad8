"""Recipes run from files to a model directory, on tiny real checkpoints with real tokenizers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import accumulate
from pathlib import Path

import numpy
import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.load import load_transformer
from nemotron4.cli.main import main
from nemotron4.errors import ConfigError, DataError, TrainingError
from nemotron4.inference.load import load
from nemotron4.inference.reward import load_reward
from nemotron4.model.adapter_files import load_adapter
from nemotron4.model.attention import CausalAttend
from nemotron4.model.reward_head import RewardModel
from nemotron4.training import inputs, parallel, run
from nemotron4.training import recipe as recipes
from nemotron4.training.dataset import TextWindows
from nemotron4.training.loading import Origin
from nemotron4.training.preview import preview
from nemotron4.training.recipe import Recipe, build
from tests import tiny_models


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("nemotron"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama_directory(tmp_path_factory.mktemp("llama"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(i: int) -> list[dict]:
    return [{"role": "user", "content": f"What is {i} plus {i}?"}]


def chats(folder: Path, num: int = 6) -> Path:
    rows = [
        {"messages": [*question(i), {"role": "assistant", "content": f"It is {2 * i}."}]} for i in range(num)
    ]
    return write(folder / "chats.jsonl", rows)


def pairs(folder: Path, *, rewards: bool = True, num: int = 6) -> Path:
    rows = []
    for i in range(num):
        row = {"prompt": question(i), "chosen": f"It is {2 * i}.", "rejected": "I do not know."}
        rows.append(row | ({"chosen_reward": 3.0, "rejected_reward": 1.0} if rewards else {}))
    return write(folder / "pairs.jsonl", rows)


def make(folder: Path, start: Path, stage: str, train: Path, /, **more: object) -> Recipe:
    values = {
        "stage": stage,
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [str(train)], "max_length": 200},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 400},
        "run": {"directory": str(folder / "run"), "max_steps": 2, "save_every": 10},
    }
    for name, value in more.items():
        old = values.get(name)
        values[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return build(values)


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_sft_writes_a_model_that_opens_and_differs(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    start: Path = request.getfixturevalue(family)
    summary = run.train(make(tmp_path, start, "sft", chats(tmp_path)))
    assert summary.steps == 2
    assert summary.output is not None
    trained, _ = load_transformer(open_checkpoint(summary.output), dtype=torch.float32)
    before, _ = load_transformer(open_checkpoint(start), dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert not torch.allclose(trained(tokens), before(tokens))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["stage"] == "sft"
    assert record["inputs"]


def test_a_longer_run_goes_on_and_replaces_the_model(tmp_path: Path, nemotron: Path) -> None:
    train = chats(tmp_path)
    run.train(make(tmp_path, nemotron, "sft", train, run={"max_steps": 1}))
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    summary = run.train(make(tmp_path, nemotron, "sft", train, run={"max_steps": 3}))
    assert summary.steps == 3
    assert len(losses(tmp_path)) == 3
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != first


def test_the_trained_model_opens_in_transformers_with_the_same_logits(tmp_path: Path, llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    summary = run.train(make(tmp_path, llama, "sft", chats(tmp_path)))
    assert summary.output is not None
    ours, _ = load_transformer(open_checkpoint(summary.output), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(summary.output)
    tokens = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rpo_with_lora_saves_an_adapter_and_reuses_the_cached_reference(
    tmp_path: Path, nemotron: Path
) -> None:
    settings = {"preference": {"loss": "rpo", "beta": 0.3}, "adapter": {"kind": "lora", "rank": 2}}
    train = pairs(tmp_path)
    summary = run.train(make(tmp_path, nemotron, "preference", train, **settings))
    assert summary.output == tmp_path / "run" / "adapter"
    model, _ = load_transformer(open_checkpoint(nemotron), dtype=torch.float32)
    load_adapter(model, summary.output)
    (cache,) = tmp_path.glob(".reference-*.jsonl")
    lines = cache.read_text()
    assert len(lines.splitlines()) == 6
    again = make(
        tmp_path, nemotron, "preference", train, **settings, run={"directory": str(tmp_path / "again")}
    )
    run.train(again)
    assert cache.read_text() == lines


def test_the_reference_of_p_tuning_is_the_base_without_the_virtual_prompt(
    tmp_path: Path, nemotron: Path
) -> None:
    train, settings = pairs(tmp_path), {"preference": {"loss": "dpo", "beta": 0.3}}
    found = []
    for place, adapter in enumerate((None, {"kind": "p_tuning", "num_virtual_tokens": 3})):
        more = settings | {"run": {"directory": str(tmp_path / str(place))}}
        run.train(
            make(tmp_path, nemotron, "preference", train, **more, **({"adapter": adapter} if adapter else {}))
        )
        (cache,) = tmp_path.glob(".reference-*.jsonl")
        found.append([json.loads(line)["logprobs"] for line in cache.read_text().splitlines()])
    base, both = found
    assert len(both) == 2 * len(base) == 12
    for one, other in zip(base, both[6:], strict=True):
        assert other == pytest.approx(one, abs=1e-4)


def test_a_prompt_that_only_the_virtual_one_precedes_is_refused(tmp_path: Path, nemotron: Path) -> None:
    row = {
        "prompt": "",
        "chosen": "It is so.",
        "rejected": "No.",
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
    }
    recipe = make(
        tmp_path, nemotron, "preference", write(tmp_path / "p.jsonl", [row]),
        preference={"loss": "dpo", "beta": 0.3}, adapter={"kind": "p_tuning", "num_virtual_tokens": 3},
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"p\.jsonl:1: the first token is trained"):
        run.train(recipe)


def test_a_cached_reference_of_other_weights_is_refused(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(tmp_path, nemotron, "preference", pairs(tmp_path), preference={"loss": "dpo", "beta": 0.3})
    run.train(recipe)
    (cache,) = tmp_path.glob(".reference-*.jsonl")
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    write(cache, [row | {"logprobs": [x - 5 for x in row["logprobs"]]} for row in rows])
    with pytest.raises(TrainingError, match=r"pairs\.jsonl:\d.*the model gives"):
        run.train(recipe)


def test_dpo_starts_at_log_two_and_shows_the_share_of_rows_left_out(tmp_path: Path, nemotron: Path) -> None:
    train = pairs(tmp_path)
    with train.open("a") as file:
        file.write('{"prompt": "What?", "chosen": "That."}\n' * 2)
    settings = {"preference": {"loss": "dpo", "beta": 0.3}, "data": {"max_bad_rows": 2}}
    run.train(make(tmp_path, nemotron, "preference", train, **settings))
    assert losses(tmp_path)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses(tmp_path)[1] < 0.69
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["share_left_out"] == 0.25


@pytest.mark.parametrize("loss", ["dpo", "ipo", "rpo"])
def test_preference_training_raises_the_accuracy_on_held_out_pairs(
    tmp_path: Path, nemotron: Path, loss: str
) -> None:
    rows = [json.loads(line) for line in pairs(tmp_path, num=24).read_text().splitlines()]
    for i, row in enumerate(rows):
        # Which of the two is better cannot be told from their order or length.
        row["chosen"], row["rejected"] = f"The year is {i + 10}.", f"The buds are {i + 10}."
    held_out = write(tmp_path / "held_out.jsonl", rows[16:])
    recipe = make(
        tmp_path, nemotron, "preference", write(tmp_path / "train.jsonl", rows[:16]),
        preference={"loss": loss, "beta": 0.1}, data={"validation": [str(held_out)]},
        run={"max_steps": 12, "validate_every": 1}, optimizer={"learning_rate": 1e-4},
    )  # fmt: skip
    run.train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert validation[-1]["margin_beta"] > validation[0]["margin_beta"] > 0
    assert validation[-1]["accuracy"] >= 0.9


def test_a_missing_reward_stops_rpo_with_file_and_line(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(
        tmp_path,
        nemotron,
        "preference",
        pairs(tmp_path, rewards=False),
        preference={"loss": "rpo", "beta": 0.3},
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: field 'chosen_reward' is missing"):
        run.train(recipe)
    assert not (tmp_path / "run").exists()


def test_kto_trains_on_judged_answers(tmp_path: Path, nemotron: Path) -> None:
    rows = [{"prompt": question(i), "completion": f"It is {2 * i}.", "label": i % 2 == 0} for i in range(6)]
    recipe = make(
        tmp_path, nemotron, "preference", write(tmp_path / "kto.jsonl", rows),
        preference={"loss": "kto", "beta": 0.3},
    )  # fmt: skip
    run.train(recipe)
    assert losses(tmp_path)[0] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_reward_regression_learns_its_labels(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    rows = [
        {"messages": [*question(i), {"role": "assistant", "content": "yes" if i % 2 else "no"}],
         "attributes": {"helpfulness": 4.0 if i % 2 else 0.0, "verbosity": 1.0}}
        for i in range(8)
    ]  # fmt: skip
    recipe = make(
        tmp_path, request.getfixturevalue(family), "reward", write(tmp_path / "r.jsonl", rows),
        run={"max_steps": 30}, optimizer={"learning_rate": 3e-3},
    )  # fmt: skip
    run.train(recipe)
    assert losses(tmp_path)[-1] < 0.3 * losses(tmp_path)[0]
    saved = open_checkpoint(tmp_path / "run" / "model")
    assert saved.config.num_reward_attributes == 9


@pytest.mark.parametrize("kind", ["lora", "p_tuning", "bottleneck"])
def test_a_reward_model_learns_through_an_adapter_and_its_head(
    tmp_path: Path, nemotron: Path, kind: str
) -> None:
    recipe = make(
        tmp_path, nemotron, "reward", pairs(tmp_path, rewards=False),
        reward={"objective": "bradley_terry"}, adapter={"kind": kind, "rank": 4},
        run={"max_steps": 20}, optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    summary = run.train(recipe)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] == 1.0
    assert summary.output is not None
    net = plain_reward_model(recipe, nemotron)
    fresh = net.reward_head.weight.detach().clone()
    load_adapter(net, summary.output)
    assert not torch.equal(net.reward_head.weight, fresh)


def plain_reward_model(recipe: Recipe, base: Path) -> RewardModel:
    """What the run started from: the base, its head drawn from the recipe's seed, no adapter."""
    checkpoint = open_checkpoint(base)
    config = inputs.model_config(recipe, checkpoint)
    origin = Origin(dataclasses.replace(recipe, adapter=None), checkpoint, config)
    net = parallel.build(origin, None, torch.device("cpu")).scorer.net
    assert isinstance(net, RewardModel)
    return net


def test_a_reward_adapter_turns_its_base_into_the_trained_reward_model(
    tmp_path: Path, nemotron: Path
) -> None:
    recipe = make(
        tmp_path, nemotron, "reward", pairs(tmp_path, rewards=False),
        reward={"objective": "bradley_terry"}, adapter={"kind": "lora", "rank": 4, "targets": ["all"]},
        run={"max_steps": 3}, optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    adapter = run.train(recipe).output
    assert adapter is not None
    merged = load_reward(nemotron, adapter=adapter)
    convert(open_checkpoint(nemotron), tmp_path / "whole", ConvertOptions(to="hf", adapter=adapter))
    net = plain_reward_model(recipe, nemotron)
    load_adapter(net, adapter)
    ids = open_checkpoint(nemotron).tokenizer().encode("Shall I compare thee to a summer's day?")
    positions = torch.arange(len(ids))[None]
    with torch.no_grad():
        hidden = net.model(torch.tensor([ids]), positions, CausalAttend())
        expected = net(hidden[0, -1]).tolist()
    assert merged.score_ids([ids])[0].raw == pytest.approx(expected, abs=1e-5)
    assert load_reward(tmp_path / "whole").score_ids([ids])[0].raw == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_learns_which_answer_is_better(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(
        tmp_path, nemotron, "reward", pairs(tmp_path, rewards=False), reward={"objective": "bradley_terry"},
        run={"max_steps": 20}, optimizer={"learning_rate": 3e-3},
    )  # fmt: skip
    run.train(recipe)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] == 1.0


def test_a_fresh_nano_model_pretrains_on_text(tmp_path: Path, nemotron: Path) -> None:
    (tmp_path / "a.txt").write_text("the rough winds do shake the darling buds of may " * 40)
    write(tmp_path / "b.jsonl", [{"text": "summer's lease hath all too short a date"}] * 9)
    recipe = make(
        tmp_path, nemotron, "pretrain", tmp_path / "a.txt",
        model={"start": None, "preset": "nano", "tokenizer": str(nemotron)},
        data={
            "train": [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")],
            "weights": [1.0, 3.0],
            "max_length": 32,
        },
        run={"max_steps": 5}, optimizer={"schedule": "cosine"},
    )  # fmt: skip
    run.train(recipe)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.parametrize("front", [(), (90, 91, 92)])
def test_windows_predict_every_token_of_every_document_once(front: tuple[int, ...]) -> None:
    documents = [list(range(10, 10 + n)) for n in (3, 25, 1, 8)]
    stream = [token for document in documents for token in (1, *document, 1)]
    starts = [0, *accumulate(len(document) + 2 for document in documents)]
    windows = TextWindows(numpy.array(stream), starts, 10, front)
    predicted: list[int] = []
    for i in range(len(windows)):
        assert windows[i].num_tokens <= 10
        for segment in windows[i].segments:
            assert segment.tokens[: len(front)] == front
            assert not any(segment.is_trained[: len(front) + 1])
            predicted += [
                t for t, is_trained in zip(segment.tokens, segment.is_trained, strict=True) if is_trained
            ]
    assert predicted == [token for document in documents for token in (*document, 1)]


def test_virtual_tokens_that_fill_a_window_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.max_length \(10\) leaves no room for text behind 9 virtual"
    ):
        TextWindows(numpy.array([1, 5, 6, 1]), [0, 4], 10, tuple(range(9)))


def test_p_tuning_trains_through_the_virtual_tokens(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(
        tmp_path, nemotron, "sft", chats(tmp_path),
        adapter={"kind": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    )  # fmt: skip
    summary = run.train(recipe)
    assert summary.output is not None
    model, _ = load_transformer(open_checkpoint(nemotron), dtype=torch.float32)
    assert load_adapter(model, summary.output).num_virtual_tokens == 3
    assert losses(tmp_path)[1] != losses(tmp_path)[0]


def test_over_long_rows_are_left_out_with_a_count_or_refused(tmp_path: Path, nemotron: Path) -> None:
    train = chats(tmp_path)
    with train.open("a") as file:
        long = {"messages": [*question(1), {"role": "assistant", "content": "long " * 300}]}
        file.write(json.dumps(long) + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:7: \d+ tokens; data.max_length is 200"):
        run.train(make(tmp_path, nemotron, "sft", train))
    assert run.train(make(tmp_path, nemotron, "sft", train, data={"max_bad_rows": 1})).num_problems == 1
    found = preview(make(tmp_path, nemotron, "sft", train, data={"over_long": "cut"}))
    assert (found.num_samples, found.longest) == (7, 200)


def test_a_preview_counts_the_result_in_its_type(tmp_path: Path, nemotron: Path) -> None:
    train = chats(tmp_path)
    found = [
        preview(make(tmp_path, nemotron, "sft", train, run={"result_dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    ]
    assert [each.result_bytes for each in found] == [4 * found[0].num_parameters, 2 * found[0].num_parameters]
    assert [each.result_dtype for each in found] == ["float32", "bfloat16"]


def test_a_pair_that_no_row_can_hold_is_found_before_the_run(tmp_path: Path, nemotron: Path) -> None:
    # Each answer fits with its prompt, but both together do not, though they share it.
    rows = write(
        tmp_path / "pairs.jsonl",
        [
            {
                "prompt": question(0),
                "chosen": "It is one of them. " * 2,
                "rejected": "I do not know that. " * 2,
            }
        ],
    )
    recipe = make(
        tmp_path, nemotron, "preference", rows, preference={"loss": "dpo", "beta": 0.3},
        data={"max_length": 70}, batch={"row_tokens": 70},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: \d+ tokens together; batch.row_tokens is 70"):
        run.train(recipe)


# ---- recipes and the command


def recipe_file(folder: Path, model: Path, train: Path) -> Path:
    text = (
        f'stage = "sft"\n[model]\nstart = "{model}"\n[data]\ntrain = ["{train}"]\nmax_length = 128\n'
        f"[optimizer]\nlearning_rate = 1e-3\n[batch]\nrow_tokens = 256\n"
        f'[run]\ndirectory = "{folder / "run"}"\nmax_steps = 1\n'
    )
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def test_an_unknown_key_is_refused_with_line_and_nearest_name(tmp_path: Path, nemotron: Path) -> None:
    path = recipe_file(tmp_path, nemotron, chats(tmp_path))
    path.write_text(path.read_text().replace("learning_rate", "lerning_rate"))
    with pytest.raises(
        ConfigError, match=r"recipe\.toml:\d+: unknown key 'optimizer.lerning_rate'"
    ) as caught:
        recipes.load(path)
    assert caught.value.hint is not None
    assert "learning_rate" in caught.value.hint


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("optimizer.lr=1e-4", "optimizer.learning_rate"),
        ("batch.micro_batch_size=4", "batch.row_tokens"),
        ("batch.per_device_train_batch_size=4", "batch.row_tokens"),
        ("run.num_train_epochs=3", "run.epochs"),
        ("model.recompute=true", "model.activation_checkpointing"),
        ("learning_rate=1e-4", "optimizer.learning_rate"),
    ],
)
def test_other_trainers_names_are_answered_with_ours(
    tmp_path: Path, nemotron: Path, override: str, ours: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.load(recipe_file(tmp_path, nemotron, chats(tmp_path)), [override])
    assert ours in str(caught.value.hint)


def test_the_command_previews_checks_trains_and_plots(
    tmp_path: Path, nemotron: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe_file(tmp_path, nemotron, chats(tmp_path)))
    assert main(["train", path, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "6 to train on" in shown
    assert "────" in shown  # the table of every other report
    assert "[[It is" in shown
    assert main(["train", path, "--check-invariance", "--json"]) == 0
    cuts = json.loads(capsys.readouterr().out)["cuts"]
    assert len({cut["num_rows"] for cut in cuts}) > 1
    assert main(["train", path, "run.max_steps=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert main(["train", str(tmp_path / "run"), "--plot", "--output", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_wrong_number_of_processes_is_explained(tmp_path: Path, nemotron: Path) -> None:
    recipe = make(tmp_path, nemotron, "sft", chats(tmp_path), parallel={"data": 2})
    with pytest.raises(ConfigError, match="but 1 were launched") as caught:
        run.train(recipe)
    assert "torchrun --nproc-per-node 2" in str(caught.value.hint)


@pytest.mark.parametrize("kind", [None, "lora", "bottleneck"])
def test_the_same_prompts_are_answered_after_every_validation(
    tmp_path: Path, nemotron: Path, kind: str | None
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"messages": question(0)}, {"text": "Shall I"}])
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": "Shall I", "completion": " compare thee"}])
    recipe = make(
        tmp_path, nemotron, "sft", chats(tmp_path),
        data={"train": [str(tmp_path / "chats.jsonl")], "validation": [str(held_out)]},
        samples={"prompts": str(prompts), "max_new_tokens": 4},
        run={"max_steps": 4, "validate_every": 2}, optimizer={"learning_rate": 1e-2},
        **({} if kind is None else {"adapter": {"kind": kind, "rank": 2}}),
    )  # fmt: skip
    run.train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4]  # 0: before the first step
    assert lines[0]["prompt"] == question(0)
    if kind is None:  # the last answers are those of the model that the run left
        with load(tmp_path / "run" / "model", dtype="float32") as engine:
            [last] = engine.generate(["Shall I"], max_new_tokens=4, temperature=0)
        assert lines[5]["answer"] == last.text


def test_samples_change_neither_the_curve_nor_the_run(tmp_path: Path, nemotron: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"text": "Shall I"}])
    files = {"train": [str(chats(tmp_path))], "validation": [str(chats(tmp_path))]}
    shapes = {"data": files, "run": {"max_steps": 3, "validate_every": 1}}
    plain = make(tmp_path, nemotron, "sft", chats(tmp_path), **shapes)
    run.train(plain)
    without = losses(tmp_path)
    shutil.rmtree(tmp_path / "run")
    sampled = make(tmp_path, nemotron, "sft", chats(tmp_path), samples={"prompts": str(prompts)}, **shapes)
    run.train(sampled)
    assert losses(tmp_path)[1:] == without  # the first is the validation before the first step
