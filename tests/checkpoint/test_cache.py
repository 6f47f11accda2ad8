from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.cache import list_cache, remove, resolve
from nemotron4.cli.main import main
from nemotron4.config import cache_dir
from nemotron4.errors import CheckpointError
from tests.tiny_models import nemotron_directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "huggingface"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/own", "/xdg", "/own"),
        (None, "/xdg", "/xdg/nemotron4"),
        (None, "relative", "~/.cache/nemotron4"),
        (None, "", "~/.cache/nemotron4"),
        ("~/models", None, "~/models"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    own: str | None, xdg: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NEMOTRON4_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected).expanduser()


def test_a_pulled_hub_model_is_found_by_its_id_and_keeps_its_name(cache: Path) -> None:
    directory = nemotron_directory(cache / "hub" / "nvidia" / "tiny")
    (cache / "partial" / "nvidia--other" / "files").mkdir(parents=True)
    assert resolve("nvidia/tiny") == directory
    assert open_checkpoint("nvidia/tiny").name == "nvidia/tiny"
    assert [(model.name, model.path) for model in list_cache()] == [("nvidia/tiny", directory)]
    assert list_cache()[0].size_bytes == sum(file.stat().st_size for file in directory.iterdir())


def test_a_path_that_exists_wins_over_a_hub_id(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "hub" / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert resolve("runs/one") == cache / "hub" / "runs" / "one"
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/one") == Path("runs/one")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("smollm2", "run: nemotron4 pull smollm2"),
        ("smolm2", "did you mean 'smollm2'?"),
        ("nvidia/tinny", "did you mean 'nvidia/tiny'? Or fetch it: nemotron4 pull nvidia/tinny"),
        ("org/unrelated", "run: nemotron4 pull org/unrelated"),
        ("/no/such/place", "give a path, a hub id (ORG/NAME), or one of: nvidia/tiny, smollm2"),
        ("../model", "give a path, a hub id (ORG/NAME), or one of: nvidia/tiny, smollm2"),
    ],
)
def test_a_model_that_is_not_here_says_how_to_get_it(cache: Path, model: str, hint: str) -> None:
    (cache / "hub" / "nvidia" / "tiny").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    assert model in caught.value.message
    assert caught.value.hint == hint


def test_what_is_no_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json, model_config\.yaml nor a \.gguf file"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its base is not recorded"):
        open_checkpoint(tmp_path / "adapter")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"expected a directory, a \.gguf or a \.nemo file"):
        open_checkpoint(tmp_path / "weights.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(cache: Path, tmp_path: Path) -> Path:
    """A model as huggingface_hub keeps it: a commit's folder, and branches that name commits."""
    folder = tmp_path / "huggingface" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v2").write_text("f" * 40)
    return nemotron_directory(folder / "snapshots" / COMMIT)


def test_a_model_of_hugging_face_s_own_cache_is_used(snapshot: Path) -> None:
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert resolve(name) == snapshot
    assert resolve("org/tiny", revision=COMMIT) == snapshot
    assert open_checkpoint("org/tiny").name == "org/tiny"
    assert [(model.name, model.is_ours) for model in list_cache()] == [("org/tiny", False)]
    with pytest.raises(CheckpointError, match="no model 'org/tiny@v2'"):
        resolve("org/tiny", revision="v2")
    (snapshot / "tiny-Q4_0.gguf").write_bytes(b"")
    (snapshot / "tiny-Q8_0.gguf").write_bytes(b"")
    assert resolve("org/tiny:tiny-Q8_0.gguf") == snapshot / "tiny-Q8_0.gguf"
    assert resolve("org/tiny:Q4_0") == resolve("org/tiny:q4_0") == snapshot / "tiny-Q4_0.gguf"
    with pytest.raises(CheckpointError, match="hint: write it as org/tiny:Q4_0"):
        resolve("hf.co/org/tiny:Q4_0")


def test_a_snapshot_without_its_weights_is_no_model(snapshot: Path) -> None:
    """A tokenizer alone, or some shards: ``pull`` would take it for the whole, and nothing would fetch it."""
    weights = snapshot / "model.safetensors"
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}))
    with pytest.raises(CheckpointError, match="no model 'org/tiny'"):
        resolve("org/tiny")
    index.unlink()
    assert resolve("org/tiny") == snapshot
    weights.unlink()
    with pytest.raises(CheckpointError, match="no model 'org/tiny'"):
        resolve("org/tiny")
    assert list_cache() == []


def test_only_what_we_fetched_is_deleted(snapshot: Path, cache: Path, tmp_path: Path) -> None:
    ours = nemotron_directory(cache / "hub" / "nvidia" / "tiny")
    assert remove("nvidia/tiny") > 0
    assert not ours.exists()
    with pytest.raises(CheckpointError, match="which other programs use") as caught:
        remove("org/tiny")
    assert "hf cache rm" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="is a path"):
        remove(str(tmp_path))
    assert snapshot.is_dir()


def test_a_context_shortens_the_model_s_own(tmp_path: Path) -> None:
    folder = nemotron_directory(tmp_path / "m")
    assert open_checkpoint(folder, context=100).config.context_length == 100
    with pytest.raises(CheckpointError, match="context is 300; the model has 256 positions"):
        open_checkpoint(folder, context=300)


def test_the_models_commands(snapshot: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nemotron_directory(cache / "hub" / "nvidia" / "tiny")
    assert main(["models", "list"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
        "nvidia/tiny",
        "org/tiny",
    ]
    assert main(["models", "show", "org/tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context_length"] == 256
    assert main(["models", "rm", "nvidia/tiny"]) == 0
    assert "freed" in capsys.readouterr().out
    assert main(["models", "rm", "nvidia/tinny"]) == 1
