"""The planner reproduces published hardware, sizes and rates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.cluster.hardware import gpu_named
from nemotron4.cluster.known_models import KNOWN_MODELS
from nemotron4.cluster.layout import (
    ParallelSizes,
    kv_bytes_per_token,
    non_embedding_parameters,
    training_operations,
)
from nemotron4.cluster.plan import HardwarePlan, Workload, make_plan
from nemotron4.cluster.sizes import WeightBytes, bytes_by_part, num_parameters, tensor_sizes
from nemotron4.errors import ConfigError
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import PRESETS, nemotron4_15b, nemotron4_340b


def plan_for(gpu: str, **workload: object) -> HardwarePlan:
    return make_plan(nemotron4_340b(), gpu_named(gpu), Workload(**workload))  # type: ignore[arg-type]


@pytest.mark.parametrize(("gpu", "num_gpus"), [("h200-141gb", 8), ("h100-80gb", 16), ("a100-80gb", 16)])
def test_bf16_needs_the_hardware_of_the_model_card(gpu: str, num_gpus: int) -> None:
    layout = plan_for(gpu).layout
    assert layout.num_gpus == num_gpus
    assert layout == ParallelSizes(tensor_parallel=8, pipeline_parallel=num_gpus // 8)


def test_bf16_does_not_fit_one_node_of_h100_and_the_plan_says_why() -> None:
    plan = plan_for("h100-80gb")
    rejected = {attempt.layout.num_gpus: attempt.problem for attempt in plan.rejected}
    assert set(rejected) == {1, 2, 4, 8}
    assert "weights 85.3" in (rejected[8] or "")
    assert "78.7 of 85.5 GB" in (rejected[8] or "")


def test_fp8_fits_one_node_of_h100_and_not_half_of_it() -> None:
    plan = plan_for("h100-80gb", dtype="fp8")
    assert plan.layout.num_gpus == 8
    assert {attempt.layout.num_gpus for attempt in plan.rejected} == {1, 2, 4}


def test_full_fine_tuning_needs_twelve_nodes_as_the_published_recipe() -> None:
    assert plan_for("h100-80gb", train="full").layout == ParallelSizes(8, 12)


def test_lora_fits_where_full_training_does_not() -> None:
    assert plan_for("h100-80gb", train="lora").layout.num_gpus == 16


def test_a_base_of_four_bits_fits_one_gpu_where_the_whole_one_does_not() -> None:
    config, gpu = PRESETS["nemotron4-15b"](), gpu_named("a100-40gb")
    lora, qlora = (Workload(train=train, method="sft") for train in ("lora", "qlora"))
    assert make_plan(config, gpu, lora).layout.num_gpus > 1
    (rank,) = make_plan(config, gpu, qlora).chosen.stages
    assert rank.weights < 0.75 * config.num_parameters * 2
    assert rank.weights > 0.62 * config.num_parameters
    with pytest.raises(ConfigError, match="one process"):
        make_plan(PRESETS["nemotron4-340b"](), gpu, qlora)


def test_offloaded_moments_make_room_on_one_gpu() -> None:
    config, gpu = PRESETS["minitron-4b"](), gpu_named("h100-80gb")
    near, far = (Workload(train="full", moments=kind) for kind in ("float32", "offloaded"))
    assert make_plan(config, gpu, near).layout.num_gpus > 1
    (rank,) = make_plan(config, gpu, far).chosen.stages
    assert rank.optimizer == 4 * config.num_parameters, "the float32 weights"
    with pytest.raises(ConfigError, match="moments that are offloaded train in one process"):
        make_plan(PRESETS["nemotron4-340b"](), gpu, far)


def test_ppo_needs_the_whole_policy_on_each_of_several_gpus_and_a_whole_critic() -> None:
    policy = 2 * 341_029_195_776
    with pytest.raises(ConfigError, match=rf"rollouts {policy / 1e9:.1f}"):
        plan_for("h100-80gb", train="lora", method="ppo")
    config, gpu = PRESETS["minitron-4b"](), gpu_named("h200-141gb")
    works = (Workload(train="lora", method="sft"), Workload(train="lora", method="ppo"))
    (sft,), (ppo,) = (make_plan(config, gpu, work).chosen.stages for work in works)
    assert ppo.rollouts == 0  # one GPU generates by the modules that train
    assert ppo.weights - sft.weights == 2 * config.num_parameters
    assert ppo.optimizer - sft.optimizer == 12 * config.num_parameters


@pytest.mark.parametrize(
    ("preset", "total", "non_embedding", "kv_bytes"),
    [
        ("nemotron4-340b", 341_029_195_776, 331_592_011_776, 589_824),
        ("nemotron4-15b", 15_628_775_424, 12_483_047_424, 131_072),
        ("minitron-8b", 8_271_699_968, 6_174_547_968, 131_072),
        ("minitron-4b", 4_190_509_056, 2_617_645_056, 131_072),
    ],
)
def test_parameters_and_cache_are_those_published(
    preset: str, total: int, non_embedding: int, kv_bytes: int
) -> None:
    config = PRESETS[preset]()
    assert num_parameters(config) == config.num_parameters == total
    assert non_embedding_parameters(config) == non_embedding
    assert kv_bytes_per_token(config, ParallelSizes(1, 1)) == kv_bytes
    assert sum(bytes_by_part(config, WeightBytes("bf16")).values()) == 2 * total


@pytest.mark.parametrize(
    ("preset", "num_gpus", "seconds", "batch", "published"),
    [
        ("nemotron4-340b", 1536, 10.3, 768, 42.4),
        ("nemotron4-340b", 3072, 10.3, 1536, 42.3),
        ("nemotron4-340b", 6144, 8.0, 2304, 41.0),
        ("nemotron4-15b", 768, 0.57, 384, 34.3),
        ("nemotron4-15b", 1536, 0.58, 768, 33.3),
        ("nemotron4-15b", 2304, 0.64, 1152, 30.5),
    ],
)
def test_mfu_reproduces_the_published_rows(
    preset: str, num_gpus: int, seconds: float, batch: int, published: float
) -> None:
    operations = training_operations(PRESETS[preset](), batch=batch, context=4096)
    share = operations / (num_gpus * 989e12 * seconds)
    assert 100 * share == pytest.approx(published, abs=0.31)


def test_more_sequences_need_more_memory_until_nothing_fits() -> None:
    few, many = plan_for("h200-141gb", concurrency=1), plan_for("h200-141gb", concurrency=64)
    cache = [plan.chosen.stages[0].kv_cache for plan in (few, many)]
    assert cache[1] == 64 * cache[0]
    with pytest.raises(ConfigError, match="no layout of up to"):
        plan_for("h100-80gb", concurrency=10**7)


def test_decode_is_bound_by_bandwidth_and_follows_the_formula() -> None:
    plan = plan_for("h200-141gb", concurrency=1)
    rates = plan.rates
    assert rates is not None
    rank = plan.chosen.stages[0]
    assert rates.decode_bound == "bandwidth"
    assert rates.decode_step_s == pytest.approx((rank.weights + rank.kv_cache) / 4.8e12)


def test_a_given_layout_is_described_even_if_it_does_not_fit() -> None:
    plan = make_plan(
        nemotron4_340b(), gpu_named("h100-80gb"), Workload(), tensor_parallel=8, pipeline_parallel=1
    )
    assert plan.chosen.problem is not None
    assert plan.to_json()["fits"] is False


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel is 3"),
        ({"tensor_parallel": 16}, "tensor_parallel is 16; the model has 8 key/value heads"),
        ({"pipeline_parallel": 5}, "96 layers do not divide"),
    ],
)
def test_an_impossible_split_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(nemotron4_340b(), gpu_named("h100-80gb"), Workload(), **sizes)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as raised:
        gpu_named("h100-90gb")
    assert "did you mean 'h100-80gb'?" in str(raised.value.hint)
    assert "--gpu-memory" in str(raised.value.hint)
    assert gpu_named("H200").name == "h200-141gb"


def test_eight_bit_bytes_equal_a_converted_checkpoint(tmp_path: Path) -> None:
    import torch

    from nemotron4.checkpoint.convert import ConvertOptions, convert
    from nemotron4.checkpoint.opening import open_checkpoint
    from nemotron4.checkpoint.safetensors import read_header
    from tests.tiny_models import nemotron_directory

    source = nemotron_directory(tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(source)
    convert(checkpoint, tmp_path / "q", ConvertOptions(to="hf", quantize="int8"))
    stored = read_header(tmp_path / "q" / "model.safetensors")
    planned = sum(bytes_by_part(checkpoint.config, WeightBytes("int8")).values())
    assert sum(tensor.num_bytes for tensor in stored.values()) == planned


def test_every_tensor_has_the_name_and_shape_of_the_real_model() -> None:
    import torch

    from nemotron4.model.transformer import Transformer

    llama = {"norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": True}
    nano = PRESETS["nano"]()
    for config in (nano, ModelConfig(**{**vars(nano), **llama})):
        with torch.device("meta"):
            model = Transformer(config)
        real = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert {tensor.name: tensor.shape for tensor in tensor_sizes(config)} == real


def test_an_unknown_name_is_answered_with_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-70b"]) == 1
    assert "hint: did you mean 'llama-" in capsys.readouterr().err


def test_planning_loads_no_torch() -> None:
    script = (
        "import sys; from nemotron4.cli.main import main; "
        "status = main(['plan', 'nemotron4-340b', '--json']); "
        "assert status == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_gpus"] == 16


def test_the_command_prints_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nemotron4-340b", "--gpu", "h100-80gb", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_gpus"], values["tensor_parallel"], values["pipeline_parallel"]) == (16, 8, 2)
    assert values["bytes_per_rank"]["weights"] == 2 * (
        nemotron4_340b().num_parameters // 16 + _replicated_norms() // 16
    )
    assert main(["plan", "nemotron4-340b", "--gpu", "h100-80gb"]) == 0
    text = capsys.readouterr().out
    assert "341,029,195,776" in text
    assert "8 GPUs" in text


def _replicated_norms() -> int:
    """Norm weights stand on all eight tensor ranks of a stage: seven copies more. The final norm is extra."""
    config = nemotron4_340b()
    final = 2 * config.hidden_size
    layers = 4 * config.hidden_size * config.num_layers
    return 7 * layers + 16 * final - final


def test_the_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    assert main(["plan", "nemotron4-15b", "--plot", str(path)]) == 0
    assert path.read_text().count("<svg") == 1


def test_the_15b_needs_one_gpu() -> None:
    assert make_plan(nemotron4_15b(), gpu_named("h100-80gb"), Workload()).layout == ParallelSizes(1, 1)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("llama-2-70b", 68.98),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-405b", 405.85),
        ("llama-3.2-3b", 3.21),
        ("mistral-7b", 7.25),
        ("mistral-small-24b", 23.57),
        ("mistral-large-123b", 122.61),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.71),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
    ],
)
def test_the_models_people_ask_for_have_their_published_size(model: str, billions: float) -> None:
    assert num_parameters(KNOWN_MODELS[model]) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp8", "int4", "nvfp4"])
def test_fewer_bits_need_fewer_gpus(dtype: str) -> None:
    plan = plan_for("b200-180gb", dtype=dtype)
    assert plan.layout.num_gpus <= {"fp8": 4, "int4": 2, "nvfp4": 2}[dtype]


def test_the_smallest_layout_is_named_even_when_one_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "nemotron4-15b", "--tensor-parallel", "8", "--pipeline-parallel", "2"]
    assert main([*asked, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_gpus"], values["smallest"]["num_gpus"]) == (16, 1)
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "smallest layout: 1 x h100-80gb" in text
    assert "layout asked for: 16 x h100-80gb" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpu-memory", "nan"], "gpu_memory is nan GB"),
        (["--gpu-memory", "inf"], "gpu_memory is inf GB"),
        (["--gpu-memory", "80", "--gpu-bandwidth", "nan"], "gpu_bandwidth nan TB/s"),
        (["--gpu-bandwidth", "4"], "gpu_bandwidth is of another GPU"),  # it was read and forgotten
    ],
)
def test_a_gpu_that_cannot_be_meant_is_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "nemotron4-15b", *given]) == 1
    assert message in capsys.readouterr().err


def test_any_gpu_can_be_given_by_memory_and_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "llama-3.1-70b", "--context", "8192", "--gpu-memory", "96"]
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_gpus"], values["rates"]) == (2, None)
    assert main([*command, "--gpu-bandwidth", "4", "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)["rates"]
    assert rates["decode_tokens_per_s"] > 0
    assert rates["prefill_tokens_per_s"] is None
    assert main(command) == 0
    assert "--gpu-bandwidth" in capsys.readouterr().out


def test_an_eight_bit_cache_takes_half_the_bytes() -> None:
    full, half = plan_for("h200-141gb"), plan_for("h200-141gb", kv_cache_dtype="fp8")
    assert full.chosen.stages[0].kv_cache == 2 * half.chosen.stages[0].kv_cache
