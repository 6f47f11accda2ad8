"""Conversions keep values, logits and tokens; what they leave behind is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron4.checkpoint.convert import ConvertOptions, convert, verify
from nemotron4.checkpoint.convert_files import JOURNAL, MANIFEST, Blocks, OutputFile, write_files
from nemotron4.checkpoint.load import load_transformer, load_weights
from nemotron4.checkpoint.nemo import open_nemo
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.checkpoint.write_huggingface import huggingface_files
from nemotron4.cli.main import main
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import RopeScaling
from nemotron4.model.transformer import Transformer
from nemotron4.text.prompt import chatml, nemotron4
from tests.checkpoint import nemo_layouts as layouts
from tests.tiny_models import llama_directory, sentencepiece_model

CONFIG = layouts.tiny_config()
WEIGHTS = layouts.hugging_face_weights(CONFIG)
CARD_PROMPT = "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA\n<extra_id_1>Assistant\n"


def release(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    made = layouts.tiny_config(**config)
    weights = layouts.hugging_face_weights(made, dtype)
    return layouts.write_release(folder, made, weights, tensor_parallel=4)


def converted(source: Path, destination: Path, **options: Any) -> Path:
    convert(open_checkpoint(source), destination, ConvertOptions(**options))
    return destination


def logits_of(path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model = Transformer(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) * 7 % checkpoint.config.vocab_size)


@pytest.mark.parametrize("to", ["hf", "nemo", "gguf"])
def test_every_form_gives_the_logits_of_the_source(tmp_path: Path, to: Any) -> None:
    source = release(tmp_path / "m", hidden_size=128)
    assert torch.equal(logits_of(source), logits_of(converted(source, tmp_path / to, to=to)))


@pytest.mark.parametrize("scaling", [None, 2.0])
def test_transformers_loads_the_output_with_equal_logits(tmp_path: Path, scaling: float | None) -> None:
    kind = None if scaling is None else RopeScaling(kind="linear", factor=scaling)
    config = layouts.tiny_config(rope_scaling=kind)
    weights = layouts.hugging_face_weights(config, torch.float32)
    changes = {"seq_len_interpolation_factor": scaling}
    source = layouts.write_release(tmp_path / "m", config, weights, changes=changes)
    destination = converted(source, tmp_path / "hf", to="hf")
    peer = AutoModelForCausalLM.from_pretrained(destination, dtype=torch.float32)
    tokens_BT = torch.arange(24).view(2, 12) * 7 % CONFIG.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(logits_of(source), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)
    assert peer.generation_config.eos_token_id == [3, 5]


def test_the_tokenizer_of_the_output_gives_sentencepiece_ids_and_the_card_s_prompt(tmp_path: Path) -> None:
    destination = converted(release(tmp_path / "m"), tmp_path / "hf", to="hf")
    tokenizer = AutoTokenizer.from_pretrained(destination)
    turns = [{"role": "user", "content": "Write a poem on NVIDIA"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == CARD_PROMPT
    own = open_nemo(tmp_path / "m").tokenizer()
    for probe in (CARD_PROMPT, " two  spaces ", "1234", "naïve\tcafé\n日本", "plain <extra_id_1>x"):
        assert tokenizer(probe).input_ids == own.encode(probe)
        assert tokenizer.decode(own.encode(probe)) == probe


def test_the_output_s_own_tokenizer_knows_the_markers(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    own = open_checkpoint(source).tokenizer()
    found = open_checkpoint(converted(source, tmp_path / "hf", to="hf")).tokenizer()
    assert found.markers == own.markers
    for parse_special in (True, False):
        text = "<extra_id_1>User said <extra_id_2>"
        assert found.encode(text, parse_special=parse_special) == own.encode(
            text, parse_special=parse_special
        )


def test_nemo_to_hf_to_nemo_is_bit_equal(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    back = converted(
        converted(source, tmp_path / "hf", to="hf"), tmp_path / "back", to="nemo", tensor_parallel=4
    )
    for path in sorted((source / "model_weights").glob("model.*/[0-9]*")):
        if "_extra_state" not in str(path):
            assert (back / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    assert open_checkpoint(back).config == open_checkpoint(source).config


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_nemo_output_reads_back_for_every_split(tmp_path: Path, tensor_parallel: int) -> None:
    source = release(tmp_path / "m")
    back = converted(source, tmp_path / "back", to="nemo", tensor_parallel=tensor_parallel)
    checkpoint = open_checkpoint(back)
    for name, expected in WEIGHTS.items():
        assert torch.equal(checkpoint.read(name), expected)


def test_a_split_that_cuts_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"num_kv_heads \(4\) is not divisible"):
        converted(release(tmp_path / "m"), tmp_path / "back", to="nemo", tensor_parallel=8)


def test_reward_head_survives_every_step(tmp_path: Path) -> None:
    source = release(tmp_path / "m", num_reward_attributes=9)
    hf = converted(source, tmp_path / "hf", to="hf")
    back = open_checkpoint(converted(hf, tmp_path / "back", to="nemo"))
    for checkpoint in (open_checkpoint(hf), back):
        assert checkpoint.config.num_reward_attributes == 9
        for name in ("reward_head.weight", "reward_head.bias"):
            assert torch.equal(checkpoint.read(name), open_checkpoint(source).read(name))


def test_gguf_holds_what_the_gguf_reader_expects(tmp_path: Path) -> None:
    weights = layouts.hugging_face_weights(layouts.tiny_config(hidden_size=128))
    destination = converted(release(tmp_path / "m", hidden_size=128), tmp_path / "g", to="gguf")
    reader = gguf.GGUFReader(destination / "model.gguf")
    field = {name: value.contents() for name, value in reader.fields.items()}
    assert field["general.architecture"] == "nemotron"
    assert field["nemotron.attention.head_count_kv"] == CONFIG.num_kv_heads
    assert field["nemotron.rope.dimension_count"] == CONFIG.rotary_dim
    assert field["nemotron.attention.key_length"] == CONFIG.head_dim
    assert field["tokenizer.ggml.eos_token_id"] == 3
    assert field["tokenizer.ggml.eot_token_id"] == 5
    assert field["tokenizer.ggml.add_bos_token"] is False
    assert len(field["tokenizer.ggml.tokens"]) == CONFIG.vocab_size
    assert len(reader.tensors) == 10 * CONFIG.num_layers + 4
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gamma = weights["model.layers.1.input_layernorm.weight"].float().numpy() + 1
    assert np.array_equal(tensors["blk.1.attn_norm.weight"].data, gamma)
    stored = tensors["blk.1.ffn_up.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.BF16
    expected = weights["model.layers.1.mlp.up_proj.weight"].view(torch.uint8).numpy()
    assert np.array_equal(stored.data.reshape(expected.shape), expected)


def gguf_parts(folder: Path, source: Path, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    from nemotron4.checkpoint.write_gguf import gguf_files

    files = gguf_files(
        open_nemo(source), dtype=dtype, sentencepiece_model=sentencepiece_model(), split_bytes=100_000
    )
    write_files(folder, files, {})
    assert len(files) > 2
    return [folder / file.name for file in files]


def test_gguf_parts_together_hold_every_tensor(tmp_path: Path) -> None:
    files = gguf_parts(tmp_path / "g", release(tmp_path / "m", hidden_size=128))
    readers = [gguf.GGUFReader(file) for file in files]
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    assert len(names) == len(set(names)) == 10 * CONFIG.num_layers + 4
    assert [reader.fields["split.no"].contents() for reader in readers] == list(range(len(files)))


def test_gguf_parts_are_read_by_any_of_their_names(tmp_path: Path) -> None:
    source = release(tmp_path / "m", hidden_size=128)
    files = gguf_parts(tmp_path / "g", source)
    expected = open_checkpoint(converted(source, tmp_path / "one", to="gguf"))
    for given in (files[0], files[1], tmp_path / "g"):
        opened = open_checkpoint(given)
        assert (opened.path, opened.config) == (files[0], expected.config)
        assert opened.tensors.keys() == expected.tensors.keys()
        assert {info.file for info in opened.tensors.values()} == set(files)
        for name in opened.tensors:
            assert torch.equal(opened.read(name), expected.read(name)), name


def test_gguf_parts_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    files = gguf_parts(tmp_path / "g", release(tmp_path / "m", hidden_size=128))
    count = len(files)
    parts = f"{count - 1} of {count} parts are there"
    files[1].rename(tmp_path / "away.gguf")
    for given in (files[0], tmp_path / "g"):
        with pytest.raises(CheckpointError, match=f"{files[1].name} is missing; {parts}"):
            open_checkpoint(given)
    with pytest.raises(CheckpointError, match=f"away.gguf: one of {count} parts of a model, which its name"):
        open_checkpoint(tmp_path / "away.gguf")
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(
        CheckpointError, match=r"split\.no and split\.count are 2 and .*; its name asks for 1"
    ):
        open_checkpoint(files[0])


def test_gguf_of_a_model_that_llama_cpp_cannot_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="8 heads of 16 are not the hidden size 48"):
        converted(release(tmp_path / "m"), tmp_path / "g", to="gguf")


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_dtype_is_converted_by_value(tmp_path: Path, dtype: Any, expected: torch.dtype) -> None:
    destination = converted(release(tmp_path / "m"), tmp_path / "hf", to="hf", dtype=dtype)
    checkpoint = open_checkpoint(destination)
    for name, value in WEIGHTS.items():
        assert torch.equal(checkpoint.read(name), value.to(expected))


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_eight_bit_weights_state_their_true_error(tmp_path: Path, scheme: Any, bound: float) -> None:
    source = release(tmp_path / "m")
    finished = convert(open_checkpoint(source), tmp_path / "q", ConvertOptions(to="hf", quantize=scheme))
    facts = {name: value for row in finished for name, value in row.facts.items()}
    stored = load_file(tmp_path / "q" / "model.safetensors")
    opened = open_checkpoint(tmp_path / "q")
    assert opened.tensors.keys() == WEIGHTS.keys()
    linear = [name for name in WEIGHTS if name.endswith("_proj.weight")]
    assert set(facts) == set(linear)
    for name in linear:
        assert stored[name].dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[scheme]
        weight = WEIGHTS[name].float()
        restored = stored[name].float() * stored[f"{name}_scale"].float()
        assert torch.equal(opened.read(name), restored)
        error = float((restored - weight).norm() / weight.norm())
        assert facts[name]["relative_error"] == pytest.approx(error, rel=1e-3)
        assert error < bound
    assert torch.equal(stored["lm_head.weight"], WEIGHTS["lm_head.weight"])
    again = open_checkpoint(converted(tmp_path / "q", tmp_path / "expanded", to="hf", dtype="fp32"))
    assert torch.equal(again.read(linear[0]), opened.read(linear[0]))
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.1), ("fp8", 0.3)])
def test_transformers_reads_eight_bit_weights_as_compressed_tensors(
    tmp_path: Path, scheme: Any, bound: float
) -> None:
    pytest.importorskip("compressed_tensors")
    source = release(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(converted(source, tmp_path / "p", to="hf", dtype="fp32"))
    peer = AutoModelForCausalLM.from_pretrained(converted(source, tmp_path / "q", to="hf", quantize=scheme))
    stored = peer.model.layers[0].self_attn.q_proj.weight.dtype
    assert stored == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[scheme]
    tokens_BT = torch.arange(24).view(2, 12) * 7 % CONFIG.vocab_size
    with torch.no_grad():
        expected, found = plain(tokens_BT).logits, peer(tokens_BT).logits.float()
    assert float((found - expected).norm() / expected.norm()) < bound


LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 128
parameters.n_parallel = 1
parameters.cpuparams.n_threads = 1
parameters.warmup = False
server = xllamacpp.Server(parameters)
body = {"prompt": json.loads(sys.argv[2]), "n_predict": 24, "temperature": 0, "return_tokens": True}
request = urllib.request.Request(
    server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
answer = json.load(urllib.request.urlopen(request))
print(json.dumps(answer["tokens"]))
"""


