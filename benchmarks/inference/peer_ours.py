"""usage: peer_ours.py MODEL PRECISION CELL"""

import sys

import cells

import nemotron4

model, precision, cell = sys.argv[1:]
quantize = precision if precision in ("int8", "int4") else None
dtype = precision if precision in ("float32", "bfloat16") else "auto"
# Nothing guessed: what a random model says repeats itself, so that half of its tokens would come for nothing.
engine = nemotron4.load(model, dtype=dtype, quantize=quantize, num_speculative_tokens=0)


def generate(prompts: cells.Prompts, num_new: int) -> cells.Prompts:
    temperature = 1.0 if cell == "shared" else 0.0
    answers = engine.generate(prompts, max_new_tokens=num_new, temperature=temperature, ignore_eos=True)
    return [list(each.token_ids) for each in answers]


cells.run(cell, engine.info.vocab_size, f"nemotron4 {nemotron4.__version__}", generate)
