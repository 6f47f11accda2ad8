"""The library's kernels against their plain twins, on odd shapes, under every instruction set there is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from nemotron4.checkpoint import open_checkpoint
from nemotron4.engine import SamplingParams
from nemotron4.inference import sampling
from nemotron4.inference.native import build, library
from nemotron4.inference.native.library import Form
from nemotron4.inference.native.model import STORED, NativeCache, Weight, read_model
from nemotron4.inference.native.model import packed as pack_rows
from nemotron4.inference.scheduler import Sequence, Slice
from nemotron4.model.config import RopeScaling
from nemotron4.model.kv_cache import CachedAttend
from tests.checkpoint.gguf_files import write_gguf
from tests.inference import native_twin as twin
from tests.inference import small_engine as small_engine_module
from tests.inference.small_engine import (
    PATHS,
    SMALL,
    random_model,
    random_prompts,
    small_engine,
    small_runner,
)
from tests.tiny_models import llama_directory

LIBRARY = library.library()
BEST = library.instruction_set()
HERE = [isa for isa in library.INSTRUCTION_SETS if LIBRARY.native_isa(isa.encode()).decode() == isa]
with ThreadPoolExecutor() as pool:  # each compiles for seconds, where it is not in the cache
    list(pool.map(library.load_kernels, HERE))
NATIVE = [path for path in PATHS if not path.startswith("torch")]
SHAPES = [(1, 64, 16), (2, 32, 5), (3, 100, 33), (7, 576, 64), (8, 96, 17), (9, 40, 100), (16, 64, 48)]
SHAPES += [(17, 1536, 40), (24, 33, 31), (33, 160, 80), (64, 256, 96), (70, 96, 16), (300, 64, 32)]


def of_equal_bits(kind: Form) -> list[str]:
    """Only products with bfloat16 have an order of sums of their own under ``bf16``."""
    return [isa for isa in HERE if (kind, isa) != (Form.BF16, "bf16")]


def steps_of_equal_bits(path: str) -> list[str]:
    """Keys and values are in bfloat16 but where the path says otherwise."""
    return of_equal_bits(Form.F32 if path in ("float32", "int8-cache") else Form.BF16)


def packed(weight_RK: torch.Tensor, kind: Form) -> Weight:
    return pack_rows(weight_RK.contiguous().numpy(), kind)


def product(x_MK: torch.Tensor, weight: Weight, isa: str = BEST, *, is_wide: bool = False) -> torch.Tensor:
    weight.is_wide = is_wide
    out_MR = torch.empty(len(x_MK), weight.rows)
    x_MK = x_MK.contiguous()
    target = ctypes.byref(weight.as_c())
    assert LIBRARY.native_product(target, x_MK.data_ptr(), len(x_MK), isa.encode(), out_MR.data_ptr())
    return out_MR


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.exp(
        2 * torch.randn(shape[0], 1, generator=generator)
    )  # rows of very different size


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(("rows", "cols", "outputs"), SHAPES)
def test_int8_products_equal_their_twin_to_the_last_bit(
    isa: str, is_wide: bool, rows: int, cols: int, outputs: int
) -> None:
    x_MK, weight_RK = random(rows, cols), random(outputs, cols, seed=1)
    expected = twin.product(x_MK, *twin.quantised_weight(weight_RK, Form.S8), is_wide=is_wide)
    actual = product(x_MK, packed(weight_RK, Form.S8), isa, is_wide=is_wide)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", list(Form))
@pytest.mark.parametrize(("rows", "cols", "outputs"), SHAPES)
def test_every_instruction_set_gives_the_same_bits(kind: Form, rows: int, cols: int, outputs: int) -> None:
    weight = packed(random(outputs, cols, seed=1), kind)
    x_MK = random(rows, cols)
    for is_wide in (False, True):
        found = {isa: product(x_MK, weight, isa, is_wide=is_wide) for isa in of_equal_bits(kind)}
        for isa, out in found.items():
            assert torch.equal(out, found[HERE[0]]), isa


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("rows", "cols", "outputs"), [(3, 100, 33), (17, 64, 40), (33, 160, 80)])
def test_bfloat16_products_equal_their_twin_to_the_last_bit(
    isa: str, rows: int, cols: int, outputs: int
) -> None:
    x_MK, weight_RK = random(rows, cols), random(outputs, cols, seed=1)
    by_twin = twin.product_pairs if isa == "bf16" else twin.product_bf16
    assert torch.equal(product(x_MK, packed(weight_RK, Form.BF16), isa), by_twin(x_MK, weight_RK))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", list(Form))
def test_a_row_gives_the_same_bits_in_any_number_of_rows(isa: str, kind: Form) -> None:
    weight = packed(random(80, 192, seed=1), kind)
    x_MK = random(300, 192)
    together = product(x_MK, weight, isa)
    for count in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100):
        assert torch.equal(product(x_MK[11 : 11 + count], weight, isa), together[11 : 11 + count]), count


@pytest.mark.parametrize("kind", list(Form))
def test_products_are_near_those_of_the_unquantised_weight(kind: Form) -> None:
    x_MK, weight_RK = random(200, 256), random(64, 256, seed=1)
    expected = x_MK @ weight_RK.T
    off = product(x_MK, packed(weight_RK, kind)) - expected
    error = (off / (x_MK.norm(dim=1)[:, None] * weight_RK.norm(dim=1))).norm(dim=1).median() * 256**0.5 / 8
    assert error < {Form.F32: 1e-6, Form.BF16: 0.003, Form.S8: 0.012, Form.U4: 0.085}[kind]


@pytest.mark.parametrize("name", STORED)
def test_stored_gguf_blocks_are_multiplied_as_they_are(name: str) -> None:
    kind = GGMLQuantizationType[name]
    cols = 512
    if name == "Q4_K":  # the gguf package reads it but does not write it: any bytes with plain scales will do
        generator = np.random.default_rng(0)
        stored = generator.integers(0, 256, (48, cols // 256, 144), dtype=np.uint8)
        stored[..., :4] = np.array([0.01, 0.002], dtype=np.float16).view(np.uint8)
        stored = stored.reshape(48, -1)
    else:
        stored = quants.quantize(random(48, cols, seed=1).numpy(), kind)
    values = torch.from_numpy(quants.dequantize(stored, kind)).float()
    number, target = STORED[name]
    weight = Weight.empty(target, 48, cols)
    assert LIBRARY.native_pack_gguf(weight.as_c(), number, np.ascontiguousarray(stored).ctypes.data, 0, 48)
    x_MK = random(12, cols)
    expected = x_MK @ values.T
    bound = 1e-3 if name == "Q4_K" else 2e-4  # its products of scales are rounded to float16
    assert (product(x_MK, weight, is_wide=True) - expected).norm() < bound * expected.norm()


def test_four_bits_represent_a_four_bit_weight_exactly() -> None:
    """A weight that has sixteen values in each group loses nothing: the demo model is one."""
    codes = torch.randint(0, 16, (32, 4, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight_RK = (codes * 0.25 - 1.5).flatten(1)
    error = product(torch.eye(128), packed(weight_RK, Form.U4)).T - weight_RK
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("isa", [HERE[0], *(pytest.param(isa, marks=pytest.mark.slow) for isa in HERE[1:])])
def test_a_whole_step_gives_the_same_bits_under(isa: str, tmp_path: Path) -> None:
    """In a process of its own."""
    code = (
        "from tests.inference.test_native import NATIVE, scores; import torch, sys;"
        "torch.save({p: scores(p) for p in NATIVE}, sys.argv[1])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "found.pt")],
        env={**os.environ, "NEMOTRON4_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    for path, logits in found.items():
        if isa == BEST or {isa, BEST} <= {*steps_of_equal_bits(path)}:
            assert torch.equal(logits, scores(path)), path


def scores(path: str, length: int = 50, cut: int = 32) -> torch.Tensor:
    """Logits of the last position, computed in two parts."""
    runner = small_runner(random_model(), path, 8)  # type: ignore[arg-type]
    [prompt] = random_prompts(length)
    sequence = Sequence(tuple(prompt), blocks=[3, 1, 0, 6, 2])
    runner.run([Slice(sequence, 0, cut)])
    return torch.from_numpy(runner.run([Slice(sequence, cut, length)]).logits_RV)


def with_attention(
    attend: Callable[..., torch.Tensor], length: int, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Logits of the last position of a prompt in one step, in float32 but for the attention."""
    monkeypatch.setattr(CachedAttend, "__call__", lambda _, layer, q, k, v: attend(q, k, v))
    runner = small_runner(random_model(), "torch-float32", 8)
    planned = Slice(Sequence(tuple(random_prompts(length)[0]), blocks=[0, 1, 2, 3, 4]), 0, length)
    return torch.from_numpy(runner.run([planned]).logits_RV)


