"""Speed and memory of ``nemotron4 convert`` against ``cp -r`` of the same bytes on the same disk.

    python benchmarks/conversion.py --gigabytes 8 --folder /some/disk --to hf

Makes a synthetic NeMo release there (bfloat16, 8 tensor parallel ranks), then times ``cp -r`` + ``sync`` and
the conversion in turn, each in a process of its own, removes everything, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from nemotron4.checkpoint.nemo_config import SPLIT_DIM, nemo_parts
from nemotron4.model.config import ModelConfig
from nemotron4.text.sentencepiece_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, build_bpe

TENSOR_PARALLEL = 8
VOCAB_SIZE = 64000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--to", choices=("hf", "nemo", "gguf"), default="hf")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=arguments.folder) as name:
        folder = Path(name)
        config = config_of(arguments.gigabytes * 1e9)
        num_bytes = write_release(folder / "source", config)
        copies, conversions = [], []
        for _ in range(arguments.rounds):
            copies.append(timed(["cp", "-r", str(folder / "source"), str(folder / "out")]))
            shutil.rmtree(folder / "out")
            command = [sys.executable, "-m", "nemotron4", "convert", str(folder / "source")]
            conversions.append(timed([*command, str(folder / "out"), "--to", arguments.to]))
            shutil.rmtree(folder / "out")
    largest = config.hidden_size * max(config.vocab_size, config.ffn_hidden_size) * 2
    print(
        json.dumps(
            {
                "source_bytes": num_bytes,
                "to": arguments.to,
                "copy_s": [round(run.seconds, 2) for run in copies],
                "convert_s": [round(run.seconds, 2) for run in conversions],
                "copy_cpu_s": [round(run.cpu_seconds, 2) for run in copies],
                "convert_cpu_s": [round(run.cpu_seconds, 2) for run in conversions],
                "convert_over_copy_speed": [
                    round(copy.seconds / run.seconds, 3)
                    for copy, run in zip(copies, conversions, strict=True)
                ],
                "load_average": [round(value, 1) for value in os.getloadavg()],
                "peak_rss_bytes": max(run.peak_bytes for run in conversions),
                "bound_bytes": int(1.5 * largest + 300e6),
                "largest_tensor_bytes": largest,
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
            }
        )
    )


def config_of(num_bytes: float) -> ModelConfig:
    """A Nemotron-4 shape of about that many bytes in bfloat16."""
    shape = {
        "hidden_size": 4096,
        "ffn_hidden_size": 16384,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
    }
    one = ModelConfig(num_layers=1, vocab_size=VOCAB_SIZE, **shape)
    two = ModelConfig(num_layers=2, vocab_size=VOCAB_SIZE, **shape)
    per_layer = 2 * (two.num_parameters - one.num_parameters)
    layers = max(1, round((num_bytes - 2 * one.num_parameters) / per_layer) + 1)
    return ModelConfig(num_layers=layers, vocab_size=VOCAB_SIZE, **shape)


def write_release(folder: Path, config: ModelConfig) -> int:
    """Zarr chunks of random bytes that are plausible bfloat16 values; returns the bytes of the weights."""
    total = 0
    words = np.random.default_rng(0).integers(0x3C00, 0x3D00, 32 * 1024**2, dtype=np.uint16)
    noise = memoryview(words.tobytes())
    for key, entries in nemo_parts(config).items():
        is_stacked = entries[0][0].name.startswith("model.layers.")
        rows = sum(part.stop - part.start for part in entries[0])
        columns = _columns(config, key)
        shape = [rows, columns] if columns else [rows]
        split = SPLIT_DIM.get(key)
        chunk = [n // TENSOR_PARALLEL if dim == split else n for dim, n in enumerate(shape)]
        place = folder / "model_weights" / f"model.{key}"
        place.mkdir(parents=True)
        size = 2 * int(np.prod(chunk))
        for layer in range(len(entries)):
            for rank in range(TENSOR_PARALLEL if split is not None else 1):
                position = [rank if dim == split else 0 for dim in range(len(shape))]
                name = ".".join(map(str, ([layer] if is_stacked else []) + position))
                with (place / name).open("wb") as file:
                    for start in range(0, size, len(noise)):
                        file.write(noise[: min(len(noise), size - start)])
                total += size
        array = {
            "chunks": ([1] if is_stacked else []) + chunk,
            "shape": ([len(entries)] if is_stacked else []) + shape,
            "dtype": "bfloat16",
            "compressor": None,
            "filters": None,
            "fill_value": None,
            "order": "C",
            "zarr_format": 2,
        }
        (place / ".zarray").write_text(json.dumps(array))
    (folder / "tokenizer.model").write_bytes(_tokenizer(config.vocab_size))
    import torch

    from nemotron4.checkpoint.write_nemo import nemo_settings

    settings = nemo_settings(config, tokenizer="tokenizer.model", dtype=torch.bfloat16)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    return total


def _columns(config: ModelConfig, key: str) -> int:
    if key.endswith(
        ("layer_norm_weight", "layer_norm_bias", "final_layernorm.weight", "final_layernorm.bias")
    ):
        return 0
    widths = {"linear_proj": config.num_heads * config.head_dim, "linear_fc2": config.ffn_hidden_size}
    return next((width for part, width in widths.items() if f"{part}.weight" in key), config.hidden_size)


def _tokenizer(size: int) -> bytes:
    pieces = [Piece("<pad>", 0, CONTROL), Piece("<unk>", 0, UNKNOWN), Piece("<s>", 0, CONTROL)]
    pieces += [Piece("</s>", 0, CONTROL)]
    pieces += [Piece(f"<0x{i:02X}>", 0, BYTE) for i in range(256)]
    pieces += [Piece(f"▁w{i}", -float(i), NORMAL) for i in range(size - len(pieces))]
    return build_bpe(pieces, add_dummy_prefix=True)


class Timing(NamedTuple):
    """Until the data is on the disk; the processor's seconds and the peak memory are the process's own."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def timed(command: list[str]) -> Timing:
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return Timing(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
