"""A guest of four pages and contexts of four, for tests that create and destroy many of them.

All code is in one page at the same guest address everywhere: in the guest's own page, in an
object's, in a gate's, and in a sub context's. The rest of each page is HLT, so that a vCPU that
arrives anywhere else stops there. There is no stack and no handler: an exception ends in
KVM_EXIT_SHUTDOWN.

These contexts protect nothing: they share page tables with the guest. They exercise the kernel's
part alone.
"""

import ctypes
import errno
import functools
import mmap
import os
import signal
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pykvm.elisa.hidden_features import without_hidden_features
from pykvm.kernel import uapi
from pykvm.kvm import Kvm, ffi, find_leaf, lib
from pykvm.kvm.x86.cpuid import pack_cpuid
from tests.rigs.context_requests import (
    EPTP,
    LIST,
    PAGE,
    USER,
    R,
    Request,
    W,
    X,
    chain,
    leaf,
    raw,
)

CODE_GVA: Final = 3 * PAGE
FLAGS_GVA: Final = 8 * PAGE
LIST_GVA: Final = 6 * PAGE
EPTP_GVA: Final = 5 * PAGE

# Pages of an `Arena`; the first four are the guest's memory, at the same GPA.
ROOT, _LEVEL3, _LEVEL2, CODE, OBJECT, GATE, SUB, DATA = range(8)
GUEST_PAGES: Final = 4
ARENA_PAGES: Final = 8

_HLT: Final = b"\xf4"
_TO_SLOT: Final = bytes.fromhex("31C0 89F9 0F01D4")  # xor eax,eax; mov ecx,edi; vmfunc
_WHILE: Final = bytes.fromhex("833E00 75FB")  # cmp dword [rsi],0; jne the cmp
_HOME: Final = bytes.fromhex("31C0 31C9 0F01D4")  # xor eax,eax; xor ecx,ecx; vmfunc
# mov rax,[EPTP]; mov [list + 8],rax; xor eax,eax; mov ecx,1; vmfunc
_TO_SUB: Final = (
    bytes.fromhex("488B0425 00500000 48890425 08600000 31C0 B901000000") + _TO_SLOT[-3:]
)
_CLEAR: Final = bytes.fromhex("48C70425 08600000 00000000")  # mov qword [list + 8],0

INNER: Final = len(_TO_SLOT)
"""Offset of the first instruction after the guest's VMFUNC."""
BEHIND_OBJECT: Final = INNER + len(_WHILE + _HOME)
_SUB: Final = INNER + len(_TO_SUB)
BEHIND_SUB: Final = _SUB + len(_CLEAR + _WHILE + _HOME)
LOOPS: Final = frozenset(
    CODE_GVA + start + offset for start in (INNER, _SUB + len(_CLEAR)) for offset in (0, 3)
)
"""Addresses of the instructions that loop while the word that RSI points to is not 0."""


def _page(start: int = 0, code: bytes = b"") -> bytes:
    return (_HLT * start + code).ljust(PAGE, _HLT)


_ACCESSED_TABLE: Final = 0x23  # present, writable, accessed: SDM vol. 3A, table 4-15
_LARGE_PAGE: Final = 0xE3  # also dirty, 2 MiB

CONTENTS: Final = b"".join(
    [
        *(
            struct.pack("<Q", entry).ljust(PAGE, b"\0")
            for entry in (_LEVEL3 * PAGE | _ACCESSED_TABLE, _LEVEL2 * PAGE | _ACCESSED_TABLE)
        ),
        struct.pack("<Q", _LARGE_PAGE).ljust(PAGE, b"\0"),
        _page(0, _TO_SLOT),
        _page(INNER, _WHILE + _HOME),
        _page(INNER, _TO_SUB),
        _page(_SUB, _CLEAR + _WHILE + _HOME),
    ]
)


class Kind(Enum):
    """Kind of a context.

    OBJECT returns by itself. GATE leads to another context. SUB returns if entered through a gate;
    its first instruction otherwise is HLT. BARE maps one page of data, so that the next instruction
    fetch is an EPT violation.
    """

    OBJECT = "object"
    GATE = "gate"
    SUB = "sub"
    BARE = "bare"


