"""What each form that ``nemotron4 convert`` writes costs in perplexity.

    python benchmarks/quantization.py TEXT.txt [--model smollm2] [--forms int4,q4_k_m] [--out DIR]

Converts the model into each form with the command, reads the result back, and computes the perplexity of the
text's first tokens, in pieces of 512, with float32 products on the weights as they are stored. Activations
are not quantised here; engines that do so (int8, fp8) lose a little more. One line for each form.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer

PIECE = 512
FORMS = dict.fromkeys(("int8", "fp8", "fp8-static", "int4", "nvfp4"), "hf")
FORMS |= dict.fromkeys(("q8_0", "q6_k", "q4_k_m", "q4_0"), "gguf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--calibration", type=Path, help="other text, for int4, nvfp4 and fp8-static")
    parser.add_argument("--out", type=Path, help="keep the converted models in this folder")
    given = parser.parse_args()
    ids = open_checkpoint(given.model).tokenizer().encode(given.text.read_text("utf-8"))[: given.tokens]
    print(f"{len(ids)} tokens of {given.text.name}, pieces of {PIECE}")
    source = perplexity(given.model, ids)
    print(f"{'as stored':<12}{source:9.3f}", flush=True)
    for form in given.forms.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(given.out / form) if given.out else temporary
            command = [sys.executable, "-m", "nemotron4", "convert", given.model, folder, "--to", FORMS[form]]
            command += ["--quantize", form, "--json"]
            if form == "fp8-static" or (given.calibration and form in ("int4", "nvfp4")):
                command += ["--calibration", str(given.calibration or given.text)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            written = json.loads(done.stdout)
            found = perplexity(folder, ids)
        worst = max(fact["relative_error"] for fact in written["quantization_error"].values())
        print(
            f"{form:<12}{found:9.3f}  {found / source - 1:+7.2%}  {written['bytes'] / 1e6:6.1f} MB  "
            f"largest error of a weight {worst:.2%}",
            flush=True,
        )


@torch.no_grad()
def perplexity(model: str, ids: list[int]) -> float:
    """Of all tokens but the first of each piece."""
    net, _ = load_transformer(open_checkpoint(model), dtype=torch.float32)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, PIECE):
        piece_T = torch.tensor(ids[start : start + PIECE])
        logits_TV = net(piece_T[None])[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits_TV, piece_T[1:], reduction="sum"))
        count += len(piece_T) - 1
    return math.exp(total / count)


if __name__ == "__main__":
    main()