def llama_cpp_tokens(file: Path, prompt: list[int]) -> list[int]:
    """With ``xllamacpp`` (llama.cpp in a wheel) in an environment of its own, whose python
    NEMOTRON4_LLAMA_CPP names."""
    peer = os.environ.get("NEMOTRON4_LLAMA_CPP")
    if not peer:
        pytest.skip("NEMOTRON4_LLAMA_CPP names no python that has xllamacpp")
    command = [peer, "-c", LLAMA_CPP, str(file), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_split", [False, True])
def test_llama_cpp_gives_the_same_greedy_tokens(tmp_path: Path, is_split: bool) -> None:
    source = release(tmp_path / "m", dtype=torch.float32, context_length=128, hidden_size=128)
    if is_split:
        file = gguf_parts(tmp_path / "g", source, torch.float32)[0]
    else:
        file = converted(source, tmp_path / "g", to="gguf") / "model.gguf"
    checkpoint = open_checkpoint(source)
    prompt = checkpoint.tokenizer().encode(CARD_PROMPT)
    found = llama_cpp_tokens(file, prompt)
    model = Transformer(checkpoint.config)
    load_weights(model, checkpoint, dtype=torch.float32)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["q8_0", "q6_k", "q4_k_m", "q4_0"])
def test_llama_cpp_loads_every_written_type_and_takes_the_tokens_that_we_read(
    tmp_path: Path, demo_model: Path, scheme: Any
) -> None:
    """llama.cpp rounds activations to eight bits: a token may be another where two are nearly as likely."""
    source = open_checkpoint(demo_model)
    prompt = source.tokenizer().encode("The difference between a cat and a dog is")
    convert(source, tmp_path / "q", ConvertOptions(to="gguf", quantize=scheme))
    found = llama_cpp_tokens(tmp_path / "q" / "model.gguf", prompt)
    model, _ = load_transformer(open_checkpoint(tmp_path / "q"), dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + found]))[0, len(prompt) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(found)[:, None])[:, 0]
    behind_T = logits_TV.amax(dim=1) - chosen_T
    assert len(found) == 24
    assert float((behind_T == 0).float().mean()) > 0.8
    assert float(behind_T.max()) < 0.5


