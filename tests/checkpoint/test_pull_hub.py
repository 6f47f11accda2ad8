"""Pulling from a Hugging Face hub: the real client against a fake hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.cache import list_cache, resolve
from nemotron4.checkpoint.hub import pull_hub
from nemotron4.errors import CheckpointError, DownloadError
from tests.checkpoint.fake_hub import COMMIT, FakeHub, fake_hub
from tests.tiny_models import llama_directory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "huggingface"))
    with fake_hub() as running:
        yield running


@pytest.fixture
def model(tmp_path: Path, hub: FakeHub) -> str:
    directory = llama_directory(tmp_path / "source", max_shard_size="60KB")
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    unwanted = (
        "pytorch_model.bin",
        "consolidated.pt",
        "consolidated.safetensors",
        "model.onnx",
        "original/params.json",
        "model.gguf",
    )
    hub.repositories["org/tiny"] = files | dict.fromkeys(unwanted, b"unwanted")
    hub.repositories["org/tiny"]["LICENSE"] = b"Apache-2.0"
    return "org/tiny"


def test_a_model_is_pulled_once_without_pickles_and_opens(hub: FakeHub, model: str, tmp_path: Path) -> None:
    path = pull_hub(model, endpoint=hub.url)
    wanted = {file.name for file in (tmp_path / "source").iterdir()} | {"LICENSE"}
    assert {file.name for file in path.iterdir()} == wanted == set(hub.downloads)
    assert open_checkpoint(model).config == open_checkpoint(tmp_path / "source").config
    sent = list(hub.downloads)
    assert pull_hub(model, endpoint=hub.url) == path
    assert hub.downloads == sent


def test_a_damaged_file_is_refused_and_the_next_pull_fetches_only_it(hub: FakeHub, model: str) -> None:
    shard = "model-00001-of-00004.safetensors"
    hub.corrupt = {shard}
    with pytest.raises(DownloadError, match=f"{shard}: sha256 is"):
        pull_hub(model, endpoint=hub.url)
    assert list_cache() == []
    hub.corrupt, hub.downloads = set(), []
    open_checkpoint(pull_hub(model, endpoint=hub.url))
    assert hub.downloads == [shard]


@pytest.mark.parametrize("files", [["m-Q4_0.gguf"], ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]])
def test_a_repository_with_one_gguf_model_gives_its_files(hub: FakeHub, files: list[str]) -> None:
    hub.repositories["org/quantised"] = dict.fromkeys([*files, "README.md", "m.bin"], b"GGUF")
    path = pull_hub("org/quantised", endpoint=hub.url)
    assert sorted(file.name for file in path.iterdir()) == ["README.md", *files]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf", "b.gguf"], r"2 GGUF models and no safetensors: a\.gguf, b\.gguf"),
        (["pytorch_model.bin", "config.json"], r"no safetensors and no GGUF file \(it has: \.bin, \.json\)"),
        ([], "it is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_download(
    hub: FakeHub, files: list[str], message: str
) -> None:
    hub.repositories["org/m"] = dict.fromkeys(files, b"x")
    with pytest.raises(DownloadError, match=message):
        pull_hub("org/m", endpoint=hub.url)
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (404, "RepoNotFound", "no such model on the hub", "check the name"),
        (403, "GatedRepo", "asks for an accepted licence", "HF_TOKEN"),
        (400, "", "the hub did not answer", "check the network"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    hub: FakeHub, model: str, status: int, code: str, message: str, hint: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(DownloadError, match=message) as caught:
        pull_hub(model, endpoint=hub.url)
    assert hint in (caught.value.hint or "")


def test_no_network_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "huggingface"))
    with fake_hub() as closed:
        pass
    with pytest.raises(DownloadError, match="the hub did not answer") as caught:
        pull_hub("org/tiny", endpoint=closed.url)
    assert caught.value.hint == "check the network"


def test_a_name_that_is_no_hub_id_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="'smolm2' is not a hub id") as caught:
        pull_hub("smolm2")
    assert caught.value.hint == "did you mean 'smollm2'?"


def test_the_command_prints_the_path_and_lists_the_cache(hub: FakeHub, model: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "nemotron4", "pull", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    path = run(model).strip()
    listed = json.loads(run("--list", "--json"))["models"]
    assert [(entry["name"], entry["path"]) for entry in listed] == [(model, path)]
    assert open_checkpoint(path).config.num_layers == 2


GGUF_FILES = ["tiny-Q4_K_M.gguf", "tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [("Q4_K_M", GGUF_FILES[:1]), ("q8_0", GGUF_FILES[1:]), (GGUF_FILES[0], GGUF_FILES[:1])],
)
def test_one_of_several_gguf_models_is_pulled_by_its_name(
    hub: FakeHub, file: str, expected: list[str]
) -> None:
    hub.repositories["org/many"] = dict.fromkeys(GGUF_FILES, b"x")
    folder = pull_hub(f"org/many:{file}", endpoint=hub.url)
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert resolve(f"org/many:{file}") == folder
    assert [model.name for model in list_cache()] == [f"org/many:{file}"]
    pull_hub(f"org/many:{file}", endpoint=hub.url)
    assert sorted(hub.downloads) == expected


def test_a_name_of_several_gguf_models_is_refused_with_all_of_them(hub: FakeHub) -> None:
    hub.repositories["org/many"] = dict.fromkeys(GGUF_FILES, b"x")
    with pytest.raises(DownloadError, match="'Q' names 2 GGUF models; it has: tiny-Q4_K_M"):
        pull_hub("org/many:Q", endpoint=hub.url)
    with pytest.raises(DownloadError, match="2 GGUF models and no safetensors") as caught:
        pull_hub("org/many", endpoint=hub.url)
    assert "nemotron4 pull org/many:tiny-Q4_K_M.gguf" in str(caught.value.hint)


def test_a_revision_has_a_folder_of_its_own(hub: FakeHub, model: str) -> None:
    folder = pull_hub(model, endpoint=hub.url, revision=COMMIT)
    assert resolve(model, revision=COMMIT) == folder == resolve(f"{model}@{COMMIT}")
    with pytest.raises(CheckpointError):
        resolve(model)


def test_what_hugging_face_s_cache_has_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "huggingface" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = llama_directory(folder / "snapshots" / COMMIT)
    assert pull_hub("org/tiny", endpoint=hub.url) == snapshot
    assert hub.downloads == []
