"""Registers of an x86-64 vCPU as GDB sees them: their order, and the XML that describes it.

Source: "Debugging with GDB", appendix G.5.2.15 (i386 features): the names of features and registers
with a meaning to GDB. The feature org.pykvm.system adds control registers, descriptor tables and
the MSRs that tell in which mode the processor is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["REGISTERS", "TARGET_XML", "Register", "Source"]


class Source(Enum):
    """Where KVM keeps a register."""

    GENERAL = "struct kvm_regs"
    SELECTOR = "struct kvm_sregs, a segment's selector"
    BASE = "struct kvm_sregs, a segment's or a table's base"
    LIMIT = "struct kvm_sregs, a table's limit"
    CONTROL = "struct kvm_sregs"
    FLOATING = "the XSAVE area"
    MSR = "an MSR"


@dataclass(frozen=True, slots=True)
class Register:
    """A register.

    Attributes:
        name: GDB's name.
        bits: its size.
        type: its type in the description.
        source: where KVM keeps it.
        field: its name there.
        number: its index there, or the MSR's number.
        group: GDB's group for `info registers GROUP`; empty for GDB's own choice.
    """

    name: str
    bits: int
    type: str
    source: Source
    field: str
    number: int = 0
    group: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.bits // 8

    def xml(self) -> str:
        group = f' group="{self.group}"' if self.group else ""
        return f'<reg name="{self.name}" bitsize="{self.bits}" type="{self.type}"{group}/>'


_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_X87_CONTROL: Final = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")

_MSR_KERNEL_GS_BASE: Final = 0xC000_0102  # SDM vol. 4, table 2-2


def _general() -> list[Register]:
    names = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"]
    names += [f"r{number}" for number in range(8, 16)]
    types = {"rbp": "data_ptr", "rsp": "data_ptr"}
    return [
        *(Register(n, 64, types.get(n, "int64"), Source.GENERAL, n) for n in names),
        Register("rip", 64, "code_ptr", Source.GENERAL, "rip"),
        Register("eflags", 32, "i386_eflags", Source.GENERAL, "rflags"),
    ]


_FEATURES: Final[dict[str, list[Register]]] = {
    "org.gnu.gdb.i386.core": [
        *_general(),
        *(Register(name, 32, "int32", Source.SELECTOR, name) for name in _SEGMENTS),
        *(Register(f"st{n}", 80, "i387_ext", Source.FLOATING, "st", n) for n in range(8)),
        *(Register(n, 32, "int", Source.FLOATING, n, group="float") for n in _X87_CONTROL),
    ],
    "org.gnu.gdb.i386.sse": [
        *(Register(f"xmm{n}", 128, "vec128", Source.FLOATING, "xmm", n) for n in range(16)),
        Register("mxcsr", 32, "int", Source.FLOATING, "mxcsr", group="vector"),
    ],
    "org.gnu.gdb.i386.segments": [
        Register("fs_base", 64, "int", Source.BASE, "fs"),
        Register("gs_base", 64, "int", Source.BASE, "gs"),
    ],
    "org.pykvm.system": [
        Register("k_gs_base", 64, "int64", Source.MSR, "", _MSR_KERNEL_GS_BASE),
        Register("cr0", 64, "cr0", Source.CONTROL, "cr0"),
        Register("cr2", 64, "data_ptr", Source.CONTROL, "cr2"),
        Register("cr3", 64, "int64", Source.CONTROL, "cr3"),
        Register("cr4", 64, "cr4", Source.CONTROL, "cr4"),
        Register("cr8", 64, "int64", Source.CONTROL, "cr8"),
        Register("efer", 64, "efer", Source.CONTROL, "efer"),
        Register("gdt_base", 64, "data_ptr", Source.BASE, "gdt"),
        Register("gdt_limit", 32, "int32", Source.LIMIT, "gdt"),
        Register("idt_base", 64, "data_ptr", Source.BASE, "idt"),
        Register("idt_limit", 32, "int32", Source.LIMIT, "idt"),
        Register("tr_base", 64, "data_ptr", Source.BASE, "tr"),
    ],
}

REGISTERS: Final = tuple(each for registers in _FEATURES.values() for each in registers)
"""All registers, in the order of their numbers and of the packets g and G."""

# Names of bits (SDM vol. 1, 3.4.3; vol. 3A, 2.5 and 2.2.1).
_FLAGS: Final[dict[str, tuple[int, dict[int, str]]]] = {
    "i386_eflags": (
        4,
        {
            **{0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF"},
            **{14: "NT", 16: "RF", 17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID"},
        },
    ),
    "cr0": (
        8,
        {
            **{0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE"},
            **{16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"},
        },
    ),
    "cr4": (
        8,
        {
            **{0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE"},
            **{8: "PCE", 9: "OSFXSR", 10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE"},
            **{16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE", 20: "SMEP", 21: "SMAP", 22: "PKE"},
            **{23: "CET", 24: "PKS"},
        },
    ),
    "efer": (8, {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE"}),
}

_VECTOR: Final = """\
<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128">
<field name="v4_float" type="v4f"/>
<field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/>
<field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/>
</union>
"""


def _flags(name: str) -> str:
    size, bits = _FLAGS[name]
    fields = "\n".join(f'<field name="{n}" start="{bit}" end="{bit}"/>' for bit, n in bits.items())
    return f'<flags id="{name}" size="{size}">\n{fields}\n</flags>\n'


def _feature(name: str, registers: list[Register]) -> str:
    types = {register.type for register in registers}
    parts = [_flags(each) for each in _FLAGS if each in types]
    parts += [_VECTOR] if "vec128" in types else []
    parts += [f"{register.xml()}\n" for register in registers]
    return f'<feature name="{name}">\n{"".join(parts)}</feature>\n'


TARGET_XML: Final = (
    '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n<target>\n'
    "<architecture>i386:x86-64</architecture>\n"
    + "".join(_feature(name, registers) for name, registers in _FEATURES.items())
    + "</target>\n"
).encode()
"""The description, as qXfer:features:read:target.xml gives it."""
