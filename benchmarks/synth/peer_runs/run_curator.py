"""bespoke curator: one LLM over a file of prompts. Arguments: URL PROMPTS OUT FOLDER IN_FLIGHT."""

import importlib.util
import json
import os
import sys
from pathlib import Path

url, prompts, out, folder, in_flight = sys.argv[1:6]
# It counts tokens with a file that tiktoken would download; litellm ships the same file.
litellm = importlib.util.find_spec("litellm")
assert litellm is not None
assert litellm.origin is not None
os.environ |= {
    "HOME": folder, "CURATOR_CACHE_DIR": f"{folder}/c", "TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1",
    "OPENAI_API_KEY": "none", "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "TIKTOKEN_CACHE_DIR": str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
}  # fmt: skip

from bespokelabs import curator  # noqa: E402


class Answer(curator.LLM):
    def prompt(self, row):
        return row["prompt"]

    def parse(self, row, response):
        return {"prompt": row["prompt"], "text": response}


if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    limits = {"base_url": url, "max_concurrent_requests": int(in_flight), "max_requests_per_minute": 10**6,
              "max_tokens_per_minute": 1_000_000_000, "require_all_responses": False}  # fmt: skip
    llm = Answer(model_name="fake", backend="openai", backend_params=limits,
                 generation_params={"temperature": 0.0, "max_tokens": 64})  # fmt: skip
    made = llm(rows)
    made = getattr(made, "dataset", made)
    with Path(out).open("w") as file:
        for row in made:
            file.write(json.dumps({"prompt": row["prompt"], "text": row["text"]}) + "\n")
