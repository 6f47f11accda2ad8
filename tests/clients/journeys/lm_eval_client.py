"""lm-evaluation-harness: a task of its own data, and each of the ways in which it asks a server."""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

url, model = sys.argv[1:]
remote = {
    "model": model,
    "base_url": f"{url}/completions",
    "tokenizer_backend": "remote",
    "num_concurrent": 2,
    "max_length": 2000,
}
texts = LocalCompletionsAPI(**remote)


def instances(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


# Likelihood of continuations, by the server's own vocabulary.
scored = texts.loglikelihood(instances("loglikelihood", ("The capital is", " Paris"), ("One", " two")))
assert all(value < 0 and greedy in (True, False) for value, greedy in scored)

# Likelihood of whole texts, in windows.
rolled = texts.loglikelihood_rolling(instances("loglikelihood_rolling", ("A whole text. " * 20,)))
assert rolled[0] < 0

# Free text, until a stop string.
until = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
assert len(texts.generate_until(instances("generate_until", ("Once", until)))) == 1

# The template of the server, written by the client.
turns = texts.apply_chat_template([{"role": "user", "content": "hi"}])
assert "<extra_id_1>User" in texts.tokenizer.apply_chat_template(turns)

# Conversations.
chat = LocalChatCompletion(model=model, base_url=f"{url}/chat/completions", tokenizer_backend=None)
prompt = chat.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
[answer] = chat.generate_until(instances("generate_until", (prompt, {"until": [], "max_gen_toks": 64})))
assert answer == "Paris is the capital of France.", answer

# A whole task: multiple choice over a file.
with tempfile.TemporaryDirectory() as folder:
    rows = [{"q": f"{n} + 1 =", "choices": [str(n + 1), "9"], "gold": 0} for n in range(3)]
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(model=texts, tasks=[task], bootstrap_iters=0)
assert results["results"]["sums"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
