from __future__ import annotations

from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.cache import cache_dir, list_cache, resolve
from nemotron4.errors import CheckpointError
from tests.tiny_models import nemotron_directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
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
    with pytest.raises(CheckpointError, match="an adapter, not a whole model"):
        open_checkpoint(tmp_path / "adapter")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"expected a directory, a \.gguf or a \.nemo file"):
        open_checkpoint(tmp_path / "weights.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)
