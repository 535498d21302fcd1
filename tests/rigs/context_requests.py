"""The patch's calls made by hand, so that each argument can be wrong."""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pykvm.elisa import calls
from pykvm.kernel import uapi
from pykvm.kvm import Kvm, Vcpu, Vm, ffi, lib
from pykvm.kvm.handle import Handle

PAGE = 4096
USER, LIST, EPTP = (
    uapi.lib.KVM_ELISA_PAGE_USER,
    uapi.lib.KVM_ELISA_PAGE_LIST,
    uapi.lib.KVM_ELISA_PAGE_EPTP,
)
R, W, X = 1, 2, 4  # SDM vol. 3C, tables 29-1 and 29-6: bits 0 to 2 of every EPT entry
WB = 6 << 3  # memory type of a leaf
LARGE = 1 << 7
# struct kvm_elisa_create: nr_tables, nr_pages, tables, pages, flags, nr_parts, gva, size, parts,
# reserved
CREATE = struct.Struct("<IIQQIIQQQQ")
MEMORY = struct.Struct("<QQQQ")  # struct kvm_elisa_memory: addr, size, reserved[2]


@dataclass(frozen=True)
class Machine:
    """A VM with one vCPU that never runs, and three pages of memory at `address`."""

    vm: Vm
    vcpu: Vcpu
    address: int


class Memory:
    """Anonymous memory of this process; `with` yields its address."""

    def __init__(self, pages: int) -> None:
        self._map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(first)
        del first

    def __enter__(self) -> int:
        return self.address

    def __exit__(self, *_: object) -> None:
        self._map.close()


@contextmanager
def new_machine(kvm: Kvm, *, contexts: int = 0, pages: int = 0) -> Iterator[Machine]:
    """Create a VM with contexts.

    Args:
        contexts: limit on its contexts; 0 for the kernel's default.
        pages: limit on its pages; 0 for the kernel's default.
    """
    with Memory(3) as address, kvm.create_vm() as vm:
        calls.enable_contexts(vm, contexts=contexts, pages=pages)
        yield Machine(vm, vm.create_vcpu(0), address)


def table(**entries: int) -> bytes:
    """Return one table: ``table(e0=..., e511=...)``."""
    words = [0] * 512
    for name, value in entries.items():
        words[int(name[1:])] = value
    return struct.pack("<512Q", *words)


def branch(index: int, access: int = R | W | X) -> int:
    return index << 12 | access


def leaf(index: int = 0, access: int = R | W, kind: int = WB) -> int:
    return index << 12 | access | kind


def part_leaf(part: int = 0, access: int = R | W, kind: int = WB) -> int:
    """Return the entry of level 3 that stands for a part of registered memory."""
    return (part + 1) << 30 | access | kind | LARGE


def chain(*leaves: int) -> list[bytes]:
    """Return four tables, each pointing to the next; the last one holds `leaves`."""
    last = table(**{f"e{number}": entry for number, entry in enumerate(leaves)})
    return [table(e0=branch(1)), table(e0=branch(2)), table(e0=branch(3)), last]


@dataclass(frozen=True)
class Request:
    """KVM_ELISA_CREATE_CONTEXT; each of its arguments can be wrong.

    Attributes:
        tables: contents of the tables, 4 KiB each.
        pages: (addr, kind, ref) of each page.
        parts: (fd, index) of each part of registered memory.
        fields: members of struct kvm_elisa_create that replace the right ones.
    """

    tables: list[bytes]
    pages: list[tuple[int, int, int]]
    parts: list[tuple[int, int]] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)

    def send(self, vm: Vm) -> int:
        """Make the call; return the descriptor or -errno."""
        request, keep = self.packed()
        result = call(vm, "KVM_ELISA_CREATE_CONTEXT", request)
        del keep
        return result

    def packed(self) -> tuple[Any, tuple[Any, ...]]:
        """Return struct kvm_elisa_create, and the buffers that must outlive it."""
        tables = ffi.from_buffer(b"".join(self.tables))
        pages = uapi.ffi.new("struct kvm_elisa_page[]", len(self.pages))
        for slot, (addr, kind, ref) in enumerate(self.pages):
            pages[slot].addr, pages[slot].kind, pages[slot].ref = addr, kind, ref
        parts = uapi.ffi.new("struct kvm_elisa_part[]", len(self.parts))
        for slot, (fd, index) in enumerate(self.parts):
            parts[slot].fd, parts[slot].index = fd, index
        values = {
            "nr_tables": len(self.tables),
            "nr_pages": len(self.pages),
            "tables": int(ffi.cast("uintptr_t", tables)),
            "pages": int(ffi.cast("uintptr_t", pages)),
            **{"flags": 0, "nr_parts": len(self.parts), "gva": 1 << 40, "size": PAGE},
            "parts": int(ffi.cast("uintptr_t", parts)) if self.parts else 0,
            "reserved": 0,
            **self.fields,
        }
        return ffi.from_buffer(CREATE.pack(*values.values())), (tables, pages, parts)


def raw(fd: int, name: str, argument: Any = 0) -> int:
    """Make an ioctl without any check; return its result or -errno."""
    word = argument if isinstance(argument, int) else int(ffi.cast("uintptr_t", argument))
    number = calls.CALLS[name].number if name in calls.CALLS else getattr(lib, name)
    return int(lib.pykvm_ioctl(fd, number, word))


def call(handle: Handle, name: str, argument: Any) -> int:
    return raw(handle.fileno(), name, argument)


def set_slot(vcpu: Vcpu, slot: int, fd: int) -> int:
    request = uapi.ffi.new("struct kvm_elisa_slot *")
    request.slot, request.fd = slot, fd
    return call(vcpu, "KVM_ELISA_SET_SLOT", request)


def good(machine: Machine, *leaves: int) -> Request:
    """Return a request for a context of three user pages, the list page and the tables' entries."""
    pages = [(machine.address + n * PAGE, USER, 0) for n in range(3)]
    return Request(chain(*(leaves or (leaf(0), leaf(1, R | X), leaf(3)))), [*pages, (0, LIST, 0)])


def register(kvm: int, address: int, size: int, *reserved: int) -> int:
    """Call KVM_ELISA_REGISTER_MEMORY on a descriptor; return the memory's descriptor or -errno."""
    request = MEMORY.pack(address, size, *(*reserved, 0, 0)[:2])
    return raw(kvm, "KVM_ELISA_REGISTER_MEMORY", ffi.from_buffer(request))


def with_part(request: Request, fd: int, *, index: int = 0, entry: int | None = None) -> Request:
    """Return the request with a part of registered memory at entry 7 of its level-3 table.

    Args:
        index: number of the part in the memory.
        entry: what the table holds there; by default what stands for the part.
    """
    content = bytearray(request.tables[1])
    struct.pack_into("<Q", content, 7 * 8, part_leaf() if entry is None else entry)
    tables = [request.tables[0], bytes(content), *request.tables[2:]]
    return replace(request, tables=tables, parts=[(fd, index)])


def revoke(vm: Vm, vcpu_id: int, slot: int) -> int:
    request = uapi.ffi.new("struct kvm_elisa_revoke *", {"vcpu": vcpu_id, "slot": slot})
    return call(vm, "KVM_ELISA_REVOKE", request)


GOOD_PAGES = 7
"""Pages that a VM is charged for a context of `good`: four tables and three user pages."""


def sends(machine: Machine, count: int) -> list[int]:
    return [good(machine).send(machine.vm) for _ in range(count)]


def close(*files: int) -> None:
    for file in files:
        os.close(file)
