"""The calls that the ELISA patch adds to KVM: functions on the handles of `pykvm.kvm`.

Where an argument is called vm, it is a handle on a VM: a `Vm`, or the `vm` of a vCPU.

What the calls mean: kernel-patches/README.md; numbers and layouts: `pykvm.kernel.uapi`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final

from pykvm.errors import PykvmError
from pykvm.host.commands import as_root, program
from pykvm.kernel import weaknesses
from pykvm.kernel.uapi import ffi, lib
from pykvm.kernel.weaknesses import Weak
from pykvm.kvm import Capability, Handle, Ioctl, IoctlError, Kvm, Scope, Vcpu
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "CALLS",
    "ELISA",
    "Context",
    "RegisteredMemory",
    "WeakProcessorError",
    "create_context",
    "enable_contexts",
    "enable_user_hypercalls",
    "register_memory",
    "revoke_slot",
    "set_slot",
    "version",
]

ELISA: Final = Capability("KVM_CAP_ELISA", lib.KVM_CAP_ELISA)
"""The capability that announces the patch."""

_AS_ROOT: Final = "run it as root (CAP_SYS_ADMIN)"

_CREATE_CONTEXT: Final = Ioctl(
    "KVM_ELISA_CREATE_CONTEXT",
    (Scope.VM,),
    ELISA,
    {
        errno.EINVAL: "call enable_contexts() first, and check the tables' entries and indices",
        errno.E2BIG: "map less in one context",
        errno.ELOOP: "name contexts without EPTP pages of their own in its pages",
        errno.ENOSPC: "give back a context first, or allow more with enable_contexts()",
        errno.EBADF: "name open contexts in its pages, and open memory in its parts",
        errno.ENOENT: "name vcpus of this vm in its pages",
        errno.EPERM: _AS_ROOT,
        errno.EACCES: "look at `pykvm doctor`: this processor has become weaker since the VM began",
    },
    lib.KVM_ELISA_CREATE_CONTEXT,
)
_REGISTER_MEMORY: Final = Ioctl(
    "KVM_ELISA_REGISTER_MEMORY",
    (Scope.SYSTEM,),
    ELISA,
    {
        errno.EINVAL: "give whole pages",
        errno.E2BIG: f"register at most {lib.KVM_ELISA_MAX_MEMORY >> 30} GiB at a time",
        errno.ENOMEM: "free memory, or raise RLIMIT_MEMLOCK with `ulimit -l`",
        errno.EPERM: _AS_ROOT,
    },
    lib.KVM_ELISA_REGISTER_MEMORY,
)
_SET_SLOT: Final = Ioctl(
    "KVM_ELISA_SET_SLOT",
    (Scope.VCPU,),
    ELISA,
    {
        errno.EINVAL: "use slots 2 to 511 and a context of the same vm and vcpu",
        errno.EBADF: "use an open context",
        errno.EBUSY: "run the vcpu until it is back in its default context, or revoke_slot()",
        errno.EPERM: _AS_ROOT,
    },
    lib.KVM_ELISA_SET_SLOT,
)
_REVOKE: Final = Ioctl(
    "KVM_ELISA_REVOKE",
    (Scope.VM,),
    ELISA,
    {
        errno.EINVAL: "call enable_contexts() first, and use slots 2 to 511, or None for all",
        errno.ENOENT: "name a vcpu of this vm and a slot that holds a context",
        errno.EPERM: _AS_ROOT,
    },
    lib.KVM_ELISA_REVOKE,
)

CALLS: Final = {call.name: call for call in (_REGISTER_MEMORY, _CREATE_CONTEXT, _SET_SLOT, _REVOKE)}
"""The patch's ioctls by macro name, as arguments of `Handle.ioctl`."""


class WeakProcessorError(PykvmError):
    """A processor on which a guest could learn what runs in a context."""


class Context(Handle):
    """An EPT context of one VM. It lives on in the kernel while a slot or a page names it."""

    scope: ClassVar[Scope] = Scope.DEVICE

    def __init__(self, vm: Handle, fd: int) -> None:
        super().__init__(fd, vm)
        self.vm = vm