def test_a_row_of_zeros_stays_zero() -> None:
    from nemotron4.checkpoint.write_quantized import quantize_rows

    for scheme in ("int8", "fp8"):
        quantized = quantize_rows(torch.zeros(2, 4), scheme, scale_dtype=torch.bfloat16)
        assert torch.equal(quantized.restored_RC, torch.zeros(2, 4))


def randomise(model: torch.nn.Module, *names: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")  # what it tests
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("kind", ["lora", "ia3", "embed_tokens", "lm_head"])
def test_adapters_merge_as_peft_does(tmp_path: Path, kind: str) -> None:
    import peft

    # (IA)3 scales the biases of attention too, which Nemotron models do not have. The Llama's embeddings are
    # tied: of the module that PEFT saves whole it makes a copy, and the other one keeps the base's weight.
    base = (
        converted(release(tmp_path / "m", dtype=torch.float32), tmp_path / "hf", to="hf")
        if kind == "lora"
        else llama_directory(tmp_path / "llama", attention_bias=True)
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = (
        peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
        if kind == "ia3"
        else peft.LoraConfig(
            r=4, lora_alpha=10, target_modules=targets, modules_to_save=None if kind == "lora" else [kind]
        )
    )
    randomise(model, "attn.q_proj.bias")
    model.save_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    randomise(adapted, "lora_B", "ia3_l", "modules_to_save")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = converted(base, tmp_path / "merged", to="hf", adapter=tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    checkpoint = open_checkpoint(merged)
    assert checkpoint.config.tie_embeddings == (kind == "ia3")
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), expected[name], atol=1e-6, rtol=1e-6)


def query_adapter(folder: Path, layer: int, *, width: int = 48) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, width), f"{prefix}.lora_B.weight": torch.ones(128, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_merged_adapter_brings_the_format_it_was_trained_in(
    tmp_path: Path, to: Literal["hf", "gguf"]
) -> None:
    base = converted(release(tmp_path / "m", hidden_size=128), tmp_path / "base", to=to)
    opened = open_checkpoint(base)
    assert opened.prompt_format() == nemotron4()
    adapter = query_adapter(tmp_path / "a", 0, width=128)
    same = converted(base, tmp_path / "same", to=to, adapter=adapter)
    assert open_checkpoint(same).prompt_format() == nemotron4()
    (adapter / "chat_template.jinja").write_text(chatml().template)
    merged = converted(base, tmp_path / "merged", to=to, adapter=adapter)
    assert open_checkpoint(merged).prompt_format() == chatml()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    query_adapter(tmp_path / "a", 9)
    with pytest.raises(CheckpointError, match=r"layers\.9\.self_attn\.q_proj.*of no weight of"):
        converted(release(tmp_path / "m"), tmp_path / "hf", to="hf", adapter=tmp_path / "a")


def test_a_llama_directory_converts_too(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "llama")
    destination = converted(source, tmp_path / "hf", to="hf", dtype="fp32")
    assert torch.equal(logits_of(source), logits_of(destination))
    peer = AutoModelForCausalLM.from_pretrained(destination)
    tokens_BT = torch.arange(24).view(2, 12)
    own = AutoModelForCausalLM.from_pretrained(source)(tokens_BT).logits
    torch.testing.assert_close(peer(tokens_BT).logits, own)


@pytest.mark.parametrize("to", ["nemo", "gguf"])
def test_a_llama_model_has_no_nemotron_form(tmp_path: Path, to: Any) -> None:
    with pytest.raises(CheckpointError):
        converted(llama_directory(tmp_path / "llama"), tmp_path / "out", to=to)


def test_shards_and_index_hold_every_tensor_once(tmp_path: Path) -> None:
    checkpoint = open_nemo(release(tmp_path / "m"))
    files = huggingface_files(
        checkpoint, dtype=torch.bfloat16, sentencepiece_model=sentencepiece_model(), shard_bytes=60_000
    )
    write_files(tmp_path / "hf", files, {})
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    loaded = open_checkpoint(tmp_path / "hf")
    for name, value in WEIGHTS.items():
        assert torch.equal(loaded.read(name), value)


def test_the_same_command_after_the_end_changes_nothing(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    destination = converted(source, tmp_path / "hf", to="hf")
    before = {path: path.stat().st_mtime_ns for path in destination.iterdir()}
    converted(source, destination, to="hf")
    assert {path: path.stat().st_mtime_ns for path in destination.iterdir()} == before
    with pytest.raises(CheckpointError, match="another conversion"):
        converted(source, destination, to="hf", dtype="fp32")


def test_a_model_that_trained_on_is_another_conversion(tmp_path: Path) -> None:
    """The same name, shapes and types: a second run told of files that held the weights before."""
    source = llama_directory(tmp_path / "m")
    converted(source, tmp_path / "hf", to="hf")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1.01}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="another conversion"):
        converted(source, tmp_path / "hf", to="hf")


