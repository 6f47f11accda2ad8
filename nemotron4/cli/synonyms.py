"""What other tools call our options: vLLM, llama.cpp, ollama, TRL, lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Collection

# Their spelling -> ours, the first that the command has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "--max-model-len": ("--context",),
    "--ctx-size": ("--context",),
    "--num-ctx": ("--context",),
    "--max-seq-len": ("--context",),
    "--tp": ("--tensor-parallel",),
    "--tensor-parallel-size": ("--tensor-parallel",),
    "--pp": ("--pipeline-parallel",),
    "--pipeline-parallel-size": ("--pipeline-parallel",),
    "--quantization": ("--quantize",),
    "--load-format": ("--quantize",),
    "--torch-dtype": ("--dtype",),
    "--precision": ("--dtype",),
    "--max-num-seqs": ("--max-running",),
    "--parallel": ("--max-running", "--max-in-flight", "--concurrency"),
    "--num-concurrent": ("--concurrency", "--max-in-flight"),
    "--workers": ("--concurrency",),
    "--lora": ("--adapter",),
    "--lora-path": ("--adapter",),
    "--lora-modules": ("--adapter",),
    "--peft": ("--adapter",),
    "--max-tokens": ("--max-new-tokens",),
    "--max-new-tokens": ("--max-tokens",),
    "--n-predict": ("--max-new-tokens", "--max-tokens"),
    "--num-predict": ("--max-new-tokens", "--max-tokens"),
    "--temp": ("--temperature",),
    "--system-prompt": ("--system",),
    "--prompt-file": ("--system",),
    "--output-dir": ("--out", "--output"),
    "--output-path": ("--out", "--output"),
    "--output": ("--out",),
    "--out": ("--output",),
    "--outfile": ("--output", "--out"),
    "--outtype": ("--dtype",),
    "--num-samples": ("--limit",),
    "--base-url": ("--endpoint", "--url"),
    "--url": ("--endpoint",),
    "--api-base": ("--endpoint", "--url"),
}
# Their option -> what is given without an option here.
ARGUMENTS: dict[str, str] = {
    "--model": "MODEL",
    "--model-path": "MODEL",
    "--model-name-or-path": "MODEL",
    "--model-id": "MODEL",
    "--pretrained": "MODEL",
    "--tasks": "BENCHMARK",
    "--task": "BENCHMARK",
    "--config": "RECIPE",
    "--config-file": "RECIPE",
}


def ours(option: str, command: str, options: Collection[str], arguments: Collection[str]) -> str | None:
    """What to write instead of ``option``, as a hint, or None for an option that no tool is known to have."""
    if option in ("-m", "-hf"):
        option = "--model"
    known = next((name for name in OPTIONS.get(option, ()) if name in options), None)
    if known is not None:
        return f"here it is {known}"
    argument = ARGUMENTS.get(option)
    if argument is not None and argument in arguments:
        return f"here {argument} is given without an option: {command} {argument}"
    return None
