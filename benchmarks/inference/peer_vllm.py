"""usage: peer_vllm.py MODEL PRECISION CELL; vLLM's CPU build, by its offline engine."""

import os
import sys
from pathlib import Path

import cells

cores = sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])]
os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # left to itself it keeps one for its scheduler
    "LD_PRELOAD": str(Path(sys.prefix, "lib", "libiomp5.so")),  # what its documentation asks for
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def generate(prompts: cells.Prompts, num_new: int) -> cells.Prompts:
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    answers = engine.generate(asked, vllm.SamplingParams(**GREEDY, max_tokens=num_new), use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in answers]


GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
if __name__ == "__main__":  # its processes read this file again
    import vllm

    path, precision, cell = sys.argv[1:]
    count, length = cells.shape(cell)
    engine = vllm.LLM(
        path,
        dtype=precision,
        skip_tokenizer_init=True,
        max_model_len=length + cells.NEW,
        max_num_seqs=count,
        kv_cache_memory_bytes=4 << 30,  # all prompts of a cell run at once
        enable_prefix_caching=cell == "shared",  # the others' prompts are to be computed
        disable_log_stats=True,
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    cells.run(cell, vocabulary, f"vllm {vllm.__version__}", generate)
