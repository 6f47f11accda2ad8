"""Imports go down through the layers of docs/architecture.md, and only down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemotron4"
BASE = {
    "engine",
    "errors",
    "json_form",
    "records",
    "row_files",
    "config",
    "runs",
    "progress",
    "report",
    "plots",
    "web",
    "recipe",
    "model_card",
}
# part -> the parts it may import; every part may import base and itself.
MAY_IMPORT: dict[str, set[str]] = {
    "engine": set(),
    "errors": set(),
    "json_form": set(),
    "records": set(),
    "row_files": set(),
    "config": set(),
    "runs": set(),
    "progress": set(),
    "report": set(),
    "plots": set(),
    "web": set(),
    "recipe": set(),
    "model_card": set(),
    "model": set(),
    "text": set(),
    "grading": set(),
    "client": {"text"},
    "cluster": set(),
    "checkpoint": {"model", "text"},
    "inference": {"checkpoint", "model", "text"},
    "training": {"inference", "checkpoint", "model", "text", "grading", "client"},
    "annotation": {"client", "grading", "text"},
    "synth": {"annotation", "client", "grading", "text"},
    "evaluation": {"annotation", "client", "grading", "text"},
    "redteam": {"annotation", "client", "grading", "text"},
    "server": {"inference", "text", "client"},
}
NEVER_TORCH = {
    "text",
    "grading",
    "client",
    "cluster",
    "annotation",
    "synth",
    "evaluation",
    "redteam",
    "cli",
    *BASE,
}


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    return "cli" if part == "__main__" else part


def _imported_modules(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at module level and at run time) of every absolute import in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, is_module_level: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, is_module_level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                module = child.module or ""
                if module == "nemotron4":
                    found.extend(
                        (f"nemotron4.{alias.name}", child.lineno, is_module_level) for alias in child.names
                    )
                else:
                    found.append((module, child.lineno, is_module_level))
            is_type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, is_module_level and not is_function and not is_type_checking)

    visit(tree, True)
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = _part(path)
    if part == "cli":
        allowed = None
    else:
        assert part in MAY_IMPORT, (
            f"{part} is not in the table of layers: add it to the test and to docs/architecture.md"
        )
        allowed = MAY_IMPORT[part] | BASE | {part}
    for module, line, is_module_level in _imported_modules(path):
        top, *rest = module.split(".")
        if top == "torch" and part in NEVER_TORCH:
            assert part == "cli", f"{path}:{line}: {part} must not import torch"
            assert not is_module_level, f"{path}:{line}: import torch inside the command"
        if top == "nemotron4" and rest and allowed is not None and not rest[0].startswith("__"):
            assert rest[0] in allowed, f"{path}:{line}: {part} must not import {module}"