MEMORY = """
import sys
from pathlib import Path
from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.opening import open_checkpoint
options = ConvertOptions(to=sys.argv[3], quantize=sys.argv[4] or None)
convert(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), options)
# Not getrusage: its maximum is inherited from the process that started this one.
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("to", "quantize"), [("hf", ""), ("hf", "int8"), ("nemo", ""), ("gguf", "")])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, to: str, quantize: str) -> None:
    """At most 1.5 times the largest output tensor and 300 MB; the model is far larger than that tensor."""
    shape = {"hidden_size": 4096, "ffn_hidden_size": 16384, "num_heads": 32, "num_kv_heads": 8}
    source = release(tmp_path / "m", num_layers=4, head_dim=128, **shape)
    largest = 4096 * 16384 * (1 if quantize else 2)
    assert sum(path.stat().st_size for path in source.rglob("*")) > 8 * largest
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out"), to, quantize],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.5 * largest + 300e6


def test_the_manifest_has_the_hash_of_every_file(tmp_path: Path) -> None:
    destination = converted(release(tmp_path / "m"), tmp_path / "hf", to="hf")
    rows = json.loads((destination / MANIFEST).read_text())["files"]
    assert {row["name"] for row in rows} | {MANIFEST} == {path.name for path in destination.iterdir()}
    for row in rows:
        assert hashlib.sha256((destination / row["name"]).read_bytes()).hexdigest() == row["sha256"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from nemotron4.checkpoint.convert_files import OutputFile, write_files
from nemotron4.checkpoint.nemo import open_nemo
from nemotron4.checkpoint.write_huggingface import huggingface_files

def dies():
    yield bytes(100)
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint = open_nemo(Path(sys.argv[1]))
_, model = checkpoint.tokenizer_file()
files = huggingface_files(checkpoint, dtype=torch.bfloat16, sentencepiece_model=model, shard_bytes=60_000)
files[3] = OutputFile(files[3].name, files[3].size, dies)
write_files(Path(sys.argv[2]), files, {"kind": "test"})
"""


