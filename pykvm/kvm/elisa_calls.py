"""The calls and the exit of the ELISA kernel patch, all of them, and nothing else.

Everything else in `pykvm.kvm` is stock KVM. The classes here are mixed into `Kvm`, `Vm` and
`Vcpu`. What the calls mean: kernel-patches/README.md; layouts and numbers: kvm_elisa.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.exits import Exit, register_decoder
from pykvm.kvm.handle import Handle, Struct
from pykvm.kvm.ioctls import Scope

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm

__all__ = ["Context", "ElisaExit", "ElisaKvmCalls", "ElisaVcpuCalls", "ElisaVmCalls"]

TABLE_SIZE = 4096
"""Bytes of one table: 512 entries of 8 bytes."""


class Context(Handle):
    """An EPT context of one VM. It lives on in the kernel while a slot or a page names it."""

    scope: ClassVar[Scope] = Scope.DEVICE

    def __init__(self, vm: Vm, fd: int) -> None:
        super().__init__(fd)
        self.vm = vm

    def check_extension(self, capability: str | int) -> int:
        return self.vm.check_extension(capability)


class ElisaKvmCalls(Handle):
    """What the patch adds to `Kvm`."""

    def elisa_version(self) -> int:
        """Version of the patch's interface; 0 without the patch or without EPTP switching."""
        return self.check_extension("KVM_CAP_ELISA")


class ElisaVmCalls(Handle):
    """What the patch adds to `Vm`."""

    def enable_user_hypercalls(self) -> None:
        """Let hypercalls KVM_HC_ELISA_USER to +15 leave to `Vcpu.set_hypercall`'s handlers.

        Raises CapabilityMissingError on stock KVM.
        """
        self.require("KVM_CAP_ELISA", "enable_user_hypercalls()")
        request = ffi.new("struct kvm_enable_cap *", {"cap": lib.KVM_CAP_ELISA})
        request.args[0] = lib.KVM_ELISA_USER_HYPERCALLS
        self.ioctl("KVM_ENABLE_CAP", request)

    def enable_elisa_contexts(self, *, contexts: int = 0, pages: int = 0) -> None:
        """Let this VM have contexts, before its first vCPU; it does without nested VMX, for one.

        contexts, pages: most that it may hold, 0 for the kernel's defaults. Raises
        CapabilityMissingError on stock KVM; IoctlError with EPERM, or EINVAL after the first vCPU.
        """
        self.require("KVM_CAP_ELISA", "enable_elisa_contexts()")
        request = ffi.new("struct kvm_enable_cap *", {"cap": lib.KVM_CAP_ELISA})
        request.args = (lib.KVM_ELISA_CONTEXTS, contexts, pages, 0)
        self.ioctl("KVM_ENABLE_CAP", request)

    def revoke_elisa_slot(self, vcpu_id: int, slot: int | None) -> None:
        """Take a context away from a vCPU, which may be running; slot None: all of its contexts.

        On return no instruction of the context runs on that vCPU any more. If it was inside, its
        run() returns an `ElisaExit` with cause ``KVM_ELISA_EXIT_REVOKED``: it is in its default
        context again, with the general registers but RSP cleared, at the place that the exit
        names, and the caller decides where it goes on. Raises CapabilityMissingError; IoctlError
        with EPERM, or ENOENT (no such vCPU, an empty slot).
        """
        request = ffi.new("struct kvm_elisa_revoke *", {"vcpu": vcpu_id, "slot": slot or 0})
        self.ioctl("KVM_ELISA_REVOKE", request)

    def create_elisa_context(
        self,
        tables: bytes | bytearray | memoryview,
        pages: Iterable[tuple[int, int, int]],
        *,
        gva: int = 0,
        size: int = TABLE_SIZE,
        la57: bool = False,
    ) -> Context:
        """Hand an EPT to the kernel, which copies it; return its context.

        tables: nr_tables * 4096 bytes, table 0 the root; the address field of an entry is the
        number of a table above level 1, of a page at level 1. pages: (addr, kind, ref), kind one
        of ``lib.KVM_ELISA_PAGE_*``: (host address, PAGE_USER, 0), (0, PAGE_LIST, vCPU id), or
        (0, PAGE_EPTP, descriptor of a `Context`). gva, size: the range of guest virtual addresses
        that the context's guest page table maps. la57: for guests with five-level paging.

        Raises CapabilityMissingError; IoctlError with EPERM (no CAP_SYS_ADMIN), EINVAL (a bad
        entry), E2BIG, ELOOP, ENOENT, EBADF, EFAULT, ENOMEM (RLIMIT_MEMLOCK); ValueError for a
        length that is not a multiple of 4096.
        """
        source = ffi.from_buffer(tables)
        count, rest = divmod(len(source), TABLE_SIZE)
        if rest or not count:
            raise ValueError(f"{len(source)} bytes of tables: pass a multiple of {TABLE_SIZE}")
        entries = list(pages)
        array = ffi.new("struct kvm_elisa_page[]", len(entries))
        for slot, (addr, kind, ref) in enumerate(entries):
            array[slot].addr = addr
            array[slot].kind = kind
            array[slot].ref = ref
        request = ffi.new("struct kvm_elisa_create *")
        request.nr_tables = count
        request.nr_pages = len(entries)
        request.tables = int(ffi.cast("uintptr_t", source))
        request.pages = int(ffi.cast("uintptr_t", array))
        request.gva = gva
        request.size = size
        request.flags = lib.KVM_ELISA_LA57 if la57 else 0
        context = Context(self._as_vm(), self.ioctl("KVM_ELISA_CREATE_CONTEXT", request))
        return self._as_vm().adopt(context)

    def _as_vm(self) -> Vm:
        raise NotImplementedError