class RegisteredMemory(Handle):
    """Memory that the kernel has pinned and charged once, for any number of contexts.

    The kernel keeps it while the handle is open or a context maps a part of it.

    Attributes:
        size: bytes.
    """

    scope: ClassVar[Scope] = Scope.DEVICE

    def __init__(self, system: Handle, fd: int, size: int) -> None:
        super().__init__(fd, system)
        self.size = size

    @property
    def large_pages(self) -> int:
        """Number of 2 MiB pages in its tables; the rest of the memory is in 4 KiB pages."""
        return self._fact("large")

    @property
    def tables(self) -> int:
        """Number of table pages, which all contexts share."""
        return self._fact("tables")

    @property
    def contexts(self) -> int:
        """Number of references of contexts, one for each part that a context maps."""
        return self._fact("contexts")

    def _fact(self, name: str) -> int:
        text = Path(f"/proc/self/fdinfo/{self.fileno()}").read_text()
        facts = dict(line.split(":", 1) for line in text.splitlines())
        return int(facts[f"elisa-{name}"])


def version(kvm: Kvm) -> int:
    """Return the version of the patch's interface; 0 without the patch or EPTP switching."""
    return kvm.check_extension(ELISA)


def enable_user_hypercalls(vm: Handle) -> None:
    """Let the 16 hypercalls from KVM_HC_ELISA_USER on leave to user space.

    Raises:
        CapabilityMissingError: this is stock KVM.
    """
    vm.require(ELISA, "enable_user_hypercalls()")
    vm.enable_cap(ELISA, lib.KVM_ELISA_USER_HYPERCALLS)


def enable_contexts(
    vm: Handle, *, contexts: int = 0, pages: int = 0, answered: Weak = weaknesses.NONE
) -> None:
    """Let a VM have contexts, before its first vCPU. This disables nested VMX, among others.

    Args:
        vm: the VM.
        contexts: most contexts that it may hold; 0 for the kernel's default.
        pages: most table pages and pinned pages that it may hold; 0 for the kernel's default.
        answered: weaknesses of the processor that the code of all of its contexts answers; see
            `pykvm.elisa.protections.answers`.

    Raises:
        CapabilityMissingError: this is stock KVM.
        WeakProcessorError: this processor has a weakness that is neither answered nor accepted.
        IoctlError: it takes CAP_SYS_ADMIN (EPERM), or the VM has a vCPU already (EINVAL).
    """
    vm.require(ELISA, "enable_contexts()")
    try:
        vm.enable_cap(ELISA, lib.KVM_ELISA_CONTEXTS, contexts, pages, answered)
    except IoctlError as error:
        if error.errno != errno.EACCES:
            raise
        left = weaknesses.unaccepted() & ~answered
        accept = ",".join(weaknesses.names_of(weaknesses.accepted() | left))
        raise WeakProcessorError(
            "on this processor a guest could learn what is in the objects of others: "
            f"{', '.join(weaknesses.names_of(left))}",
            f"see {program()} doctor; where that does no harm, "
            + as_root(f"{program()} kernel load --accept {accept}"),
        ) from error


def register_memory(system: Handle, address: int, size: int) -> RegisteredMemory:
    """Pin memory of this process and build its part of an EPT, once.

    The handle closes with `system`; contexts keep the memory beyond that.

    Args:
        system: the `Kvm`.
        address: address of the first byte; a multiple of 4096, like `size`.
        size: bytes.

    Raises:
        CapabilityMissingError: this is stock KVM.
        IoctlError: EPERM (no CAP_SYS_ADMIN), EINVAL, E2BIG, EFAULT (the memory cannot be pinned),
            ENOMEM (RLIMIT_MEMLOCK); see kernel-patches/README.md.
    """
    request = ffi.new("struct kvm_elisa_memory *", {"addr": address, "size": size})
    return system.adopt(RegisteredMemory(system, system.ioctl(_REGISTER_MEMORY, request), size))


