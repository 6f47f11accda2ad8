"""Adapters as citizens: chains of them, their recorded base, and forms that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.adapter_base import read_base
from nemotron4.checkpoint.load import load_transformer
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.cli.main import main
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import PEFT_PREFIX, WEIGHTS_FILE, read_adapter_config, write_adapter
from nemotron4.training import chain, run, run_chain
from nemotron4.training.composing import composed
from nemotron4.training.recipe import Recipe, build
from tests import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LORA = {"kind": "lora", "rank": 4, "targets": ["all"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama_directory(tmp_path_factory.mktemp("llama"))


def rows(folder: Path) -> tuple[Path, Path]:
    questions = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(6)]
    chats = [{"messages": [*q, {"role": "assistant", "content": "Two."}]} for q in questions]
    pairs = [{"prompt": q, "chosen": f"It is {i}.", "rejected": "No."} for i, q in enumerate(questions)]
    paths = folder / "chats.jsonl", folder / "pairs.jsonl"
    for path, found in zip(paths, (chats, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return paths


def values(folder: Path, start: Path | str, **more: object) -> dict:
    chats, _ = rows(folder)
    found: dict = {
        "stage": "sft",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [str(chats)], "max_length": 200},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 400},
        "adapter": LORA,
        "run": {"directory": str(folder / "run"), "max_steps": 3},
    }
    for name, value in more.items():
        old = found.get(name)
        found[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def recipe(folder: Path, start: Path | str, **more: object) -> Recipe:
    return build(values(folder, start, **more))


def logits(checkpoint: object) -> torch.Tensor:
    module, _ = load_transformer(open_checkpoint(checkpoint), dtype=torch.float32)  # type: ignore[arg-type]
    with torch.no_grad():
        found: torch.Tensor = module(TOKENS)
    return found


def chain_file(folder: Path, start: Path, adapter: str) -> Path:
    chats, pairs = rows(folder)
    (folder / "chain.toml").write_text(f"""
