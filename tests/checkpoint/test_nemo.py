"""NeMo checkpoints read back the weights they were made of, and refuse what is damaged or hostile."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemotron4.checkpoint import inflate
from nemotron4.checkpoint.nemo import NemoCheckpoint, open_nemo
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.errors import CheckpointError
from nemotron4.model.transformer import Transformer
from tests.checkpoint import nemo_layouts as layouts

CONFIG = layouts.tiny_config()
WEIGHTS = layouts.hugging_face_weights(CONFIG)


def assert_reads(checkpoint: NemoCheckpoint, weights: layouts.Tensors) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for name, expected in weights.items():
        assert checkpoint.tensors[name].shape == tuple(expected.shape)
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_zarr_reads_the_same_weights_for_every_tensor_parallel_size(
    tmp_path: Path, tensor_parallel: int
) -> None:
    config = layouts.tiny_config(num_heads=8, num_kv_heads=8)
    weights = layouts.hugging_face_weights(config)
    checkpoint = open_nemo(
        layouts.write_release(tmp_path / "m", config, weights, tensor_parallel=tensor_parallel)
    )
    assert checkpoint.config == config
    assert_reads(checkpoint, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zarr_reads_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = layouts.hugging_face_weights(CONFIG, dtype)
    assert_reads(
        open_nemo(layouts.write_release(tmp_path / "m", CONFIG, weights, tensor_parallel=2)), weights
    )


def test_a_chunk_grid_that_does_not_divide_the_tensor_is_cut_at_the_edge(tmp_path: Path) -> None:
    weights = layouts.hugging_face_weights(CONFIG)
    assert_reads(
        open_nemo(layouts.write_release(tmp_path / "m", CONFIG, weights, tensor_parallel=5)), weights
    )


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(1, 1), (4, 2), (2, 4)])
def test_torch_dist_reads_the_same_weights_for_every_split(
    tmp_path: Path, tensor_parallel: int, pipeline_parallel: int
) -> None:
    folder = layouts.write_torch_dist(
        tmp_path / "m",
        CONFIG,
        WEIGHTS,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    assert_reads(open_nemo(folder), WEIGHTS)


@pytest.mark.filterwarnings("ignore")
def test_torch_dist_written_by_torch_itself_reads_back(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    folder = layouts.write_torch_dist(tmp_path / "m", CONFIG, WEIGHTS)
    place = folder / "model_weights"
    for file in (*place.glob("*.distcp"), place / ".metadata"):
        file.unlink()
    state: dict[str, Any] = {f"module.{k}": v for k, v in layouts.megatron_weights(CONFIG, WEIGHTS).items()}
    state["module.decoder.layers.mlp.linear_fc1._extra_state"] = layouts.Hostile
    dcp.save(state, checkpoint_id=place, no_dist=True)
    assert_reads(open_nemo(folder), WEIGHTS)


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors, splits = torch.load(folder + "/tensors.pt", weights_only=True)
state = {}
for name, tensor in tensors.items():
    placement = Shard(splits[name]) if name in splits else Replicate()
    state["module." + name] = distribute_tensor(tensor, mesh, [placement])
dcp.save(state, checkpoint_id=folder + "/m/model_weights")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torch_dist_written_by_two_real_ranks_reads_back(tmp_path: Path) -> None:
    folder = layouts.write_torch_dist(tmp_path / "m", CONFIG, WEIGHTS)
    for file in (folder / "model_weights").iterdir():
        file.unlink()
    tensors = layouts.megatron_weights(CONFIG, WEIGHTS)
    torch.save((tensors, layouts.SPLIT), tmp_path / "tensors.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    assert len(list((folder / "model_weights").glob("*.distcp"))) == 2
    assert_reads(open_nemo(folder), WEIGHTS)


def test_nemo2_directory_reads_with_the_defaults_of_its_config_class(tmp_path: Path) -> None:
    folder = layouts.write_torch_dist(
        tmp_path / "m", CONFIG, WEIGHTS, prefix="module.", weights_folder="weights"
    )
    (folder / "model_config.yaml").unlink()
    (folder / "context").mkdir()
    (folder / layouts.TOKENIZER).rename(folder / "context" / "tokenizer.model")
    (folder / "context" / "model.yaml").write_text(
        "_target_: nemo.collections.llm.gpt.model.nemotron.NemotronModel\n"
        "config:\n"
        "  _target_: nemo.collections.llm.gpt.model.nemotron.NemotronConfig\n"
        "  num_layers: 4\n  hidden_size: 48\n  ffn_hidden_size: 96\n  num_attention_heads: 8\n"
        "  num_query_groups: 4\n  kv_channels: 16\n  seq_length: 64\n"
        "  init_method: !!python/name:torch.nn.init.normal_ ''\n"
    )
    checkpoint = open_nemo(folder)
    assert checkpoint.config == CONFIG
    assert_reads(checkpoint, WEIGHTS)


@pytest.mark.parametrize("compressed", [False, True])
def test_nemo_file_reads_like_its_directory(tmp_path: Path, compressed: bool) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=2)
    path = layouts.pack(folder, tmp_path / "m.nemo", compressed=compressed)
    checkpoint = open_nemo(path)
    assert checkpoint.name == "m"
    assert_reads(checkpoint, WEIGHTS)


def test_open_checkpoint_finds_the_form(tmp_path: Path) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS)
    packed = layouts.pack(folder, tmp_path / "packed.nemo")
    for path in (folder, packed):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.config) == ("nemo", CONFIG)


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=2))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        for start, stop in ((0, 1), (5, 40), (31, 33), (0, CONFIG.hidden_size)):
            assert torch.equal(checkpoint.read_rows(name, start, stop), WEIGHTS[name][start:stop])


def test_qkv_equals_a_megatron_style_split(tmp_path: Path) -> None:
    """Megatron's own view: [groups, (queries + 2) * dim] cut into queries, key, value (attention.py)."""
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=4))
    key = "decoder.layers.self_attention.linear_qkv.weight"
    for layer in range(CONFIG.num_layers):
        fused = layouts.megatron_weights(CONFIG, WEIGHTS)[key][layer]
        dim, queries = CONFIG.head_dim, CONFIG.num_queries_per_kv_head
        by_group = fused.view(CONFIG.num_kv_heads, (queries + 2) * dim, CONFIG.hidden_size)
        expected = by_group.split([queries * dim, dim, dim], dim=1)
        for part, rows in zip("qkv", expected, strict=True):
            found = checkpoint.read(f"model.layers.{layer}.self_attn.{part}_proj.weight")
            assert torch.equal(found, rows.reshape(-1, CONFIG.hidden_size))


