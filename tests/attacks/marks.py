"""Threats that the marks of each test name, read from the sources without importing them."""

import ast
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


def marked(kind: str) -> dict[str, set[str]]:
    """Return the rows that the marks of each test name, by path::function.

    Args:
        kind: "attack" or "control".
    """
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            rows = {row for mark in node.decorator_list for row in _rows(mark, kind)}
            if rows:
                found[f"{path.relative_to(ROOT)}::{node.name}"] = rows
    return found


def _rows(mark: ast.expr, kind: str) -> list[str]:
    if not isinstance(mark, ast.Call) or ast.unparse(mark.func) != f"pytest.mark.{kind}":
        return []
    values = [argument.value for argument in mark.args if isinstance(argument, ast.Constant)]
    return [value for value in values if isinstance(value, str)]
