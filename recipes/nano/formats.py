"""One checkpoint in every form, read back: python recipes/nano/formats.py FOLDER PROMPTS OUT

FOLDER/hf, FOLDER/nemo and FOLDER/gguf are what `nemotron4 convert` wrote in float32; this writes the forms
that others write (a .nemo file, torch_dist by PyTorch itself, Megatron's names in safetensors), reads all
of them with our loader, and compares every tensor and the greedy tokens after the PROMPTS (rows with
messages) with the Hugging Face folder. transformers reads that folder too. llama.cpp and vLLM have
environments of their own: NEMOTRON4_LLAMA_CPP and NEMOTRON4_VLLM name their pythons (with xllamacpp, with
vllm); without, they are reported as untested.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.nemo_config import nemo_parts
from nemotron4.errors import import_optional
from nemotron4.records import Message

NUM_PROMPTS, NUM_TOKENS = 8, 24
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.warmup = 512, 1, 1, False
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)
for prompt in json.loads(sys.argv[2]):
    body = {"prompt": prompt, "n_predict": int(sys.argv[3]), "temperature": 0, "return_tokens": True}
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", data, kind)
    answer = urllib.request.urlopen(request)
    print("tokens", json.dumps(json.load(answer)["tokens"]))
"""
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    limits = {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}
    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **limits)
    settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    for answer in model.generate(prompts, settings):
        print("tokens", json.dumps(list(answer.outputs[0].token_ids)))
"""


def megatron_tensors(checkpoint: Checkpoint) -> dict[str, list[torch.Tensor]]:
    """Megatron's tensors by its names: one for each layer, or one in all."""
    return {
        key: [torch.cat([checkpoint.read(p.name)[p.start : p.stop] for p in parts]) for parts in entries]
        for key, entries in nemo_parts(checkpoint.config).items()
    }


def write_others(folder: Path) -> None:
    """The same weights as others write them, next to what `convert` wrote."""
    with tarfile.open(folder / "model.nemo", "w") as archive:
        archive.add(folder / "nemo", ".")
    tensors = megatron_tensors(open_checkpoint(folder / "hf"))
    for name in ("torch_dist", "bridge"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(
            folder / "nemo", folder / name, ignore=shutil.ignore_patterns("model_weights", "manifest.json")
        )
    stacked = {
        f"model.{key}": torch.stack(found) if ".layers." in key else found[0]
        for key, found in tensors.items()
    }
    weights = folder / "torch_dist" / "model_weights"
    dcp.save(stacked, checkpoint_id=weights, no_dist=True)
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    named = {
        key.replace(".layers.", f".layers.{layer}."): tensor.contiguous()
        for key, found in tensors.items()
        for layer, tensor in enumerate(found)
    }
    save_file(named, folder / "bridge" / "model.safetensors")


def same(checkpoint: Checkpoint, source: Checkpoint) -> bool | str:
    """Whether every tensor is; GGUF stores norms with the 1 added, which float32 rounds."""
    apart = {name: (checkpoint.read(name) - source.read(name)).abs().max().item() for name in source.tensors}
    norms = max(value for name, value in apart.items() if "norm" in name)
    others = max(value for name, value in apart.items() if "norm" not in name)
    return "but norms, by 6e-8 at most" if not others and 0 < norms <= 2**-24 else not (others or norms)


def our_tokens(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    with nemotron4.load(str(path), dtype="float32") as engine:
        found = engine.generate(prompts, max_new_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return [list(answer.token_ids) for answer in found]


def transformers_tokens(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    transformers = import_optional("transformers", "reading the folder as others do")
    model = transformers.NemotronForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        limits = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **limits
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def peer_tokens(variable: str, script: str, path: Path, prompts: list[list[int]]) -> list[list[int]] | None:
    python = os.environ.get(variable)
    if not python:
        return None
    command = [python, "-c", script, str(path), json.dumps(prompts), str(NUM_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        sys.exit(f"{variable}: {done.stderr[-2000:]}")
    return [
        json.loads(line.removeprefix("tokens "))
        for line in done.stdout.splitlines()
        if line.startswith("tokens ")
    ]


def until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """llama.cpp stops there; what it makes of a model that must not stop is another model's answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def main(folder: Path, prompts_file: Path, out: Path) -> None:
    write_others(folder)
    source = open_checkpoint(folder / "hf")
    tokenizer, prompt_format = source.tokenizer(), source.prompt_format()
    assert prompt_format is not None
    rows = [json.loads(line) for line in prompts_file.read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]]
    asked = [[Message.from_json(message) for message in row["messages"]] for row in rows]
    prompts = [prompt_format.encode(tokenizer, messages) for messages in asked]
    expected = our_tokens(folder / "hf", prompts)
    results: dict[str, dict[str, object]] = {}
    forms = {
        "Hugging Face": "hf",
        "NeMo, zarr": "nemo",
        "NeMo, .nemo file": "model.nemo",
        "torch_dist": "torch_dist",
        "Megatron-Bridge names": "bridge",
        "GGUF": "gguf",
    }
    for form, place in forms.items():
        checkpoint = open_checkpoint(folder / place)
        tokens = our_tokens(folder / place, prompts) == expected
        results[form] = {"tensors equal": same(checkpoint, source), "greedy tokens equal": tokens}
    peers = {
        "transformers": transformers_tokens(folder / "hf", prompts),
        "llama.cpp": peer_tokens("NEMOTRON4_LLAMA_CPP", LLAMA_CPP, folder / "gguf" / "model.gguf", prompts),
        "vLLM": peer_tokens("NEMOTRON4_VLLM", VLLM, folder / "hf", prompts),
    }
    for peer, found in peers.items():
        cut = partial(until_end, ends=source.eos_token_ids) if peer == "llama.cpp" else list
        equal = "untested" if found is None else [*map(cut, found)] == [*map(cut, expected)]
        form = "GGUF" if peer == "llama.cpp" else "Hugging Face"
        results[f"{form}, {peer}"] = {"greedy tokens equal": equal}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    if wrong := [name for name, result in results.items() if False in result.values()]:
        sys.exit(f"not equal: {', '.join(wrong)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
