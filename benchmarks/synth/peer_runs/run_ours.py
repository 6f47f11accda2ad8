"""This package: one stage over a file of prompts. Arguments: URL PROMPTS OUT FOLDER IN_FLIGHT."""

import json
import sys
from pathlib import Path

from nemotron4 import config
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe

if __name__ == "__main__":
    url, prompts, out, folder, in_flight = sys.argv[1:6]
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": prompts, "task": "peer"}},
        {
            "name": "out",
            "kind": "respond",
            "takes": ["in"],
            "temperature": 0.0,
            "max_tokens": 64,
            "knobs": {"k": 1},
        },
    ]
    endpoint = {"peer": {"url": url, "max_in_flight": int(in_flight)}}
    run_recipe(
        config.build(SynthRecipe, {"name": "peer", "stage": stages, "endpoint": endpoint}), Path(folder)
    )
    with Reader(Path(folder) / "ledger.sqlite") as ledger, Path(out).open("w") as file:
        for record in ledger.records_of("out"):
            row = ledger.payload(record)
            text = row["responses"][0]["text"]
            file.write(json.dumps({"prompt": row["prompt"]["messages"][0][1], "text": text}) + "\n")