_FLAGS_MEMORY: Final = mmap.mmap(-1, PAGE)
_flags: Final = (ctypes.c_uint32 * (PAGE // 4)).from_buffer(_FLAGS_MEMORY)
FLAGS: Final = ctypes.addressof(_flags)
"""A page of a word for each vCPU, by its descriptor: whether it stays in a context with a loop."""

TABLES: Final = 4
"""Table pages of each context."""

USER_PAGES: Final = {Kind.OBJECT: 5, Kind.GATE: 4, Kind.SUB: 5, Kind.BARE: 1}
"""Pages that each kind pins."""

_COMMON = ((0, leaf(0, R)), (1, leaf(1, R)), (2, leaf(2, R)), (3, leaf(3, R | X)))
_LEAVES: Final = {
    Kind.OBJECT: (*_COMMON, (8, leaf(4, R))),
    Kind.GATE: (*_COMMON, (5, leaf(4, R)), (6, leaf(5, R | W))),
    Kind.SUB: (*_COMMON, (6, leaf(4, R | W)), (8, leaf(5, R))),
    Kind.BARE: ((7, leaf(0, R | W)),),
}


@functools.cache
def _tables(kind: Kind) -> tuple[bytes, ...]:
    entries = [0] * 9
    for gpa_page, entry in _LEAVES[kind]:
        entries[gpa_page] = entry
    return tuple(chain(*entries))


def context_request(kind: Kind, arena: int, *, vcpu_id: int = 0, target: int = -1) -> Request:
    """Return the request for a context.

    Args:
        arena: address of the arena.
        vcpu_id: vCPU whose list a GATE and a SUB write to.
        target: descriptor of the context to which a GATE leads.
    """
    user = [(arena + page * PAGE, USER, 0) for page in (ROOT, _LEVEL3, _LEVEL2)]
    list_page, eptp = (0, LIST, vcpu_id), (0, EPTP, target)
    flags = (FLAGS, USER, 0)
    pages = {
        Kind.OBJECT: [*user, (arena + OBJECT * PAGE, USER, 0), flags],
        Kind.GATE: [*user, (arena + GATE * PAGE, USER, 0), eptp, list_page],
        Kind.SUB: [*user, (arena + SUB * PAGE, USER, 0), list_page, flags],
        Kind.BARE: [(arena + DATA * PAGE, USER, 0)],
    }
    return Request(list(_tables(kind)), pages[kind])


# ---- memory --------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED: Final = 0x10


class Arena:
    """Eight pages of this process: the guest's memory and the contexts' pages.

    They can be unmapped, and mapped again at the same address.
    """

    def __init__(self) -> None:
        self.address = self._map(0, _READ_WRITE)
        ctypes.memmove(self.address, CONTENTS, len(CONTENTS))

    @staticmethod
    def _map(address: int, protection: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_FIXED if address else 0)
        mapped = _libc.mmap(address, ARENA_PAGES * PAGE, protection, flags, -1, 0)
        assert mapped not in (None, 2**64 - 1)
        return int(mapped)

    def put_back(self) -> None:
        """Map fresh pages with the right contents over the current ones."""
        self._map(self.address, _READ_WRITE)
        ctypes.memmove(self.address, CONTENTS, len(CONTENTS))

    def take_away(self) -> None:
        """Unmap the pages; the addresses stay reserved so that nothing else takes them."""
        self._map(self.address, 0)

    def protect(self) -> None:
        """Make the pages read-only."""
        assert _libc.mprotect(self.address, ARENA_PAGES * PAGE, mmap.PROT_READ) == 0

    def close(self) -> None:
        assert _libc.munmap(self.address, ARENA_PAGES * PAGE) == 0


# ---- calls ---------------------------------------------------------------------------------------


def create_context(vm: int, request: Request) -> int:
    create, keep = request.packed()
    result = raw(vm, "KVM_ELISA_CREATE_CONTEXT", create)
    del keep
    return result


def set_slot(vcpu: int, slot: int, fd: int) -> int:
    return raw(vcpu, "KVM_ELISA_SET_SLOT", uapi.ffi.new("struct kvm_elisa_slot *", (slot, fd)))


def revoke(vm: int, vcpu_id: int, slot: int) -> int:
    return raw(vm, "KVM_ELISA_REVOKE", uapi.ffi.new("struct kvm_elisa_revoke *", (vcpu_id, slot)))


def enable(vm: int, flags: int, *limits: int) -> int:
    request = ffi.new("struct kvm_enable_cap *", {"cap": uapi.lib.KVM_CAP_ELISA})
    request.args = (flags, *limits)
    return raw(vm, "KVM_ENABLE_CAP", request)


def set_memory(vm: int, arena: int, pages: int = GUEST_PAGES, *, slot: int = 0) -> int:
    """Set a memory slot of the VM.

    Args:
        pages: size of the slot; 0 deletes it.
    """
    region = ffi.new("struct kvm_userspace_memory_region *", {"slot": slot})
    region.memory_size, region.userspace_addr = pages * PAGE, arena
    return raw(vm, "KVM_SET_USER_MEMORY_REGION", region)


# ---- the vCPU ------------------------------------------------------------------------------------


@functools.cache
def _cpuid(kvm: Kvm) -> Any:
    entries = without_hidden_features(kvm.get_supported_cpuid())
    leaf7 = find_leaf(entries, 7)
    assert leaf7
    assert leaf7.ebx >> 20 & 1, "no SMAP"
    return pack_cpuid(entries)


def prepare(kvm: Kvm, vcpu: int) -> None:
    """Set up 64-bit mode with SMAP, and empty descriptor tables at address 0."""
    assert raw(vcpu, "KVM_SET_CPUID2", _cpuid(kvm)) == 0
    sregs = ffi.new("struct kvm_sregs *")
    assert raw(vcpu, "KVM_GET_SREGS", sregs) == 0
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment, code = getattr(sregs, name), name == "cs"
        segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 8 if code else 16
        segment.type, segment.l, segment.db = (0xB, 1, 0) if code else (3, 0, 1)
        segment.present = segment.s = segment.g = 1
        segment.dpl = segment.unusable = 0
    sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.unusable = 0, 0x67, 0xB, 0
    sregs.tr.present, sregs.tr.s, sregs.tr.g = 1, 0, 0
    sregs.ldt.unusable = 1
    for tables in (sregs.gdt, sregs.idt):
        tables.base = tables.limit = 0
    sregs.cr0, sregs.cr3 = 0x8000_0031, ROOT * PAGE  # PG, NE, ET, PE
    sregs.cr4, sregs.efer = 1 << 5 | 1 << 21, 1 << 8 | 1 << 10  # PAE, SMAP; LME, LMA
    assert raw(vcpu, "KVM_SET_SREGS", sregs) == 0


TABLES_LAST: Final = 0x67
"""Last guest address of a descriptor table after `prepare`; the first is 0."""


@dataclass(frozen=True)
class End:
    """End of a KVM_RUN.

    Attributes:
        result: its result.
        exit_reason: the exit, if the result is 0.
        rip: RIP afterwards.
        elisa: cause, place, slot and VMX exit reason.
    """

    result: int
    exit_reason: int
    elisa: tuple[int, int, int, int]
    rip: int


class RunArea:
    """Mapped struct kvm_run of a vCPU; the mapping alone keeps the vCPU's file open."""

    def __init__(self, vcpu: int, size: int) -> None:
        self._map = mmap.mmap(vcpu, size)

    def run(self, vcpu: int, *, immediate: bool = False) -> End:
        self._map[1] = int(immediate)
        result = raw(vcpu, "KVM_RUN")
        self._map[1] = 0
        (reason,) = struct.unpack_from("<I", self._map, 8)
        regs = ffi.new("struct kvm_regs *")
        assert raw(vcpu, "KVM_GET_REGS", regs) == 0
        return End(result, reason, struct.unpack_from("<4I", self._map, 32), regs.rip)

    def close(self) -> None:
        self._map.close()


def set_loop(vcpu: int, loop: bool) -> None:
    """Set whether a context with a loop stays in it from now on; the vCPU may be in it."""
    _flags[vcpu % len(_flags)] = loop


def set_registers(vcpu: int, *, slot: int | None = None, loop: bool = False) -> int:
    """Set the registers for the next run; return 0, or -EBUSY for a vCPU in a context.

    Args:
        slot: begin anew with VMFUNC(0, slot); None continues.
        loop: see `set_loop`.
    """
    set_loop(vcpu, loop)
    if slot is None:
        return 0
    regs = ffi.new("struct kvm_regs *")
    regs.rip, regs.rdi = CODE_GVA, slot
    # Enable interrupts: the emulated processor must be able to stop the guest.
    regs.rflags, regs.rsi = 0x202, FLAGS_GVA + 4 * (vcpu % len(_flags))
    return raw(vcpu, "KVM_SET_REGS", regs)


def run_into_loop(vcpu: int, area: RunArea) -> End:
    """Run until the vCPU is in the loop of a context; a signal ends each try, later each time."""
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    patience = 0.002
    try:
        while True:
            signal.setitimer(signal.ITIMER_REAL, patience, patience)
            end = area.run(vcpu)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if end.result != -errno.EINTR or end.rip in LOOPS:
                return end
            assert patience < 5, f"not in a loop: {end}"
            patience *= 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def crossings_work(kvm: Kvm) -> None:
    """Check round trips through a gate into a sub context, and into an object, in a new VM."""
    arena = Arena()
    fds = []

    def new(fd: int) -> int:
        assert fd >= 0, os.strerror(-fd)
        fds.append(fd)
        return fd

    try:
        vm = new(raw(kvm.fileno(), "KVM_CREATE_VM"))
        assert enable(vm, uapi.lib.KVM_ELISA_CONTEXTS) == 0
        assert set_memory(vm, arena.address) == 0
        vcpu = new(raw(vm, "KVM_CREATE_VCPU"))
        prepare(kvm, vcpu)
        thing = new(create_context(vm, context_request(Kind.OBJECT, arena.address)))
        sub = new(create_context(vm, context_request(Kind.SUB, arena.address)))
        gate = context_request(Kind.GATE, arena.address, target=sub)
        assert set_slot(vcpu, 2, new(create_context(vm, gate))) == 0
        assert set_slot(vcpu, 3, thing) == 0
        area = RunArea(vcpu, kvm.get_vcpu_mmap_size())
        for slot, behind in ((2, BEHIND_SUB), (3, BEHIND_OBJECT)):
            assert set_registers(vcpu, slot=slot) == 0
            end = area.run(vcpu)
            assert (end.result, end.exit_reason) == (0, lib.KVM_EXIT_HLT), end
            assert end.rip == CODE_GVA + behind + 1, end
        area.close()
    finally:
        for fd in fds:
            os.close(fd)
        arena.close()
