"""The exit that the ELISA patch adds to KVM_RUN. Importing `pykvm.elisa` lets vCPUs return it.

Source: kernel-patches/README.md; SDM vol. 3C, table 28-7, and vol. 3D, appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from pykvm.kernel.uapi import ffi, lib
from pykvm.kvm import Exit, Struct, register_exit

__all__ = ["ElisaExit"]

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
        """Access that caused an EPT violation: "read", "write", "fetch" or a combination.

        SDM vol. 3C, table 28-7: bits 0 to 2 of the qualification.
        """
        kinds = ("read", "write", "fetch")
        return "+".join(name for bit, name in enumerate(kinds) if self.qualification >> bit & 1)

    @property
    def gva_valid(self) -> bool:
        """True if `gva` is valid: bit 7 of a violation's qualification."""
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


register_exit(lib.KVM_EXIT_ELISA, "KVM_EXIT_ELISA", _decode)