class ElisaVcpuCalls(Handle):
    """What the patch adds to `Vcpu`."""

    def set_elisa_slot(self, slot: int, context: Context | None) -> None:
        """Put a context into a slot (2 to 511) of this vCPU's EPTP list, or empty the slot.

        The kernel holds its own reference: the context may be closed afterwards. Raises
        CapabilityMissingError, VcpuRunningError, IoctlError.
        """
        request = ffi.new("struct kvm_elisa_slot *")
        request.slot = slot
        request.fd = -1 if context is None else context.fileno()
        self.ioctl("KVM_ELISA_SET_SLOT", request)


_CAUSES = {
    lib.KVM_ELISA_EXIT_VIOLATION: "ept violation",
    lib.KVM_ELISA_EXIT_MISCONFIG: "ept misconfiguration",
    lib.KVM_ELISA_EXIT_VMFUNC: "failed vmfunc",
    lib.KVM_ELISA_EXIT_REFUSED: "refused exit",
    lib.KVM_ELISA_EXIT_REVOKED: "revoked context",
}
_PLACES = {
    lib.KVM_ELISA_AT_DEFAULT: "default context",
    lib.KVM_ELISA_AT_GATE: "gate context",
    lib.KVM_ELISA_AT_SUB: "sub context",
}
# SDM vol. 3D, appendix C: those that code in a gate or sub context is likely to meet.
_VMX_REASONS = {
    0: "exception or nmi",
    1: "external interrupt",
    2: "triple fault",
    7: "interrupt window",
    8: "nmi window",
    9: "task switch",
    10: "cpuid",
    12: "hlt",
    13: "invd",
    14: "invlpg",
    15: "rdpmc",
    16: "rdtsc",
    18: "vmcall",
    28: "control-register access",
    29: "mov dr",
    30: "i/o instruction",
    31: "rdmsr",
    32: "wrmsr",
    36: "mwait",
    37: "monitor trap flag",
    39: "monitor",
    40: "pause",
    44: "apic access",
    46: "access to gdtr or idtr",
    47: "access to ldtr or tr",
    48: "ept violation",
    49: "ept misconfiguration",
    50: "invept",
    51: "rdtscp",
    52: "preemption timer",
    53: "invvpid",
    54: "wbinvd",
    55: "xsetbv",
    57: "rdrand",
    59: "vmfunc",
    61: "rdseed",
    62: "page-modification log full",
    63: "xsaves",
    64: "xrstors",
}


@dataclass(frozen=True, slots=True)
class ElisaExit(Exit):
    """KVM_EXIT_ELISA: the vCPU did outside its default context what nobody may serve there.

    Fields as in struct kvm_elisa_exit (kvm_elisa.h). The vCPU has not gone on.
    """

    cause: int
    at: int
    slot: int
    vmx_exit_reason: int
    qualification: int
    gpa: int
    gva: int
    rip: int
    function: int
    index: int

    @property
    def access(self) -> str:
        """What an EPT violation tried: "read", "write", "fetch" or a combination.

        SDM vol. 3C, table 28-7: bits 0 to 2 of the qualification.
        """
        kinds = ("read", "write", "fetch")
        return "+".join(name for bit, name in enumerate(kinds) if self.qualification >> bit & 1)

    @property
    def gva_valid(self) -> bool:
        """Whether `gva` means something: bit 7 of a violation's qualification."""
        return self.cause == lib.KVM_ELISA_EXIT_VIOLATION and bool(self.qualification >> 7 & 1)

    def __str__(self) -> str:
        cause = _CAUSES.get(self.cause, f"elisa exit {self.cause}")
        place = _PLACES.get(self.at, f"context {self.at}")
        if self.at != lib.KVM_ELISA_AT_DEFAULT:
            place += f" of slot {self.slot}"
        return f"{cause} in the {place} at rip {self.rip:#x}{self._detail()}"

    def _detail(self) -> str:
        if self.cause == lib.KVM_ELISA_EXIT_VIOLATION:
            gva = f" (GVA {self.gva:#x})" if self.gva_valid else ""
            # Bit 8: the access itself, not one of the page walk's.
            walk = (
                "" if not self.gva_valid or self.qualification >> 8 & 1 else " during a page walk"
            )
            allowed = "".join(
                letter if self.qualification >> bit & 1 else "-"
                for bit, letter in ((3, "r"), (4, "w"), (5, "x"))
            )
            return f": {self.access} of GPA {self.gpa:#x}{gva}{walk}, the page allows {allowed}"
        if self.cause == lib.KVM_ELISA_EXIT_MISCONFIG:
            return f": GPA {self.gpa:#x}"
        if self.cause == lib.KVM_ELISA_EXIT_VMFUNC:
            return f": vmfunc({self.function:#x}, {self.index:#x})"
        name = _VMX_REASONS.get(self.vmx_exit_reason, "exit")
        return (
            f": {name} (vmx reason {self.vmx_exit_reason}), qualification {self.qualification:#x}"
        )


def _decode(_run: Struct, union: Struct) -> Exit:
    raw = ffi.cast("struct kvm_elisa_exit *", union)
    return ElisaExit(*(getattr(raw, name) for name in ElisaExit.__dataclass_fields__))


register_decoder(lib.KVM_EXIT_ELISA, _decode)
