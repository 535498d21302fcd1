"""Structure of the tests' own tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parent


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere; `from a import b` may mean a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_a_test(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == TESTS.name and (parts[-1].startswith("test_") or parts[-1] == "conftest")


def test_nothing_is_imported_from_tests() -> None:
    """Code that several tests use is in tests/rigs."""
    taken = {
        str(path.relative_to(TESTS)): module
        for path in TESTS.rglob("*.py")
        for module in imports(path)
        if is_a_test(module)
    }
    assert taken == {}, "move what is shared to tests/rigs"


def test_every_rig_has_users(pytestconfig: pytest.Config) -> None:
    used = {module for path in TESTS.rglob("*.py") for module in imports(path)}
    # What a fuzzed target in Python does is imported by its name (tests.rigs.fuzz.scripted).
    targets = (TESTS / "rigs/fuzz/targets.py").read_text()
    for path in (TESTS / "rigs").rglob("[!_]*.py"):
        module = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
        if path.name == "harness.py":
            assert f'"{path.parent.name.replace("_", "-")}"' in targets, module
            continue
        assert module in used or pytestconfig.pluginmanager.has_plugin(module), module