def test_logits_equal_those_of_the_weights_it_was_made_of(tmp_path: Path) -> None:
    weights = layouts.hugging_face_weights(CONFIG, torch.float32)
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", CONFIG, weights, tensor_parallel=4))
    tokens_BT = torch.arange(24).view(2, 12) * 7 % CONFIG.vocab_size
    logits = []
    for state in (weights, {name: checkpoint.read(name) for name in checkpoint.tensors}):
        model = Transformer(CONFIG)
        model.load_state_dict(state)
        logits.append(model(tokens_BT))
    assert torch.equal(*logits)


def test_padding_rows_of_the_vocabulary_are_left_out_and_told(tmp_path: Path) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=4, padding_rows=112)
    checkpoint = open_nemo(folder)
    assert checkpoint.config.vocab_size == CONFIG.vocab_size
    assert checkpoint.notes[0] == "112 padding rows of the vocabulary (624 stored) are left out."
    assert_reads(checkpoint, WEIGHTS)


def test_reward_head_is_kept(tmp_path: Path) -> None:
    config = layouts.tiny_config(num_reward_attributes=9)
    weights = layouts.hugging_face_weights(config)
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", config, weights, tensor_parallel=4))
    assert checkpoint.config.num_reward_attributes == 9
    assert_reads(checkpoint, weights)


