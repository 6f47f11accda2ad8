"""distilabel: one step over a file of prompts. Arguments: URL PROMPTS OUT FOLDER IN_FLIGHT."""

import json
import os
import sys
from pathlib import Path

url, prompts, out, folder, in_flight = sys.argv[1:6]
os.environ |= {"HF_HUB_OFFLINE": "1", "DISTILABEL_LOG_LEVEL": "WARNING", "HOME": folder}

from distilabel.models.llms import OpenAILLM  # noqa: E402
from distilabel.pipeline import Pipeline  # noqa: E402
from distilabel.steps import LoadDataFromDicts  # noqa: E402
from distilabel.steps.tasks import TextGeneration  # noqa: E402

if __name__ == "__main__":
    rows = [{"instruction": json.loads(line)["prompt"]} for line in Path(prompts).read_text().splitlines()]
    with Pipeline("peer", cache_dir=f"{folder}/cache") as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=int(in_flight))
        llm = OpenAILLM(
            model="fake",
            base_url=url,
            api_key="none",
            generation_kwargs={"temperature": 0.0, "max_new_tokens": 64},
        )
        load >> TextGeneration(llm=llm, input_batch_size=int(in_flight))
    made = pipeline.run(use_cache=True)["default"]["train"]
    with Path(out).open("w") as file:
        for row in made:
            file.write(json.dumps({"prompt": row["instruction"], "text": row["generation"]}) + "\n")
