"""The peers' side of compare.py, run in their environment: peer.py CASE MODEL FOLDER STEPS BATCH DTYPE"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# hidden, layers, heads, kv heads, ffn, vocabulary: 18.9 M and 124.7 M parameters
SHAPES = {"nano": (384, 8, 6, 2, 1536, 8192), "small": (768, 12, 12, 4, 3072, 32000)}


def make(name: str, folder: Path) -> None:
    """Random weights, and a tokenizer with one token for each byte."""
    hidden, layers, heads, kv_heads, ffn, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, hidden_act="relu2",
        max_position_embeddings=4096, partial_rotary_factor=0.5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(folder / "model")
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder / "model")


class Clock(TrainerCallback):  # type: ignore[misc]
    started = ended = 0.0

    def on_train_begin(self, *arguments: Any, **values: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **values: Any) -> None:
        self.ended = time.perf_counter()


def settings(kind: Any, folder: Path, steps: int, batch: int, dtype: str, **more: Any) -> Any:
    return kind(
        output_dir=str(folder / "peer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def main(case: str, model: str, folder: Path, steps: int, batch: int, dtype: str) -> None:
    if case == "make":
        make(model, folder)
        print("{}")
        return
    from datasets import Dataset

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    net = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    rows = [json.loads(line) for line in (folder / f"{case}.jsonl").read_text().splitlines()]
    clock = Clock()
    if case == "fixed":
        ids = tokenizer(rows[0]["text"]).input_ids
        windows = [ids[i * 512 : i * 512 + 512] for i in range(steps * batch)]
        data = Dataset.from_list([{"input_ids": w, "labels": w} for w in windows])
        trainer = Trainer(net, settings(TrainingArguments, folder, steps, batch, dtype), train_dataset=data)
        num_tokens = 512 * steps * batch
    elif case == "sft":
        from trl import SFTConfig, SFTTrainer

        arguments = settings(SFTConfig, folder, steps, batch, dtype, max_length=1024)
        trainer = SFTTrainer(
            net, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        num_tokens = sum(len(r["prompt"]) + len(r["completion"]) + 1 for r in rows)
    else:
        from trl import DPOConfig, DPOTrainer

        arguments = settings(DPOConfig, folder, steps, batch, dtype, max_length=1024, beta=0.1)
        trainer = DPOTrainer(
            net, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        num_tokens = sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2 for r in rows)
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.ended - clock.started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"tokens_per_s": num_tokens / seconds, "memory_gb": memory}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
