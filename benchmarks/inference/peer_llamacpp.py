"""usage: peer_llamacpp.py MODEL.gguf PRECISION CELL; by llama-cpp-python's low-level calls, in batches."""

import os
import sys

import cells
import llama_cpp as llama
import numpy as np

MOST = 2048  # tokens of one call

path, _, cell = sys.argv[1:]
llama.llama_backend_init()
silent = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(silent, None)
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(MOST, 0, 1)


def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
    """(token, position, sequence, whether its logits are wanted) -> the largest of those that are."""
    found: list[int] = []
    for start in range(0, len(tokens), MOST):
        part = tokens[start : start + MOST]
        batch.n_tokens, wanted = len(part), 0
        for i, (token, position, sequence, is_wanted) in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, is_wanted
            batch.seq_id[i][0] = sequence
            wanted += is_wanted
        assert llama.llama_decode(context, batch) == 0
        if wanted:
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (wanted, vocabulary))
            found += logits.argmax(1).tolist()
    return found


def generate(prompts: cells.Prompts, num_new: int) -> cells.Prompts:
    memory = llama.llama_get_memory(context)
    llama.llama_memory_clear(memory, True)
    last = len(prompts[0]) - 1
    common = cells.SHARED if cell == "shared" and len(prompts) > 1 else 0
    if common:  # computed once, for all sequences
        decode([(t, i, 0, False) for i, t in enumerate(prompts[0][:common])])
        for s in range(1, len(prompts)):
            llama.llama_memory_seq_cp(memory, 0, s, 0, common)
    rows = [(t, i, s, i == last) for s, p in enumerate(prompts) for i, t in enumerate(p) if i >= common]
    new = [[token] for token in decode(rows)]
    for step in range(1, num_new):
        drawn = decode([(row[-1], last + step, s, True) for s, row in enumerate(new)])
        for row, token in zip(new, drawn, strict=True):
            row.append(token)
    return new


# Made once, before the clock of everything but the start.
count, length = cells.shape(cell)
params = llama.llama_context_default_params()
params.n_ctx, params.n_seq_max = count * (length + cells.NEW + 8), count
params.kv_unified = cell == "shared"
params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
params.n_batch, params.n_ubatch = MOST, 512
context = llama.llama_init_from_model(model, params)
cells.run(cell, vocabulary, f"llama-cpp-python {llama.__version__}", generate)
