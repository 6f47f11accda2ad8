"""What recipes/nano/grpo.toml starts from: a fresh model of bytes; sums to imitate, to practise, held out.

Each sum to imitate stands there three times, once with the mark that the judge looks for. The sums held out
are in no other file.
Run: python examples/arithmetic_data.py data/arithmetic
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.model.presets import nano
from nemotron4.model.transformer import Transformer
from nemotron4.records import write

LARGEST = 29
NUM_IMITATED, NUM_HELD_OUT = 300, 300
END = "<|endoftext|>"
MARK = "#### "  # what the judge looks for; one token, so that an answer is little more than its digits


def write_sums(folder: Path) -> None:
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(0).shuffle(sums)
    held_out, practised = sums[:NUM_HELD_OUT], sums[NUM_HELD_OUT:]
    imitated = practised[:NUM_IMITATED]
    write(
        folder / "sft.jsonl",
        [
            {"prompt": f"{a}+{b}=", "completion": f"{mark}{a + b}"}
            for a, b in imitated
            for mark in (MARK, "", "")
        ],
    )
    for name, part in (("practised", practised), ("held_out", held_out)):
        write(folder / f"{name}.jsonl", [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in part])
    print(f"{len(imitated)} to imitate, {len(practised)} to practise, {len(held_out)} held out in {folder}")


def write_start(folder: Path) -> None:
    """A Nemotron-4 block with random weights; a vocabulary of the 256 bytes, the mark and the end of text."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([MARK])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    config = dataclasses.replace(
        nano(),
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=512,
        num_heads=4,
        vocab_size=320,
        context_length=64,
    )
    net = Transformer(config)
    net.initialise(seed=0)
    save_file(net.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    values = config_json(config, dtype=torch.float32) | {"eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_sums(Path(sys.argv[1]))
    write_start(Path(sys.argv[1]) / "start")
