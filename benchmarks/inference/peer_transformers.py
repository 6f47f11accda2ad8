"""usage: peer_transformers.py MODEL PRECISION CELL"""

import os
import sys

import cells
import torch
import transformers
from transformers import AutoModelForCausalLM

path, precision, cell = sys.argv[1:]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision)).eval()


@torch.inference_mode()
def generate(prompts: cells.Prompts, num_new: int) -> cells.Prompts:
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
    )
    return out[:, ids.shape[1] :].tolist()


version = f"transformers {transformers.__version__}, torch {torch.__version__}"
cells.run(cell, model.config.vocab_size, version, generate)
