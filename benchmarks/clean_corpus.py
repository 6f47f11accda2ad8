"""Cleans the two corpora of docs/pretraining.md with datatrove: rules of quality, then near-duplicates.

    pip install "datatrove[io,processing]" "xxhash<4" spacy   # xxhash 4 refuses what datatrove 0.10.1 passes
    python benchmarks/clean_corpus.py

Reads data/books.jsonl.gz and data/wordnet_definitions.jsonl.gz, writes work/NAME/clean. A second run goes on
where the first one stopped.
"""

from __future__ import annotations

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

TASKS = 4  # processes' worth of work; on a cluster as many as there are files
config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def definition(self, data, path, place):
    """A text of WordNet's columns; its definitions are too short for Gopher's rules."""
    words = ", ".join(data["words"])
    return {"id": data["id"], "text": " ".join([f"{words}: {data['definition']}.", *data["examples"]])}


def is_long(document):
    return len(document.text.split()) >= 6


CORPORA = {
    "books": (
        JsonlReader("data", glob_pattern="books.jsonl.gz"),
        [GopherRepetitionFilter(), GopherQualityFilter()],
    ),
    "definitions": (
        JsonlReader("data", glob_pattern="wordnet_definitions.jsonl.gz", adapter=definition),
        [LambdaFilter(is_long)],
    ),
}


def clean(name, reader, filters):
    def run(step, blocks, tasks=1):
        LocalPipelineExecutor(blocks, tasks=tasks, workers=2, logging_dir=f"work/logs/{name}/{step}").run()

    at = f"work/{name}"
    filtered = JsonlReader(f"{at}/filtered")
    run("filter", [reader, *filters, JsonlWriter(f"{at}/filtered", max_file_size=4_000_000)])
    run("sign", [filtered, MinhashDedupSignature(f"{at}/signatures", config=config)], TASKS)
    buckets = MinhashDedupBuckets(f"{at}/signatures", f"{at}/buckets", config=config)
    run("buckets", [buckets], config.num_buckets)
    run("cluster", [MinhashDedupCluster(f"{at}/buckets", f"{at}/remove", config=config)])
    run("keep", [filtered, MinhashDedupFilter(f"{at}/remove"), JsonlWriter(f"{at}/clean")], TASKS)


if __name__ == "__main__":
    for name, (reader, filters) in CORPORA.items():
        clean(name, reader, filters)
