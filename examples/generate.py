"""Generate in this process, without a server.

    python examples/generate.py [MODEL]

MODEL is a pulled name (nemotron4 pull smollm2), a directory, a .gguf file or a hub id.
"""

from __future__ import annotations

import sys

import nemotron4

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
prompts = [
    [{"role": "user", "content": "Name three uses of synthetic data."}],
    [{"role": "user", "content": "Write one line in the style of Shakespeare."}],
]

with nemotron4.load(model) as engine:
    for answer in engine.generate(prompts, max_new_tokens=64, temperature=0):
        print(f"{len(answer.token_ids)} tokens, ended by {answer.finish_reason}: {answer.text.strip()}\n")
