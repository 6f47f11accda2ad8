"""A random Nemotron model of a stated size, as a Hugging Face directory. usage: models.py FOLDER NAME"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer

SHAPES = {  # hidden size, layers, heads, key/value heads, feed-forward size, vocabulary
    "nano": (384, 8, 6, 2, 1536, 8192),
    "small": (768, 12, 12, 4, 3072, 32000),
    "base": (2048, 20, 16, 4, 8192, 32000),
}

folder, (hidden, layers, heads, kv, ffn, vocabulary) = Path(sys.argv[1]), SHAPES[sys.argv[2]]
config = ModelConfig(
    num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_heads=heads, num_kv_heads=kv,
    head_dim=hidden // heads, vocab_size=vocabulary,
)  # fmt: skip
with torch.device("meta"):
    net = Transformer(config)
folder.mkdir(parents=True, exist_ok=True)
save_file(dict(net.fresh_weights(seed=0)), folder / "model.safetensors", metadata={"format": "pt"})
pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
pieces += [f"tok{i}" for i in range(vocabulary - len(pieces))]
tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
tokenizer.save(str(folder / "tokenizer.json"))
special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
special["tokenizer_class"] = "PreTrainedTokenizerFast"
(folder / "tokenizer_config.json").write_text(json.dumps(special))
values = config_json(config, dtype=torch.float32) | {"eos_token_id": 2}
(folder / "config.json").write_text(json.dumps(values))
