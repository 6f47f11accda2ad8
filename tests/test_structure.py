"""How the code is cut: no cycle, no long file or function, one meaning a class name, one home a default.

Each list of exceptions only shrinks: an entry that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from nemotron4.cli.commands import COMMANDS
from tests.modules import TESTED_IN

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "nemotron4"
MAX_STEPS = 3  # imports from a test file to the module that it is said to test
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
CYCLES: set[str] = set()
CLASS_NAMES_WITH_TWO_MEANINGS: set[str] = set()
DEFAULTS_IN_TWO_PLACES: set[str] = set()

# What these write is not the dataclass's fields: figures for people, or another program's format.
JSON_BY_HAND = {
    "Accounting",
    "CheckpointDescription",
    "CostEstimate",
    "Examination",
    "HardwarePlan",
    "ItemAnswer",
    "ItemResponse",
    "LoggedSample",
    "Message",
    "PairedComparison",
    "Record",
    "ReplayResult",
    "Result",
    "Reviewed",
    "RewardSample",
    "Screening",
    "StageAccounting",
    "StepRecord",
}

TREES = {
    path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(path): len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert {path for path, length in lengths.items() if length > MAX_FILE_LINES} == LONG_FILES


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        node.name
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and _length(node) > MAX_FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS


def _length(function: Function) -> int:
    """Lines of the whole; of a command those after its options and its help, which declare."""
    arguments = function.args
    options = [a for a in (*arguments.args, *arguments.kwonlyargs) if a.annotation is not None]
    is_command = any("typer." in ast.unparse(a.annotation) for a in options if a.annotation is not None)
    has_help = isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant)
    start = function.body[1].lineno if is_command and has_help else function.lineno
    return (function.end_lineno or 0) - start + 1


def test_a_class_name_has_one_meaning() -> None:
    homes: dict[str, set[Path]] = defaultdict(set)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(path)
    assert {name for name, paths in homes.items() if len(paths) > 1} == CLASS_NAMES_WITH_TWO_MEANINGS


def test_dataclasses_have_one_writer_and_one_reader() -> None:
    """``json_form.py`` writes and reads fields; a method of its own only where the form is not the fields."""
    by_hand = {
        owner.name
        for path, tree in TREES.items()
        if path != Path("json_form.py")
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        and (owner.decorator_list or owner.name == "Record")
        and any(isinstance(m, Function) and m.name in ("to_json", "from_json", "of_row") for m in owner.body)
    }
    assert by_hand == JSON_BY_HAND
    assert not [path for path, tree in TREES.items() if "asdict" in ast.dump(tree)]


def test_no_modules_import_each_other() -> None:
    """Imports inside functions and for type checkers count too: they hide a cycle, they do not mend it."""
    graph = {_module(path): set(_imports(tree)) for path, tree in TREES.items()}
    assert {", ".join(sorted(cycle)) for cycle in _cycles(graph)} == CYCLES


def test_a_default_of_the_command_line_comes_from_the_settings() -> None:
    """An option with a literal default that a field of the same name in some settings class has too."""
    in_settings = {
        (field.target.id, ast.unparse(field.value))
        for path, tree in TREES.items()
        if path.parts[0] != "cli"
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        and any("dataclass" in ast.unparse(d) for d in owner.decorator_list)
        for field in owner.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_fact(field.value)
    }
    twice = {
        f"{node.name}.{name}"
        for path, tree in TREES.items()
        if path.parts[0] == "cli"
        for node in ast.walk(tree)
        if isinstance(node, Function)
        for name, value in _option_defaults(node)
        if _is_fact(value) and (name, ast.unparse(value)) in in_settings
    }
    assert twice == DEFAULTS_IN_TWO_PLACES


def _is_fact(value: ast.expr | None) -> bool:
    """None, a truth value and an empty text only say that an option is absent."""
    return (
        isinstance(value, ast.Constant)
        and value.value not in (None, "")
        and not isinstance(value.value, bool)
    )


def _option_defaults(function: Function) -> Iterator[tuple[str, ast.expr]]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
    pairs += [
        (a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None
    ]
    for argument, default in pairs:
        if argument.annotation is not None and "Annotated" in ast.unparse(argument.annotation):
            yield argument.arg, default


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path) for path in TREES}


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemotron4."):
            base = str(node.module).removeprefix("nemotron4.")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.ImportFrom) and node.module == "nemotron4":
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("nemotron4.") for alias in node.names)


def _cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reached = {start: _reachable(graph, start) for start in graph}
    groups = {
        frozenset({other for other in reached[start] if start in reached.get(other, ())})
        for start in graph
        if start in reached[start]
    }
    return [set(group) for group in groups]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module in graph and module not in found:
            found.add(module)
            waiting.extend(graph[module])
    return found


def test_each_module_has_a_test_file() -> None:
    """Of its name, or the one that ``tests/modules.py`` lists, which uses the module within three imports."""
    listed = {module: file for file, modules in TESTED_IN.items() for module in modules.split()}
    own = {module for module in MODULES if (TESTS / _test_file(module)).exists()}
    modules = {_module(path) for path in TREES if path.name not in ("__init__.py", "__main__.py")}
    assert not modules - own - listed.keys(), "name the test file of these in tests/modules.py"
    assert not listed.keys() & own, "modules with a test file of their own"
    assert not listed.keys() - modules, "modules that are gone"
    far = [
        f"{module} from {file}"
        for module, file in listed.items()
        if module not in _within(_tested(TESTS / file), MAX_STEPS)
    ]
    assert not far, "modules that their test file does not use"


def _test_file(module: str) -> Path:
    *folders, name = module.split(".")
    return Path(*folders, f"test_{name}.py")


def _tested(file: Path) -> set[str]:
    """What a test file uses: its imports, those of the helpers it shares, and the commands that it names."""
    found: set[str] = set()
    files = [file, file.with_name("conftest.py")]
    for each in files:
        if not each.exists():
            continue
        tree = ast.parse(each.read_text(encoding="utf-8"))
        found.update(_imports(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
                helpers = [TESTS.parent / f"{name.replace('.', '/')}.py" for name in names]
                files += [helper for helper in helpers if helper not in files]
            elif isinstance(node, ast.Constant) and str(node.value).endswith(".py"):
                files.append(each.parent / str(node.value))  # a program that the test starts
            elif isinstance(node, ast.Constant) and node.value in COMMANDS:
                found.add(COMMANDS[node.value].target.partition(":")[0].removeprefix("nemotron4."))
    return found


def _within(start: set[str], steps: int) -> set[str]:
    """What the modules reach by so many imports."""
    reached = set(start)
    for _ in range(steps):
        reached |= {other for module in reached for other in _uses().get(module, ())}
    return reached


@functools.cache
def _uses() -> dict[str, set[str]]:
    """Imports, a stage by ``training.stage``, and a program by the name of its file."""
    uses = {_module(path): {*_imports(tree)} for path, tree in TREES.items()}
    uses["nemotron4"] = uses["__init__"]
    uses["training.stage"] |= {module for module in MODULES if module.startswith("training.stages.")}
    for path, tree in TREES.items():
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        uses[_module(path)] |= {
            _module(other) for other in TREES if other.parent == path.parent and other.name in texts
        }
    return uses