model = {{ start = "{start}", device = "cpu" }}
data.max_length = 200
optimizer = {{ learning_rate = 1e-2, warmup_steps = 0 }}
batch = {{ global_size = 4, row_tokens = 400 }}
adapter = {{ kind = "lora", rank = 4, targets = ["all"] {adapter} }}
run = {{ directory = "{folder / "chain"}", max_steps = 3 }}
[[stage]]
name = "sft"
kind = "sft"
data.train = ["{chats}"]
[[stage]]
name = "dpo"
kind = "preference"
data.train = ["{pairs}"]
preference = {{ loss = "dpo", beta = 0.1 }}
""")
    return folder / "chain.toml"


@pytest.mark.parametrize("compose", ["merge", "stack"])
def test_a_chain_with_adapters_trains_and_leaves_one_relative_to_the_base(
    tmp_path: Path, llama: Path, compose: str
) -> None:
    notes: list[str] = []
    path = chain_file(tmp_path, llama, f', compose = "{compose}"')
    summary = run_chain.run(chain.load(path), note=notes.append)
    first, second = tmp_path / "chain" / "00-sft" / "adapter", tmp_path / "chain" / "01-dpo" / "adapter"
    assert summary.output == second
    line = (tmp_path / "chain" / "01-dpo" / "metrics.jsonl").read_text().splitlines()[0]
    # The policy equals its reference at first, so the reference is the base with the first adapter.
    assert json.loads(line)["loss"] == pytest.approx(0.6931472, abs=1e-5)
    recorded = read_base(second)
    assert recorded["compose"] == compose
    assert recorded["base"] == str(llama if compose == "merge" else first)
    if compose == "merge":
        assert read_adapter_config(second).rank == 8
        assert recorded["relative_error"] == 0
        assert any("rank 8" in note for note in notes)
    before, after = logits(str(first)), logits(str(second))
    assert not torch.allclose(before, after, atol=1e-3)
    # Applied by hand to the model after SFT, the second stage's own update gives the same model.
    assert torch.allclose(
        after, logits(MergedCheckpoint(open_checkpoint(recorded["base"]), second)), atol=1e-5
    )


def test_a_cut_sum_states_its_error_and_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    config = AdapterConfig(kind="lora", rank=3, compose_rank=2)
    name = "base_model.model.x.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(3, 10), name.format("B"): torch.randn(12, 3)}
    folder_tensors = {key: value.clone() for key, value in tensors.items()}
    import tempfile

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        save_file(folder_tensors, folder / "adapter_model.safetensors")
        peft = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["x"]}
        (folder / "adapter_config.json").write_text(json.dumps(peft))
        made, rank, error = composed(folder, tensors, config)
    product = tensors[name.format("B")] @ tensors[name.format("A")]
    whole = 2 * product + product
    got = made[name.format("B")] @ made[name.format("A")]
    singular = torch.linalg.svdvals(whole)
    assert rank == 2
    assert error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
    assert float((whole - got).norm() / whole.norm()) == pytest.approx(error, rel=1e-3)


def test_what_an_adapter_saved_whole_stays_in_the_one_that_goes_on_from_it(tmp_path: Path) -> None:
    start = tiny_models.nemotron_directory(tmp_path / "start")  # its output layer is not tied
    run.train(recipe(tmp_path, start, adapter={"modules_to_save": ["lm_head"]}))
    first = tmp_path / "run" / "adapter"
    still = {
        "optimizer": {"learning_rate": 0.0},
        "run": {"directory": str(tmp_path / "second"), "max_steps": 1},
    }
    second = run.train(recipe(tmp_path, first, **still)).output
    assert read_adapter_config(tmp_path / "second" / "adapter").modules_to_save == ("lm_head",)
    assert torch.allclose(logits(str(first)), logits(str(second)), atol=1e-5)


def test_an_adapter_alone_is_a_start_on_its_own_base(tmp_path: Path, llama: Path) -> None:
    run.train(recipe(tmp_path, llama))
    adapter = tmp_path / "run" / "adapter"
    again = recipe(tmp_path, adapter, run={"directory": str(tmp_path / "second"), "max_steps": 1})
    named = recipe(
        tmp_path,
        llama,
        model={"adapter": str(adapter)},
        run={"directory": str(tmp_path / "third"), "max_steps": 1},
    )
    assert run.train(again).output is not None
    run.train(named)
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("second", "third")
    )
    assert first == second


def test_the_recorded_base_opens_from_any_folder_with_peft(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(llama.parent)
    run.train(recipe(tmp_path, llama.name))
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "run" / "adapter"
    config = peft.PeftConfig.from_pretrained(str(adapter))
    assert Path(config.base_model_name_or_path) == llama
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(adapter))(TOKENS).logits
    assert torch.allclose(theirs, logits(str(adapter)), atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"0.*q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_other_forms_of_lora_train_open_and_are_pefts(tmp_path: Path, more: dict) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    start = tiny_models.llama_directory(tmp_path / "start", tie_word_embeddings=False)
    run.train(recipe(tmp_path, start, adapter=LORA | more))
    adapter = tmp_path / "run" / "adapter"
    ours = logits(str(adapter))
    assert not torch.allclose(ours, logits(start), atol=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(adapter))(TOKENS).logits
    assert torch.allclose(theirs, ours, atol=1e-4)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]


def test_an_adapter_on_another_base_is_refused_with_both_names(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train(recipe(tmp_path, llama))
    adapter = tmp_path / "run" / "adapter"
    other = tiny_models.llama_directory(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError) as caught:
        MergedCheckpoint(open_checkpoint(other), adapter)
    assert str(llama) in str(caught.value)
    assert str(other) in str(caught.value)
    MergedCheckpoint(open_checkpoint(other), adapter, force=True)
    target = tmp_path / "converted"
    command = ["convert", str(other), str(target), "--to", "hf", "--adapter", str(adapter)]
    assert main(command) == 1
    assert "--force-adapter" in capsys.readouterr().err
    assert main([*command, "--force-adapter"]) == 0


@pytest.mark.parametrize(
    "more", [{"targets": ["lm_head", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_a_tied_weight_is_refused_before_training(tmp_path: Path, more: dict) -> None:
    start = tiny_models.llama_directory(tmp_path / "start", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="shares its weight"):
        run.train(recipe(tmp_path, start, adapter={"kind": "lora", "rank": 2} | more))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_lora_on_a_module_that_is_kept_whole_is_refused_and_in_older_files_merged(tmp_path: Path) -> None:
    start = tiny_models.llama_directory(tmp_path / "start", tie_word_embeddings=False)
    both = {"targets": ["lm_head"], "modules_to_save": ["lm_head"]}
    with pytest.raises(ConfigError, match="both name lm_head"):
        run.train(recipe(tmp_path, start, adapter={"kind": "lora", "rank": 2} | both))
    config = AdapterConfig(kind="lora", rank=2, targets=("lm_head",), modules_to_save=("lm_head",))
    base = open_checkpoint(start)
    num_rows, num_columns = base.tensors["lm_head.weight"].shape
    whole, up, down = (
        torch.randn(shape) for shape in ((num_rows, num_columns), (num_rows, 2), (2, num_columns))
    )
    factors = {"lora_A.weight": down, "lora_B.weight": up, "weight": whole}
    tensors = {f"{PEFT_PREFIX}lm_head.{name}": tensor for name, tensor in factors.items()}
    write_adapter(tmp_path / "adapter", tensors, config, base=str(start))
    merged = MergedCheckpoint(base, tmp_path / "adapter").read_rows("lm_head.weight", 0, num_rows)
    torch.testing.assert_close(merged, whole + up @ down)


def test_an_adapter_has_the_type_that_is_asked_for(tmp_path: Path, llama: Path) -> None:
    first = run.train(recipe(tmp_path, llama, run={"result_dtype": "bfloat16", "max_steps": 1})).output
    again = tmp_path / "again"
    again.mkdir()
    more = {"model": {"adapter": str(first)}, "adapter": {"rank": 1}, "run": {"max_steps": 1}}
    for folder, dtype in (
        (first, torch.bfloat16),
        (run.train(recipe(again, llama, **more)).output, torch.float32),
    ):
        assert folder is not None
        assert {tensor.dtype for tensor in load_file(folder / WEIGHTS_FILE).values()} == {dtype}


def test_an_adapter_trains_on_and_keeps_its_rank(tmp_path: Path, llama: Path) -> None:
    first = run.train(recipe(tmp_path, llama)).output
    still = {"directory": str(tmp_path / "still"), "max_steps": 1}
    go_on = {"compose": "continue"}
    same = run.train(
        recipe(tmp_path, llama, model={"adapter": str(first)}, adapter=go_on, run=still,
               optimizer={"learning_rate": 0.0})
    ).output  # fmt: skip
    assert torch.equal(logits(str(first)), logits(str(same)))
    more = {"directory": str(tmp_path / "more"), "max_steps": 3}
    second = run.train(recipe(tmp_path, str(first), adapter=go_on, run=more)).output
    assert read_adapter_config(second).rank == read_adapter_config(first).rank == 4
    assert (read_base(second)["compose"], read_base(second)["base"]) == ("continue", str(llama))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "more")]
    (before, *_), (after, *_) = ([json.loads(line)["loss"] for line in found] for found in lines)
    assert after < before
    assert not torch.allclose(logits(str(first)), logits(str(second)), atol=1e-3)


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ({"rank": 8}, 'set kind = "lora", rank = 4, alpha = 4.0, targets = ["down_proj"'),
        ({"use_dora": True}, "rank = 4"),
        ({"compose_rank": 2}, "compose = 'merge'"),
    ],
)
def test_another_shape_than_that_of_the_adapter_that_trains_on_is_refused(
    tmp_path: Path, llama: Path, more: dict, hint: str
) -> None:
    first = run.train(recipe(tmp_path, llama, run={"max_steps": 1})).output
    with pytest.raises(ConfigError) as raised:
        run.train(
            recipe(tmp_path, str(first), adapter={"compose": "continue", **more},
                   run={"directory": str(tmp_path / "second")})
        )  # fmt: skip
    assert hint in f"{raised.value.message} {raised.value.hint}"


def test_what_cannot_train_on_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match="the start has none"):
        run.train(recipe(tmp_path, llama, adapter={"compose": "continue"}))
    with pytest.raises(ConfigError, match="compares with the start"):
        recipe(tmp_path, llama, stage="reward", adapter={"compose": "continue"})


def test_an_adapter_that_lacks_a_module_cannot_train_on(tmp_path: Path, llama: Path) -> None:
    first = run.train(recipe(tmp_path, llama, run={"max_steps": 1})).output
    tensors = load_file(first / WEIGHTS_FILE)
    left_out = f"{PEFT_PREFIX}model.layers.1.mlp.up_proj.lora_"
    save_file({name: t for name, t in tensors.items() if not name.startswith(left_out)}, first / WEIGHTS_FILE)
    again = recipe(
        tmp_path, str(first), adapter={"compose": "continue"}, run={"directory": str(tmp_path / "b")}
    )
    with pytest.raises(CheckpointError, match=r"adapter: has no 'model.layers.1.mlp.up_proj.lora_A.weight'"):
        run.train(again)
