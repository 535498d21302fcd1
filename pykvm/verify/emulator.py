"""The crossing's pages in Unicorn, an emulator that shares nothing with the symbolic execution.

Unicorn is QEMU's translator as a library. It knows neither VMFUNC nor INT1 and calls them invalid
opcodes; `Emulator` stops there and looks at the bytes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import unicorn
from unicorn import x86_const

from pykvm.elisa.object_code import VMFUNC
from pykvm.verify.state import GENERAL, StateRegion

__all__ = ["STATUS_BITS", "Emulator", "Run", "Stop"]

_REGISTERS: Final = {
    name: getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in (*GENERAL, "rip", "rflags")
}
STATUS_BITS: Final = {
    **{"cf": 0, "pf": 2, "af": 4, "zf": 6, "sf": 7, "df": 10, "of": 11, "ac": 18},
}
"""Bits of RFLAGS by the name that the symbolic state gives them."""

_INT1: Final = b"\xf1"
_NOWHERE: Final = (1 << 64) - 1  # an address that no run reaches
_MOST: Final = 64  # instructions of one run
_PROTECTION: Final = {
    (False, False): unicorn.UC_PROT_READ,
    (True, False): unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE,
    (False, True): unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC,
}
_FETCHES: Final = (unicorn.UC_MEM_FETCH_UNMAPPED, unicorn.UC_MEM_FETCH_PROT)


class Stop:
    """Reason for the end of a run; `RUNNING` means that it reached the limit of instructions."""

    BREAKPOINT = "breakpoint"
    INVALID = "invalid"
    FETCH = "fetch"
    ACCESS = "access"
    VMFUNC = "vmfunc"
    RUNNING = "running"


@dataclass
class Run:
    """Result of a run.

    Attributes:
        trace: offsets of its instructions.
        stop: why it ended, one of `Stop`.
        registers: the registers at its end, by name.
    """

    trace: list[int] = field(default_factory=list)
    stop: str = Stop.RUNNING
    registers: dict[str, int] = field(default_factory=dict)


class Emulator:
    """An emulated processor in a context's memory.

    Args:
        base: linear address of the crossing base.
        regions: the memory that the context maps.
        contents: initial contents by the name of the region.
    """

    def __init__(
        self, base: int, regions: Iterable[StateRegion], contents: Mapping[str, bytes]
    ) -> None:
        self.base = base
        self.regions = {region.name: region for region in regions}
        self._machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        # A model that has SMAP, and therefore STAC and CLAC.
        self._machine.ctl_set_cpu_model(x86_const.UC_CPU_X86_SKYLAKE_CLIENT)
        # Without paging, linear addresses would be truncated to physical ones.
        self._machine.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        for region in self.regions.values():
            protection = _PROTECTION[region.writable, region.executable]
            self._machine.mem_map(self.address(region.offset), region.size, protection)
            self.write(region.offset, contents.get(region.name, b""))
        self._run = Run()
        self._watch: Callable[[int], None] | None = None
        add = self._machine.hook_add
        add(unicorn.UC_HOOK_CODE, self._on_code)
        add(unicorn.UC_HOOK_INTR, self._on_interrupt)
        add(unicorn.UC_HOOK_INSN_INVALID, self._on_invalid)
        add(unicorn.UC_HOOK_MEM_INVALID, self._on_memory)

    def address(self, offset: int) -> int:
        """Return the linear address at an offset from the crossing base."""
        return (self.base + offset) & ((1 << 64) - 1)

    def write(self, offset: int, content: bytes) -> None:
        """Write memory, read-only or not."""
        if content:
            self._machine.mem_write(self.address(offset), content)

    def read(self, offset: int, size: int) -> bytes | None:
        """Return the content of memory, or None if one of the bytes is not mapped."""
        try:
            return bytes(self._machine.mem_read(self.address(offset), size))
        except unicorn.UcError:
            return None

    def word(self, offset: int) -> int:
        """Return eight bytes, which have to be mapped, as an integer."""
        return int.from_bytes(self.read(offset, 8) or b"", "little")

    def get(self, name: str) -> int:
        return int(self._machine.reg_read(_REGISTERS[name]))

    def set(self, name: str, content: int) -> None:
        self._machine.reg_write(_REGISTERS[name], content)

    def go(
        self,
        offset: int,
        registers: Mapping[str, int],
        watch: Callable[[int], None] | None = None,
    ) -> Run:
        """Run from an offset until something stops the processor.

        Args:
            offset: offset of the first instruction from the crossing base.
            registers: the general registers and ``rflags``, by name.
            watch: called before each instruction with its offset.
        """
        self._run = run = Run()
        self._watch = watch
        for name, content in registers.items():
            self.set(name, content)
        try:
            self._machine.emu_start(self.address(offset), _NOWHERE, count=_MOST)
        except unicorn.UcError:
            if run.stop == Stop.RUNNING:
                raise
        run.registers = {name: self.get(name) for name in (*GENERAL, "rflags", "rip")}
        return run

    # ---- Hooks: Unicorn passes itself first and the user's data last ----

    def _stop(self, stop: str) -> None:
        if self._run.stop == Stop.RUNNING:
            self._run.stop = stop
        self._machine.emu_stop()

    def _on_code(self, _machine: Any, address: int, _size: int, _data: Any) -> None:
        if self._run.stop != Stop.RUNNING:
            return
        offset = address - self.base
        if offset >= 1 << 63:
            offset -= 1 << 64
        self._run.trace.append(offset)
        if self._watch is not None:
            self._watch(offset)

    def _on_interrupt(self, _machine: Any, number: int, _data: Any) -> None:
        self._stop(Stop.BREAKPOINT if number == 3 else f"exception {number}")

    def _on_invalid(self, _machine: Any, _data: Any) -> bool:
        at = self.get("rip") - self.base
        if self.read(at, len(VMFUNC)) == VMFUNC:
            self._stop(Stop.VMFUNC)
        elif self.read(at, 1) == _INT1:
            self._stop(Stop.BREAKPOINT)
        else:
            self._stop(Stop.INVALID)
        return False

    def _on_memory(self, _machine: Any, kind: int, *_rest: Any) -> bool:
        self._stop(Stop.FETCH if kind in _FETCHES else Stop.ACCESS)
        return False