def test_absent_keys_mean_full_rotation_and_shared_embeddings(tmp_path: Path) -> None:
    config = layouts.tiny_config(tie_embeddings=True, rotary_fraction=1.0)
    weights = layouts.hugging_face_weights(config)
    changes = {"rotary_percentage": ..., "share_embeddings_and_output_weights": ...}
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", config, weights, changes=changes))
    assert checkpoint.config.rotary_fraction == 1.0
    assert checkpoint.config.tie_embeddings
    assert_reads(checkpoint, weights)


def test_stop_ids_are_end_of_text_and_end_of_turn(tmp_path: Path) -> None:
    checkpoint = open_nemo(layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS))
    assert checkpoint.eos_token_ids == (3, 5)
    assert checkpoint.tokenizer().vocab_size == CONFIG.vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": ...}, "normalization is absent, which means 'layernorm'"),
        ({"activation": "fast-swiglu"}, "activation is set to 'fast-swiglu'"),
        ({"bias": ...}, "bias is absent, which means True"),
        ({"position_embedding_type": ...}, "position_embedding_type is absent"),
        ({"num_layers": 5}, "has shape"),
        ({"ffn_hidden_size": 192}, "has shape"),
        ({"hidden_size": "${multiply:2,24}"}, "hidden_size is '${multiply:2,24}'"),
        ({"num_attention_heads": 7}, "num_heads (7) is not divisible by num_kv_heads (4)"),
        ({"share_embeddings_and_output_weights": False}, None),
    ],
)
def test_settings_that_do_not_describe_the_weights_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, changes=changes)
    if message is None:
        open_nemo(folder)
        return
    with pytest.raises(CheckpointError) as raised:
        open_nemo(folder)
    assert message in str(raised.value)


def _damage_missing_chunk(folder: Path) -> str:
    name = "model_weights/model.decoder.layers.mlp.linear_fc2.weight/2.0.1"
    (folder / name).unlink()
    return f"chunk {name} is missing"


def _damage_short_chunk(folder: Path) -> str:
    path = folder / "model_weights/model.output_layer.weight/1.0"
    path.write_bytes(path.read_bytes()[:-2])
    return "model.output_layer.weight/1.0 has 24574 bytes; expected 24576"


def _damage_missing_tensor(folder: Path) -> str:
    (folder / "model_weights/model.decoder.final_layernorm.bias/.zarray").unlink()
    return "decoder.final_layernorm.bias is missing"


def _damage_unknown_tensor(folder: Path) -> str:
    place = folder / "model_weights/model.decoder.layers.self_attention.linear_proj.bias"
    place.mkdir()
    array = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f4", "order": "C", "compressor": None}
    (place / ".zarray").write_text(json.dumps(array))
    (place / "0").write_bytes(bytes(16))
    return "does not have: decoder.layers.self_attention.linear_proj.bias"


def _damage_compressed(folder: Path) -> str:
    path = folder / "model_weights/model.output_layer.weight/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compressor": {"id": "blosc"}}))
    return "compressor is {'id': 'blosc'}; expected None"


def _damage_dtype(folder: Path) -> str:
    path = folder / "model_weights/model.output_layer.weight/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "|O"}))
    return "dtype is '|O'; expected bfloat16, <f2, <f4"


def _damage_huge_grid(folder: Path) -> str:
    path = folder / "model_weights/model.output_layer.weight/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [10**9, 48], "chunks": [1, 1]}))
    return "needs 48000000000 chunk files"


def _damage_tokenizer(folder: Path) -> str:
    (folder / layouts.TOKENIZER).unlink()
    return f"tokenizer 'nemo:{layouts.TOKENIZER}' is not in the checkpoint"


def _damage_yaml_object(folder: Path) -> str:
    (folder / "model_config.yaml").write_text("!!python/object/apply:os.system ['exit 1']")
    return "expected a mapping of settings"


