"""Modes of a processor, and VMFUNC in each of them."""

import struct
from collections.abc import Callable

from pykvm.kvm import Exit, Struct
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import Step, What

# SDM vol. 3A 2.5.
PE, ET, NE, WP, PG = 1 << 0, 1 << 4, 1 << 5, 1 << 16, 1 << 31
PSE, PAE, PGE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 20, 1 << 21
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
CR0 = PE | ET | NE | WP | PG
CR4 = PAE | SMEP | SMAP  # CR4 of these guests


def try_vmfunc(index: int = 0) -> Step:
    """Return a VMFUNC step; slot 0 is the current context, so a working VMFUNC changes nothing."""
    return Step(What.VMFUNC, 0, index, attempt=True)


def try_call(slot: int) -> Step:
    return Step(What.CALL, 1, slot=slot, attempt=True)


CODE = 0x9_5000  # free memory after the stack that real mode reaches: VMFUNC(0, index), then HLT
LONG_MODE_CODE = 0x6000_0000  # the same page, executable in the guest's own tables
TABLES = layout.CAPTURE_GPA + 0x20_0000


def _flat(segment: Struct, *, long: bool, bits32: bool, limit: int) -> None:
    segment.base = segment.selector = 0
    segment.selector = 8
    segment.limit = limit
    segment.l, segment.db, segment.g = int(long), int(bits32), int(limit > 0xFFFFF)


def _set_mode(guest: BareGuest, cr0: int, cr4: int, efer: int, cr3: int, *, long: bool) -> None:
    sregs = guest.vcpu.get_sregs()
    real = not cr0 & PE
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        code = name == "cs" and long
        _flat(segment, long=code, bits32=not code and not real, limit=0xFFFF if real else 2**32 - 1)
        if real:
            segment.type = 3
    if real:
        sregs.cs.base, sregs.cs.selector = CODE, CODE >> 4
    sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3 = cr0, cr4, efer, cr3
    sregs.idt.limit = 0  # turns an exception into a triple fault
    guest.vcpu.set_sregs(sregs)


def _two_level(guest: BareGuest) -> int:
    """Set up 32-bit paging: 4 MiB pages, GVA = GPA."""
    entries = [number << 22 | 0x83 for number in range(1024)]
    guest.memory.write(TABLES, struct.pack("<1024I", *entries))
    return TABLES


def _pae(guest: BareGuest) -> int:
    """Set up four page directories with 2 MiB pages, GVA = GPA (SDM vol. 3A, 4.4)."""
    pointers = [TABLES + (1 + number) * 0x1000 | 1 for number in range(4)]
    guest.memory.write(TABLES, struct.pack("<4Q", *pointers))
    entries = [number << 21 | 0x83 for number in range(2048)]
    guest.memory.write(TABLES + 0x1000, struct.pack("<2048Q", *entries))
    return TABLES


Mode = Callable[[BareGuest], None]

OFF: dict[str, Mode] = {
    "real mode": lambda g: _set_mode(g, ET | NE, 0, 0, 0, long=False),
    "real mode with SMAP": lambda g: _set_mode(g, ET | NE, CR4, 0, 0, long=False),
    "protected mode": lambda g: _set_mode(g, CR0 & ~PG, 0, 0, 0, long=False),
    "long mode enabled, no paging": lambda g: _set_mode(
        g, CR0 & ~PG, CR4, LME | NXE, 0, long=False
    ),
    "32-bit paging": lambda g: _set_mode(g, CR0, PSE | SMAP, 0, _two_level(g), long=False),
    "PAE paging": lambda g: _set_mode(g, CR0, PAE | SMAP, NXE, _pae(g), long=False),
    "64-bit mode without SMAP": lambda g: _set_mode(
        g, CR0, CR4 & ~SMAP, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=True
    ),
}
ON: dict[str, Mode] = {
    "64-bit mode": lambda g: _set_mode(
        g, CR0, CR4, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=True
    ),
    # I5 leaves it enabled: 32-bit addresses do not reach trusted GVAs.
    "compatibility mode": lambda g: _set_mode(
        g, CR0, CR4, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=False
    ),
}


def vmfunc_in(guest: BareGuest, mode: Mode, index: int) -> Exit:
    """Return the exit of VMFUNC(0, index) in that mode: HLT if it worked, else shutdown.

    Afterwards the vCPU is in its former state.
    """
    vcpu = guest.vcpu
    vcpu.complete()
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    mode(guest)
    now = vcpu.get_sregs()
    code = LONG_MODE_CODE if now.efer & LMA else CODE if now.cr0 & PE else 0
    guest.memory.write(CODE, bytes.fromhex("0F01D4 F4"))
    vcpu.set_regs(rip=code, rax=0, rcx=index, rsp=layout.STACK_TOP_GPA, rflags=0x202)
    exit = vcpu.run()
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    return exit