def planned(source: Path) -> list[OutputFile]:
    return huggingface_files(
        open_nemo(source),
        dtype=torch.bfloat16,
        sentencepiece_model=sentencepiece_model(),
        shard_bytes=60_000,
    )


def test_a_killed_conversion_leaves_only_whole_files_and_goes_on(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    destination = tmp_path / "hf"
    script = [sys.executable, "-c", KILLED, str(source), str(destination)]
    killed = subprocess.run(script, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (destination / MANIFEST).exists()
    assert not (destination / "config.json").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(destination)
    whole = {path.name: path.stat().st_mtime_ns for path in destination.glob("model-*.safetensors")}
    assert len(whole) == 3
    fresh = tmp_path / "fresh"
    write_files(fresh, planned(source), {"kind": "test"})
    write_files(destination, planned(source), {"kind": "test"})
    for name, mtime in whole.items():
        assert (destination / name).stat().st_mtime_ns == mtime
    for path in fresh.iterdir():
        assert (destination / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in destination.iterdir()} == {path.name for path in fresh.iterdir()}


def test_a_failing_source_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    checkpoint = open_checkpoint(source)
    chunk = source / "model_weights/model.embedding.word_embeddings.weight/1.0"
    chunk.unlink()
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight/1\.0"):
        convert(checkpoint, tmp_path / "hf", ConvertOptions(to="hf"))
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {JOURNAL}


def test_a_full_disk_is_explained_and_can_be_repeated(tmp_path: Path) -> None:
    def blocks() -> Any:
        yield b"12345"
        raise OSError(28, "No space left on device")

    files = [OutputFile("a", 3, lambda: iter_once(b"abc")), OutputFile("b", 10, blocks)]
    with pytest.raises(CheckpointError, match=r"b: the disk is full"):
        write_files(tmp_path / "out", files, {})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", JOURNAL}
    files[1] = OutputFile("b", 10, lambda: iter_once(b"0123456789"))
    write_files(tmp_path / "out", files, {})
    assert (tmp_path / "out" / "b").read_bytes() == b"0123456789"


def test_a_file_that_the_system_refuses_to_grow_leaves_nothing_that_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama_directory(tmp_path / "m")
    command = ["convert", str(source), str(tmp_path / "out"), "--to", "hf"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "model.safetensors: cannot be written: File too large" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL}
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(tmp_path / "out")
    assert main(command) == 0
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config


def iter_once(data: bytes) -> Any:
    yield data
    return None


def test_more_bytes_than_the_disk_has_are_refused_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more bytes, the disk has"):
        write_files(tmp_path / "out", [OutputFile("a", 10**18, lambda: iter_once(b""))], {})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="holds other files"):
        converted(release(tmp_path / "m"), tmp_path / "out", to="hf")


def test_verify_finds_a_flipped_byte_and_a_changed_source(tmp_path: Path) -> None:
    source = release(tmp_path / "m")
    destination = converted(source, tmp_path / "hf", to="hf")
    options = ConvertOptions(to="hf")
    assert verify(open_checkpoint(source), destination, options) > 0
    chunk = source / "model_weights/model.output_layer.weight/0.0"
    original = chunk.read_bytes()
    chunk.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="the source gives other bytes"):
        verify(open_checkpoint(source), destination, options)
    chunk.write_bytes(original)
    shard = destination / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="sha256 is"):
        verify(open_checkpoint(source), destination, options)


OLD = Path(__file__).parents[1] / "golden" / "runs" / "convert"


def test_a_journal_of_an_earlier_version_is_continued_and_another_conversion_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(OLD, folder)
    written = []

    def block(name: str, data: bytes) -> OutputFile:
        def blocks() -> Blocks:
            written.append(name)
            yield data
            return None

        return OutputFile(name, len(data), blocks)

    files = [block("a.bin", b"first"), block("config.json", b"x" * 13), block("c.bin", b"end")]
    with pytest.raises(ConfigError, match="is of another run: tensor_parallel was 1, is 2"):
        write_files(folder, files, {"to": "hf", "tensor_parallel": 2})
    finished = write_files(folder, files, {"to": "hf", "tensor_parallel": 1}, is_shown=True)
    assert written == ["c.bin"]
    assert [row.size for row in finished] == [5, 13, 3]
    assert (folder / "a.bin").read_bytes() == b"first"
    assert not (folder / JOURNAL).exists()


def test_the_command_reports_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = release(tmp_path / "m")
    arguments = ["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "--verify", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == result["verified_bytes"]
    assert result["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "hf").iterdir() if path.name != MANIFEST
    )
