"""The documentation says what the code does: commands, options, files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from nemotron4.cli.commands import COMMANDS
from nemotron4.cli.main import main

ROOT = Path(__file__).parents[1]
MAX_WORDS = 33_860  # of README and docs, a third less than at their largest: say what makes it grow
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def _make_cli() -> object:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_cli = _make_cli()


def _code(page: Path) -> str:
    """Fenced and indented blocks and `code spans` of a page, with continued lines joined."""
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    parts += re.findall(r"^    (.*)$", rest, flags=re.MULTILINE)
    parts += re.findall(r"`([^`\n]+)`", rest)
    return "\n".join(parts).replace("\\\n", " ")


def _documented_commands() -> list[tuple[str, str]]:
    """(page, command line) of every ``nemotron4 COMMAND ...`` in a page's code, except the generated page."""
    found = []
    for page in PAGES:
        if page == make_cli.PAGE or page.name == "CHANGELOG.md":
            continue
        for line in _code(page).splitlines():
            match = re.match(r"^\s*(?:\$ )?(?:[A-Z_0-9]+=\S+ )*nemotron4 (\S.*)$", line)
            if match and not match[1].startswith(("|", ".")):
                found.append((str(page.relative_to(ROOT)), match[1]))
    return found


def _words(line: str) -> list[str]:
    """The words of one shell command, up to a comment, a pipe or a redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            break
        words.append(word)
    return words


def _sub_command(words: list[str]) -> tuple[str, ...]:
    """The longest run of leading words that names a command."""
    known = set(make_cli.command_paths(words[0]))
    path: tuple[str, ...] = ()
    for word in words:
        if (*path, word) not in known:
            break
        path = (*path, word)
    return path


@pytest.mark.parametrize(("page", "line"), _documented_commands())
def test_documented_command_exists_with_its_options(
    page: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(line)
    if words[0] in ("--help", "--version", "COMMAND"):
        return
    assert words[0] in COMMANDS, f"{page}: there is no command `nemotron4 {words[0]}`"
    path = _sub_command(words)
    assert main([*path, "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    for word in words[len(path) :]:
        if word.startswith("-") and word != "-":
            name = word.split("=")[0]
            assert name in options, f"{page}: `nemotron4 {' '.join(path)}` has no option {name}"


def test_page_of_the_command_line_is_what_help_prints() -> None:
    assert make_cli.PAGE.read_text(encoding="utf-8") == make_cli.page(), (
        "run: .venv/bin/python docs/make_cli.py"
    )


def _file_map() -> set[str]:
    """Paths of the README's file map, folders with a slash at the end."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## File map", 1)[1].split("```")[1]
    paths: set[str] = set()
    folder = ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            paths.add(name)
        else:
            paths.add(folder + name)
    return paths


def _parts() -> set[str]:
    """What the file map must list: the folders of the repository and the parts of the package."""
    hidden = (".", "_")
    top = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(hidden)}
    top -= {"build/", "dist/", "runs/"}
    package = ROOT / "nemotron4"
    parts = [
        path for path in package.iterdir() if not path.name.startswith(hidden) and path.suffix != ".typed"
    ]
    inner = {f"nemotron4/{path.name}{'/' if path.is_dir() else ''}" for path in parts}
    return {path for path in top | inner if not path.endswith("/") or _holds_files(ROOT / path)}


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() and path.suffix != ".pyc" for path in folder.rglob("*"))


def test_file_map_lists_exactly_what_is_there() -> None:
    assert _file_map() == _parts()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"


def test_the_architecture_names_files_that_are_there_and_short_journeys() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|cpp|css))`", text)
    tables = text.split("## Parts", 1)[1]
    in_journeys = [
        name for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|cpp))`", text) if not name.startswith("tests/")
    ]
    for name in in_journeys:
        assert (ROOT / "nemotron4" / name).is_file(), f"docs/architecture.md names {name}"
    first = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", tables, re.M)
    assert len(first) >= 10
    for row in first:
        assert (ROOT / "nemotron4" / row[0] / row[1]).is_file(), row
    assert len(named) > 40
    journeys = text.split("## Journeys", 1)[1].split("## Layers")[0].split("\n**")[1:]
    assert len(journeys) == 5
    for journey in journeys:
        assert len(set(re.findall(r"`[\w/]+\.(?:py|cpp)`", journey))) <= 10, journey.splitlines()[0]


def test_the_documentation_does_not_grow_by_itself() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    assert words <= MAX_WORDS, f"{words} words: say a thing once, on one page, and link to it"