@pytest.mark.parametrize("length", [3, 32, 150])
def test_attention_over_codes_of_eight_bits_equals_its_twin(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, exact = scores("int8-cache", length, length - 2), scores("float32", length, length - 2)
    expected = with_attention(twin.attention_over_codes, length, monkeypatch)
    change = (expected - exact).norm()
    assert 0.003 < change / exact.norm() < 0.02
    assert (found - expected).norm() < 0.003 * change


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("length", [3, 32, 150])
def test_attention_over_bfloat16_equals_its_twin(
    isa: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under weights in float32, so that nothing else is rounded."""
    exact = scores("float32", length, length - 2)
    monkeypatch.setitem(small_engine_module._KINDS, "int8-cache", (Form.F32, Form.BF16))
    monkeypatch.setenv("NEMOTRON4_ISA", isa)
    found = scores("int8-cache", length, length - 2)
    expected = with_attention(twin.attention_over_pairs, length, monkeypatch)
    change = (expected - exact).norm()
    assert 0.0005 < change / exact.norm() < 0.02
    assert (found - expected).norm() < 0.05 * change


@pytest.mark.parametrize("path", ["float32", "bfloat16", "int8", "int8-cache"])
def test_rows_that_share_their_first_blocks_give_the_bits_that_they_give_alone(path: str) -> None:
    """Eight rows behind 96 shared positions, two of them behind 128, their own parts of different lengths."""
    runner = small_runner(random_model(), path, 40)  # type: ignore[arg-type]
    [prefix] = random_prompts(128)
    sequences = []
    for i in range(8):
        [own] = random_prompts(7 + 13 * i, seed=i)
        num_shared = 4 if i in (2, 5) else 3
        blocks = list(range(num_shared)) + [4 + 4 * i + j for j in range(4)]
        sequences.append(Sequence(tuple(prefix[: 32 * num_shared] + own), blocks=blocks))
    for sequence in (sequences[2], *sequences):
        runner.run([Slice(sequence, 0, sequence.length - 1)])
    last = [Slice(sequence, sequence.length - 1, sequence.length) for sequence in sequences]
    together = runner.run(last).logits_RV
    for row, planned in zip(together, last, strict=True):
        assert (runner.run([planned]).logits_RV[0] == row).all()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    [prompt] = random_prompts(64)
    sequence = Sequence(tuple(prompt), blocks=[0, 1])
    runner = small_runner(random_model(), "int8", 4, num_threads=num_threads)
    expected = small_runner(random_model(), "int8", 4, num_threads=1)
    whole = [Slice(sequence, 0, 64)]
    for _ in range(30):  # the threads may divide the work differently each time
        assert (runner.run(whole).logits_RV == expected.run(whole).logits_RV).all()


def test_without_a_compiler_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.library_path(build.STEP)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_ISA", "avx9")
    with pytest.raises(Exception, match="NEMOTRON4_ISA"):
        library.wanted_isa()


def test_greedy_tokens_of_float32_equal_those_of_the_plain_model() -> None:
    prompts = random_prompts(1, 40, 7, 97)
    with small_engine(path="float32") as engine, small_engine(path="torch-float32") as plain:
        texts = [
            [g.token_ids for g in e.generate(prompts, max_new_tokens=40, temperature=0)]
            for e in (engine, plain)
        ]
    assert texts[0] == texts[1]


def test_yarn_is_computed_as_in_the_plain_model() -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context_length=64, attention_factor=1.3)
    model, prompts = random_model(replace(SMALL, rope_scaling=scaling)), random_prompts(90)
    with small_engine(model, path="float32") as engine, small_engine(model, path="torch-float32") as plain:
        scores = [e.score(token_ids=prompts)[0] for e in (engine, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 0.999999},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [5, 101, 32000])
def test_draws_are_those_of_the_twin(settings: dict[str, float], size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for spread in (0.1, 3.0, 8.0):
        params = SamplingParams(temperature=0.7, **settings)  # type: ignore[arg-type]
        logits = torch.randn(size, generator=generator) * spread
        logits[::7] = -torch.inf
        for point in (0.0, 0.1, 0.33, 0.5, 0.77, 0.9, 0.97):
            expected = sampling.draw_at(logits.numpy(), params, point)
            [actual] = sampling.draw_rows([(logits.numpy(), params, point)])
            same_value = float(logits[actual]) == pytest.approx(float(logits[expected]), abs=0.01)
            assert actual == expected or same_value, (spread, point)


def pretended_compiler(folder: Path) -> dict[str, str]:
    """The environment for one that takes its time and notes each call."""
    compiler = folder / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor last; do :; done\necho x >> "$CALLS"\nsleep 0.05\n'
        'echo > "$last"\n'
    )
    compiler.chmod(0o755)
    more = {"CXX": str(compiler), "CALLS": str(folder / "calls"), "XDG_CACHE_HOME": str(folder)}
    return {**os.environ, **more}


def test_what_is_compiled_is_said_once_also_when_it_is_the_kernels_alone(tmp_path: Path) -> None:
    program = (
        "from nemotron4.inference.native.build import STEP, library_path, platform_sets; import sys;"
        "[library_path(part) for part in (STEP, *platform_sets())[int(sys.argv[1]):int(sys.argv[2])]]"
    )
    environment = pretended_compiler(tmp_path)
    for first, end, times in ((0, 1, 1), (1, 2, 1), (0, 2, 0)):
        command = [sys.executable, "-c", program, str(first), str(end)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ended.stderr.count("compiling the CPU kernels") == times


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    program = "from nemotron4.inference.native.build import STEP, library_path; print(library_path(STEP))"
    environment = pretended_compiler(tmp_path)
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in started}
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    num_links = 1
    assert len((tmp_path / "calls").read_text().split()) == len(build.PLAIN) + num_links


def test_what_a_killed_compilation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    program = "from nemotron4.inference.native.build import STEP, library_path; print(library_path(STEP))"
    environment = pretended_compiler(tmp_path)
    compiler = Path(environment["CXX"])
    quick = compiler.read_text()
    compiler.write_text(quick.replace("sleep 0.05", "exec sleep 60"))
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as killed:
        while not (tmp_path / "calls").exists():
            time.sleep(0.01)
        killed.kill()
    cache = tmp_path / "nemotron4" / "native"
    assert [path for path in cache.iterdir() if path.is_dir()]
    compiler.write_text(quick)
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", [None, Form.S8, Form.U4])
def test_what_enters_quantised_attention_and_the_output_layer_is_wide(
    kind: Form | None, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
    source = llama_directory(tmp_path / "source", num_hidden_layers=5, **shape)
    checkpoint = open_checkpoint(write_gguf(source, tmp_path / "m.gguf", GGMLQuantizationType.Q8_0))
    cache = NativeCache(checkpoint.config, 2, Form.BF16)
    weights = read_model(checkpoint, kind, cache, num_threads=1).weights
    narrow = {name for name, weight in weights.items() if not weight.is_wide}
    assert narrow == {f"model.layers.{i}.mlp.{part}" for i in (3, 4) for part in ("up.0", "down_proj")}
    plain = read_model(checkpoint, Form.BF16, cache, num_threads=1).weights
    assert not any(weight.is_wide for weight in plain.values())
