"""Data Designer: one text column over a file of prompts. Arguments: URL PROMPTS OUT FOLDER IN_FLIGHT."""

import json
import os
import sys
from pathlib import Path

url, prompts, out, folder, in_flight = sys.argv[1:6]
os.environ |= {"HOME": folder, "NEMO_TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1"}

import data_designer.config as dd  # noqa: E402
import pandas  # noqa: E402
from data_designer.interface import DataDesigner  # noqa: E402

if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    provider = dd.ModelProvider(name="peer", endpoint=url, provider_type="openai", api_key="none")
    model = dd.ModelConfig(
        alias="peer", model="fake", provider="peer", skip_health_check=True,
        inference_parameters=dd.ChatCompletionInferenceParams(
            temperature=0.0, max_tokens=64, max_parallel_requests=int(in_flight)
        ),
    )  # fmt: skip
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(dd.DataFrameSeedSource(df=pandas.DataFrame(rows)))
    builder.add_column(dd.LLMTextColumnConfig(name="text", model_alias="peer", prompt="{{ prompt }}"))
    designer = DataDesigner(artifact_path=f"{folder}/artifacts", model_providers=[provider])
    # The default never resumes; a user who wants to survive a kill must ask for it.
    made = designer.create(
        builder, num_records=len(rows), dataset_name="peer", resume=dd.ResumeMode.IF_POSSIBLE
    )
    with Path(out).open("w") as file:
        for row in made.load_dataset()[["prompt", "text"]].to_dict("records"):
            file.write(json.dumps(row) + "\n")
