"""Every package uses only those below it, and no modules import each other in a circle.

Imports for the type checker alone count, and so do those inside functions: any knowledge of another
module makes a layer.
"""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]

LAYERS = (
    *("__main__", "cli", "doctor", "measure", "verify", "testbed"),
    *("machine", "snapshot", "switch", "elisa", "devices", "network"),
    *("inspection", "control", "kernel", "toolchain", "sandbox", "host"),
    *("memory", "paging", "kvm"),
    *("cache", "closeable", "extras", "version"),
    *("resources", "errors", "sizes"),
)
"""Packages and modules of pykvm, from the command line down to the ground."""

LAYERS_OF_KVM = (
    *("system", "vm", "vcpu", "x86", "stats"),
    *("memory_slots", "interrupts", "handlers", "device", "handle"),
    *("native", "ioctls", "errors", "exits"),
)
"""Inside pykvm.kvm: the handles, what they are made of, C, and what imports nothing."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "pykvm").rglob("*.py"))}


def imports(source: str, modules: set[str]) -> set[str]:
    """Return those of `modules` that a source imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else str(node.module))
    return found & modules


GRAPH = {name: imports(path.read_text(), set(MODULES)) - {name} for name, path in MODULES.items()}


def upward(
    graph: dict[str, set[str]], package: str, layers: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return the imports between parts of a package that go against its layers."""

    def rank(module: str) -> int | None:
        name = module.removeprefix(f"{package}.").partition(".")[0]
        if module == package or not module.startswith(f"{package}."):
            return None
        assert name in layers, f"{module} has no layer: give {name} its place in {__file__}"
        return layers.index(name)

    ranks = {module: rank(module) for module in graph}
    return [
        (module, other)
        for module, others in graph.items()
        for other in sorted(others)
        if (here := ranks[module]) is not None
        and (there := ranks[other]) is not None
        and there < here
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle; empty if there are none."""
    left = {module: set(others) for module, others in graph.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    if not left:
        return []
    path = [min(left)]
    while len(set(path)) == len(path):
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :]


def test_packages_use_those_below_them() -> None:
    assert upward(GRAPH, "pykvm", LAYERS) == []


def test_the_layers_of_kvm() -> None:
    assert upward(GRAPH, "pykvm.kvm", LAYERS_OF_KVM) == []


def test_there_are_no_circles() -> None:
    assert circle(GRAPH) == []


def test_stock_kvm_knows_nothing_of_the_patch() -> None:
    texts = [path for path in (ROOT / "pykvm/kvm").rglob("*") if path.suffix in (".py", ".c", ".h")]
    own = [path for path in texts if path.name != "_kvm.c"]  # cffi generates it
    assert len(own) > 20
    assert [path.name for path in own if "KVM_ELISA" in path.read_text().upper()] == []


# ---- controls -----------------------------------------------------------------------------------


def test_an_import_upwards_is_found() -> None:
    graph = {"p.low": {"p.high.part"}, "p.high.part": {"p.high"}, "p.high": set(), "p": {"p.low"}}
    assert upward(graph, "p", ("high", "low")) == [("p.low", "p.high.part")]


def test_a_package_without_a_layer_is_found() -> None:
    with pytest.raises(AssertionError, match="give new its place"):
        upward({"p.new": set()}, "p", ("old",))


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": {"b"}, "e": {"a"}}
    assert sorted(set(circle(graph))) == ["b", "c", "d"]
    assert circle({"a": {"b"}, "b": set()}) == []


def test_imports_of_every_kind_are_seen() -> None:
    source = """
import p.one
from p import two, name
from p.three import name
def later():
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        from p.four import name
"""
    modules = {"p", "p.one", "p.two", "p.three", "p.four", "p.five"}
    assert imports(source, modules) == modules - {"p.five"}