def create_context(
    vm: Handle,
    tables: bytes | bytearray | memoryview,
    pages: Iterable[tuple[int, int, int]],
    *,
    parts: Iterable[tuple[RegisteredMemory, int]] = (),
    gva: int = 0,
    size: int = PAGE_SIZE,
    la57: bool = False,
) -> Context:
    """Hand an EPT to the kernel, which copies it; return its context, which closes with the VM.

    Args:
        vm: the VM.
        tables: nr_tables * 4096 bytes, table 0 the root. The address field of an entry is the
            number of a table above level 1, of a page at level 1. A leaf of level 3 at (n + 1) GiB
            stands for part n.
        pages: (addr, kind, ref) for each page, the kind one of ``KVM_ELISA_PAGE_*``: (host
            address, PAGE_USER, 0), (0, PAGE_LIST, vCPU id), or (0, PAGE_EPTP, descriptor of a
            `Context`).
        parts: registered memory and the number of one of its GiB, for each part.
        gva: the first guest virtual address that the context's guest page table maps.
        size: bytes that it maps from there on.
        la57: whether it is for guests with five-level paging.

    Raises:
        CapabilityMissingError: this is stock KVM.
        IoctlError: EPERM (no CAP_SYS_ADMIN), EINVAL (a bad entry), E2BIG, ELOOP, ENOSPC, ENOENT,
            EBADF, EFAULT, ENOMEM (RLIMIT_MEMLOCK); see kernel-patches/README.md.
        ValueError: the tables' length is not a multiple of 4096.
    """
    source = ffi.from_buffer(tables)
    count, rest = divmod(len(source), PAGE_SIZE)
    if rest or not count:
        raise ValueError(f"{len(source)} bytes of tables: pass a multiple of {PAGE_SIZE}")
    entries = list(pages)
    array = ffi.new("struct kvm_elisa_page[]", len(entries))
    for slot, (addr, kind, ref) in enumerate(entries):
        array[slot].addr = addr
        array[slot].kind = kind
        array[slot].ref = ref
    listed = list(parts)
    numbers = ffi.new("struct kvm_elisa_part[]", len(listed))
    for slot, (memory, index) in enumerate(listed):
        numbers[slot].fd = memory.fileno()
        numbers[slot].index = index
    request = ffi.new("struct kvm_elisa_create *")
    request.nr_tables = count
    request.nr_pages = len(entries)
    request.tables = int(ffi.cast("uintptr_t", source))
    request.pages = int(ffi.cast("uintptr_t", array))
    if listed:
        request.nr_parts = len(listed)
        request.parts = int(ffi.cast("uintptr_t", numbers))
    request.gva = gva
    request.size = size
    request.flags = lib.KVM_ELISA_LA57 if la57 else 0
    return vm.adopt(Context(vm, vm.ioctl(_CREATE_CONTEXT, request)))


def set_slot(vcpu: Vcpu, slot: int, context: Context | None) -> None:
    """Put a context into a slot (2 to 511) of a vCPU's EPTP list, or empty the slot.

    The kernel holds its own reference: the context may be closed afterwards.

    Raises:
        CapabilityMissingError: this is stock KVM.
        VcpuRunningError: the vCPU runs.
        IoctlError: the slot or the context is wrong, or the vCPU stopped inside a context (EBUSY).
    """
    request = ffi.new("struct kvm_elisa_slot *")
    request.slot = slot
    request.fd = -1 if context is None else context.fileno()
    vcpu.ioctl(_SET_SLOT, request)


def revoke_slot(vm: Handle, vcpu_id: int, slot: int | None) -> None:
    """Take a context away from a vCPU, which may be running; slot None: all of its contexts.

    On return no instruction of the context runs on that vCPU any more. If it was inside, its
    `Vcpu.run` returns an `ElisaExit` with cause ``KVM_ELISA_EXIT_REVOKED``, which says where it
    was. It is in its default context again, with its registers, RIP and RSP among them, its
    arithmetic flags, CR2 and DR6 cleared; the caller sets where it goes on.

    Raises:
        CapabilityMissingError: this is stock KVM.
        IoctlError: it takes CAP_SYS_ADMIN (EPERM), or there is nothing to revoke (ENOENT).
    """
    vm.ioctl(_REVOKE, ffi.new("struct kvm_elisa_revoke *", {"vcpu": vcpu_id, "slot": slot or 0}))