@pytest.mark.parametrize(
    "damage",
    [
        _damage_missing_chunk,
        _damage_short_chunk,
        _damage_missing_tensor,
        _damage_unknown_tensor,
        _damage_compressed,
        _damage_dtype,
        _damage_huge_grid,
        _damage_tokenizer,
        _damage_yaml_object,
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Any) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=2)
    message = damage(folder)
    with pytest.raises(CheckpointError) as raised:
        open_nemo(folder)
    assert message in str(raised.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00" / "model_weights.ckpt").write_bytes(pickle.dumps(layouts.Hostile()))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(layouts.settings(CONFIG)))
    with pytest.raises(CheckpointError, match="Python pickles"):
        open_nemo(tmp_path)


@pytest.mark.parametrize("what", ["exec", "eval", "torch", "numpy"])
def test_a_hostile_index_is_refused_and_never_run(tmp_path: Path, what: str) -> None:
    folder = layouts.write_torch_dist(tmp_path / "m", CONFIG, WEIGHTS)
    hostile = {
        "exec": pickle.dumps(layouts.Hostile()),
        "eval": b"cbuiltins\neval\n(S'1+1'\ntR.",
        "torch": b"ctorch.hub\nload\n(S'x'\ntR.",
        "numpy": b"cnumpy\nload\n(S'x'\ntR.",
    }[what]
    (folder / "model_weights" / ".metadata").write_bytes(hostile)
    with pytest.raises(CheckpointError, match="refused"):
        open_nemo(folder)


def test_a_hostile_piece_is_refused_and_never_run(tmp_path: Path) -> None:
    folder = layouts.write_torch_dist(tmp_path / "m", CONFIG, WEIGHTS)
    path = folder / "model_weights" / "__0_0.distcp"
    data = path.read_bytes()
    assert b"_rebuild_tensor_v2" in data
    path.write_bytes(data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"))
    with pytest.raises(CheckpointError, match=r"refused|not a torch.save file"):
        open_nemo(folder)


def test_a_cut_torch_dist_file_is_refused(tmp_path: Path) -> None:
    folder = layouts.write_torch_dist(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=2)
    path = folder / "model_weights" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="outside the file"):
        open_nemo(folder)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "twice", "device", "short", "no tar"])
def test_a_hostile_archive_is_refused(tmp_path: Path, kind: str) -> None:
    folder = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS)
    path = layouts.pack(folder, tmp_path / "m.nemo")
    member = tarfile.TarInfo({"parent": "./../evil", "absolute": "/evil"}.get(kind, "./evil"))
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    if kind == "device":
        member.type = tarfile.CHRTYPE
    if kind == "twice":
        member.name = "model_config.yaml"
    with tarfile.open(path, "a:") as archive:
        archive.addfile(member)
    if kind == "short":
        path.write_bytes(path.read_bytes()[:20000])
    if kind == "no tar":
        path.write_bytes(b"not a tar" * 1000)
    expected = {
        "parent": "points outside",
        "absolute": "points outside",
        "link": "not a plain file",
        "device": "not a plain file",
        "twice": "occurs twice",
        "short": "cut short|not a tar",
        "no tar": "not a tar",
    }
    with pytest.raises(CheckpointError, match=expected[kind]):
        open_nemo(path)
    assert not (tmp_path.parent / "evil").exists()


def test_a_gzip_bomb_is_refused_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate, "LEAST_LIMIT", 2**20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "m.nemo"
    with gzip.open(path, "wb") as file:
        file.write(bytes(64 * 2**20))
    with pytest.raises(CheckpointError, match="grows beyond"):
        open_nemo(path)
    assert [file.suffix for file in tmp_path.glob("nemotron4-*/*")] == [".lock"]


def test_a_gzip_archive_is_inflated_once_and_goes_with_its_last_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    packed = tmp_path / "m.nemo"
    with gzip.open(packed, "wb") as file:
        file.write(b"weights" * 1000)
    first, second = inflate.inflate(packed), inflate.inflate(packed)
    assert os.fstat(first.file.fileno()).st_ino == os.fstat(second.file.fileno()).st_ino
    first.release()
    assert second.file.read() == b"weights" * 1000
    assert list(tmp_path.glob("nemotron4-*/*.tar"))
    second.release()
    assert not list(tmp_path.glob("nemotron4-*/*.tar"))
    (folder,) = tmp_path.glob("nemotron4-*")
    folder.chmod(0o777)
    with pytest.raises(CheckpointError, match="only you may write"):
        inflate.inflate(packed)
