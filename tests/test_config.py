"""Settings from TOML: overrides, and errors that name the file, the line and the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemotron4 import config
from nemotron4.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate is negative")


@dataclass(frozen=True)
class Settings:
    steps: int
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def test_a_file_with_overrides_becomes_settings(tmp_path: Path) -> None:
    path = write(tmp_path, 'steps = 3\n[inner]\nnames = ["a"]\n')
    found = config.load(Settings, path, ["inner.rate=2", "steps=4", "inner.names=['x', 'y']"])
    assert found == Settings(4, Inner(2.0, ("x", "y")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 3\n[inner]\nrat = 1\n", ":3: unknown key 'inner.rat'"),
        ("steps = 3\n[inner]\nrate = 'x'\n", ":3: inner.rate is 'x'; expected a number"),
        ("[inner]\nrate = 1\n", ": field 'steps' is missing; expected an integer"),
        ("steps = 3\n[inner]\nrate = -1\n", ": [inner]: rate is negative"),
        ("steps = \n", ": not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(Settings, path)
    assert caught.value.message.startswith(f"{path}{words}")


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Settings, write(tmp_path, "stps = 3\n"))
    assert caught.value.hint == "did you mean 'steps'?"


def test_an_override_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="override 'steps' has no '='"):
        config.load(Settings, write(tmp_path, "steps = 3\n"), ["steps"])


@pytest.mark.parametrize("place", ["2.steps=1", "x.steps=1", "2=1"])
def test_an_override_of_an_entry_that_is_not_there_is_refused(tmp_path: Path, place: str) -> None:
    path = write(tmp_path, "[[stage]]\nsteps = 3\n[[stage]]\nsteps = 4\n")
    with pytest.raises(ConfigError, match=r"is no place in the list; expected 0 to 1"):
        config.read(path, [f"stage.{place}"])


def test_the_mark_of_an_editor_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert config.read(path)[0] == {"steps": 3}


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(b"# caf\xe9\nsteps = 1\n")
    with pytest.raises(ConfigError, match=r"s\.toml: not UTF-8 text: byte 0xe9 at 5"):
        config.load(Settings, path)
    path.write_bytes(b"\xef\xbb\xbfsteps = 1\n")  # as Windows editors begin a file
    assert config.load(Settings, path).steps == 1


@pytest.mark.parametrize("name", ["inner.names.1", "inner.names.a", "inner.names.a.b", "inner.names.-1"])
def test_an_override_of_no_entry_of_a_list_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 'steps = 1\n[inner]\nnames = ["x"]\n')
    with pytest.raises(ConfigError, match="is no place in the list; expected 0 to 0"):
        config.load(Settings, path, [f"{name}=y"])
