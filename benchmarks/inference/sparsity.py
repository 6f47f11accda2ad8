"""Tokens/s with and without leaving out the zeros of squared ReLU, in turns, against the share of zeros.

    .venv/bin/python benchmarks/inference/sparsity.py [FOLDER ...] [--shapes nano small] [--precision int8]
                                                      [--zeros 50 70 80 90 95] [--rows 1 2 4] [--rounds 5]

A FOLDER's model stays as it is. The models of ``models.py`` are shaped to a stated share: the norm before a
feed-forward block gives its first dimension the constant one, and the first column of ``up_proj`` takes from
each output that quantile of a normal distribution with the output's standard deviation. "zeros": what enters
``down_proj``, from the plain model on random tokens. The engines differ in ``max_running``, 4 and 5, which
decides how ``down_proj`` is stored. Both give the same tokens, and guess none. Times are the least of their
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.inference.native.model import FEW_ROWS

NUM_NEW = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--shapes", nargs="*", default=[], choices=("nano", "small", "base"))
    parser.add_argument("--zeros", nargs="+", type=int, default=[50, 70, 80, 90, 95])
    parser.add_argument("--precision", choices=("int8", "int4"), default="int8")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], choices=(1, 2, 3, 4))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for folder in given.folders:
        compare(folder, str(folder), given)
    for shape in given.shapes:
        for percent in given.zeros:
            with tempfile.TemporaryDirectory() as temporary:
                command = [sys.executable, str(Path(__file__).with_name("models.py")), temporary, shape]
                subprocess.run(command, check=True)
                shape_zeros(Path(temporary, "model.safetensors"), percent / 100)
                compare(Path(temporary), f"{shape}, {percent} % stated", given)


def shape_zeros(path: Path, share: float) -> None:
    weights = load_file(path)
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share))
    for name, weight in weights.items():
        if name.endswith("post_attention_layernorm.weight"):
            weight[0] = -1  # a gain of zero
        elif name.endswith("post_attention_layernorm.bias"):
            weight[0] = 1
        elif name.endswith("up_proj.weight"):
            weight[:, 0] = -quantile * weight[:, 1:].norm(dim=1)
    save_file(weights, path, metadata={"format": "pt"})


def share_of_zeros(folder: Path) -> list[float]:
    """Of each layer, in percent."""
    net, _ = load_transformer(open_checkpoint(folder), dtype=torch.float32)
    found: list[float] = []
    for layer in net.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: found.append(100 * float((inputs[0] == 0).float().mean()))
        )
    with torch.inference_mode():
        net(torch.randint(3, net.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0)))
    return found


def compare(folder: Path, title: str, given: argparse.Namespace) -> None:
    zeros = share_of_zeros(folder)
    print(f"{title}: zeros {statistics.mean(zeros):.0f} % ({' '.join(f'{share:.0f}' for share in zeros)})")
    loaded = [
        nemotron4.load(
            str(folder), quantize=given.precision, num_speculative_tokens=0, max_running=max_running
        )
        for max_running in (FEW_ROWS + 1, FEW_ROWS)
    ]
    with loaded[0], loaded[1]:
        for num_rows in given.rows:
            taken: list[list[tuple[float, float]]] = [[], []]
            tokens = []
            for turn in range(2 * given.rounds + 2):
                seconds, answers = measure(loaded[turn % 2], num_rows)
                tokens.append(answers)
                if turn > 1:  # what happens once is not measured
                    taken[turn % 2].append(seconds)
            assert all(answers == tokens[0] for answers in tokens), "leaving out zeros changed a token"
            without, with_ = (num_rows * (NUM_NEW - 1) / least(rounds) for rounds in taken)
            print(
                f"  {num_rows} rows: {without:.0f} -> {with_:.0f} tokens/s ({with_ / without:.2f}x)",
                flush=True,
            )


def measure(engine: nemotron4.Engine, num_rows: int) -> tuple[tuple[float, float], list[tuple[int, ...]]]:
    """Seconds for one token of each row and for all, and the tokens."""
    prompts = [[300 + row, *range(400, 431)] for row in range(num_rows)]
    seconds = []
    for num_new in (1, NUM_NEW):
        began = time.perf_counter()
        answers = engine.generate(prompts, max_new_tokens=num_new, temperature=0, ignore_eos=True)
        seconds.append(time.perf_counter() - began)
    return (seconds[0], seconds[1]), [tuple(answer.token_ids) for answer in answers]


def least(rounds: list[tuple[float, float]]) -> float:
    """Seconds of the steps after the first token."""
    return min(whole for _, whole in rounds) - min(first for first, _ in rounds)


if __name__ == "__main__":
    main()
