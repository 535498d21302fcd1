"""Every example in a docstring runs and gives the results in its comments.

An example follows a line that ends in two colons. `_GIVEN` makes the objects that the reader is
assumed to have (a vCPU, a guest).
"""

import ast
import contextlib
import io
import mmap
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cffi
import pytest

import pykvm.elisa
import pykvm.kvm
from pykvm import sizes
from pykvm.elisa.objects import SharedObject
from pykvm.kvm import Kvm
from pykvm.machine.bare.build import GuestProgram
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure import programs
from pykvm.memory import guest_memory
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging import entries, reach, tables, walk
from pykvm.paging.entries import SIZE_2M, Access, X86Entry
from pykvm.paging.tables import PageTables, TableAddresses, TableNumbers
from pykvm.resources import GUEST_SOURCES, PACKAGE

Given = dict[str, Any]

_HALT = b"\xf4"


def _example(path: Path) -> str:
    """Return the example in the docstrings of a module and its classes; empty if there is none."""
    source = path.read_text()
    if "::\n\n" not in source:  # parsing is slow on the emulated host
        return ""
    found = []
    module = ast.parse(source)
    documented: list[ast.Module | ast.ClassDef] = [module]
    documented += [node for node in module.body if isinstance(node, ast.ClassDef)]
    for node in documented:
        text = ast.get_docstring(node) or ""
        for block in re.findall(r"::\n\n((?: {4,}.*\n|\n)+)", f"{text}\n"):
            code = textwrap.dedent(block)
            with contextlib.suppress(SyntaxError):  # a command line: test_documented_commands
                ast.parse(code)
                found.append(code)
    assert len(found) <= 1, f"{path} has several examples: tell them apart here"
    return found[0] if found else ""


def _path(module: str) -> Path:
    path = PACKAGE.parent / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@contextlib.contextmanager
def _nothing() -> Iterator[Given]:
    yield {}


@contextlib.contextmanager
def _memory() -> Iterator[Given]:
    with GuestMemory.create(2 * sizes.MIB) as memory:
        file = MemoryFile("tables", sizes.MIB)
        memory.add(Region(file, 0x4000100000))
        file.close()
        yield {"memory": memory}


@contextlib.contextmanager
def _guest_tables() -> Iterator[Given]:
    with GuestMemory.create(4 * sizes.MIB) as memory:
        built = PageTables(X86Entry, TableAddresses(0x1000, 0x10000))
        everything = Access.READ | Access.WRITE | Access.EXECUTE
        built.map(0, 0, 4 * sizes.MIB, everything, max_page=SIZE_2M)
        built.store(memory.write)
        yield {"memory": memory, "gva": 0x100000}


@contextlib.contextmanager
def _gate() -> Iterator[Given]:
    """Create a context with one page of code and one of data, which refer to nothing."""
    ept = PageTables(entries.EptEntry, TableNumbers())
    ept.map_pages(0x1000, 0, 1, Access.READ | Access.EXECUTE)
    ept.map_pages(0x2000, 1, 1, Access.READ)
    page = memoryview(bytes(4096)).cast("Q")
    yield {"private_gpas": [0x1000, 0x2000], "gate_ept": ept, "read_page": lambda target: page}


@contextlib.contextmanager
def _vm() -> Iterator[Given]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield {"vm": vm}


@contextlib.contextmanager
def _vcpu() -> Iterator[Given]:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        yield {"vcpu": vcpu}


@contextlib.contextmanager
def _page_of_code() -> Iterator[Given]:
    with mmap.mmap(-1, 4096) as page:
        page[: len(_HALT)] = _HALT
        ffi = cffi.FFI()
        buffer = ffi.from_buffer(page)
        yield {"address": int(ffi.cast("uintptr_t", buffer))}
        ffi.release(buffer)


@contextlib.contextmanager
def _guest() -> Iterator[Given]:
    program = GuestProgram(PACKAGE.parent / "examples" / "hello.c")
    with Kvm() as kvm, BareGuest(kvm, program) as guest:
        yield {"guest": guest}


_UNIT: dict[str, Callable[[], contextlib.AbstractContextManager[Given]]] = {
    "pykvm.elisa.protections": _nothing,
    "pykvm.paging.reach": _gate,
    "pykvm.paging.tables": _memory,
    "pykvm.paging.walk": _guest_tables,
}
_KVM: dict[str, Callable[[], contextlib.AbstractContextManager[Given]]] = {
    "pykvm.kvm": _page_of_code,
    "pykvm.kvm.system": _nothing,
    "pykvm.kvm.x86.vcpu": _vcpu,
    "pykvm.machine.bare.guest": _nothing,
    "pykvm.memory.guest_memory": _vm,
}
_ELISA: dict[str, Callable[[], contextlib.AbstractContextManager[Given]]] = {
    "pykvm.elisa.objects": _guest,
}


def _run(name: str, given: Given) -> None:
    code = _example(_path(name))
    names: Given = {}
    for module in (
        *(pykvm.kvm, pykvm.elisa, programs, guest_memory, sizes, entries, tables, walk, reach),
    ):
        names.update(vars(module))
    names.update(BareGuest=BareGuest, MemoryFile=MemoryFile, Region=Region)
    names.update(SharedObject=SharedObject, **given)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), names)
    said = re.findall(r"^ *print\(.*\) +# (.*)$", code, re.MULTILINE)
    if said:
        assert printed.getvalue().splitlines() == said


@pytest.mark.unit
def test_each_example_has_its_tier() -> None:
    known = {_path(name) for name in (*_UNIT, *_KVM, *_ELISA)}
    assert {path for path in PACKAGE.rglob("*.py") if _example(path)} == known


@pytest.mark.unit
@pytest.mark.parametrize("name", _UNIT)
def test_example(name: str) -> None:
    with _UNIT[name]() as given:
        _run(name, given)


@pytest.mark.kvm
@pytest.mark.parametrize("name", _KVM)
def test_example_with_kvm(name: str) -> None:
    with _KVM[name]() as given:
        _run(name, given)


@pytest.mark.elisa
@pytest.mark.parametrize("name", _ELISA)
def test_example_with_the_patched_kvm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GUEST_SOURCES / "objects")
    with _ELISA[name]() as given:
        _run(name, given)
