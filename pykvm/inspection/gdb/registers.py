"""Registers of a paused vCPU as bytes in GDB's order (`target_description.REGISTERS`)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.inspection.gdb.target_description import REGISTERS, Register, Source
from pykvm.kvm import KvmError, Struct, Vcpu

__all__ = ["RegisterError", "Registers"]


class RegisterError(PykvmError):
    """A register that cannot have a value."""


class Registers:
    """The registers of one vCPU. KVM is asked once for each struct, so make a new one each stop."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    @cached_property
    def _regs(self) -> Struct:
        return self._vcpu.get_regs()

    @cached_property
    def _sregs(self) -> Struct:
        return self._vcpu.get_sregs()

    @cached_property
    def _xsave(self) -> bytearray:
        return bytearray(self._vcpu.get_xsave())

    # ---- reading ----------------------------------------------------------------------------

    def read_all(self) -> list[bytes | None]:
        """Return the values of all registers, little-endian; None for one that KVM has not."""
        return [self.read(register) for register in REGISTERS]

    def read(self, register: Register) -> bytes | None:
        """Return the value of a register, little-endian, or None if KVM does not have it."""
        try:
            if register.source is Source.FLOATING:
                return _read_floating(self._xsave, register)
            value = self._integer(register)
        except KvmError:
            return None
        return (value % (1 << register.bits)).to_bytes(register.size, "little")

    def _integer(self, register: Register) -> int:
        value: Any
        match register.source:
            case Source.GENERAL:
                value = getattr(self._regs, register.field)
            case Source.CONTROL:
                value = getattr(self._sregs, register.field)
            case Source.MSR:
                value = self._vcpu.get_msrs([register.number])[register.number]
            case _:
                part = getattr(self._sregs, register.field)
                value = getattr(part, register.source.name.lower())
        return int(value)

    # ---- writing ----------------------------------------------------------------------------

    def write(self, register: Register, data: bytes) -> None:
        """Set a register; one that has the value already is left alone.

        Raises:
            RegisterError: the length is not the register's, or it is a selector, of which KVM would
                not load the descriptor.
            KvmError: KVM refuses the value.
        """
        if len(data) != register.size:
            raise RegisterError(
                f"{len(data)} bytes for {register.name}", f"pass {register.size} bytes"
            )
        if self.read(register) == data:
            return
        value = int.from_bytes(data, "little")
        match register.source:
            case Source.GENERAL:
                setattr(self._regs, register.field, value)
                self._vcpu.set_regs(self._regs)
            case Source.FLOATING:
                _write_floating(self._xsave, register, data)
                self._vcpu.set_xsave(bytes(self._xsave))
            case Source.MSR:
                self._vcpu.set_msrs({register.number: value})
            case Source.SELECTOR:
                raise RegisterError(
                    f"{register.name} cannot be changed",
                    "its descriptor is loaded by the guest alone",
                )
            case _:
                self._change(register, value)

    def _change(self, register: Register, value: int) -> None:
        """Change struct kvm_sregs; after a refusal it is as KVM has it."""
        sregs = self._sregs
        try:
            if register.source is Source.CONTROL:
                setattr(sregs, register.field, value)
            else:
                part = getattr(sregs, register.field)
                setattr(part, register.source.name.lower(), value)
            self._vcpu.set_sregs(sregs)
        except OverflowError as error:
            raise RegisterError(f"{value:#x} for {register.name}", "give a smaller one") from error
        finally:
            del self.__dict__["_sregs"]


# ---- x87 and SSE ---------------------------------------------------------------------------------

# KVM_GET_FPU would do but for MXCSR, which it leaves out. The legacy region of the XSAVE area (SDM
# vol. 1, table 10-2) has 64-bit pointers; GDB's names are those of FSAVE's image, in which pointers
# have an offset and a selector (vol. 1, 8.1.10).
_PLACES: Final = {
    "fctrl": (0, 2),
    "fstat": (2, 2),
    "fop": (6, 2),
    "fioff": (8, 4),
    "fiseg": (12, 2),
    "fooff": (16, 4),
    "foseg": (20, 2),
    "mxcsr": (24, 4),
}
_STATUS: Final = 2
_TAGS: Final = 4
_ARRAYS: Final = {"st": 32, "xmm": 160}
_XSTATE_BV: Final = 512
_X87_AND_SSE: Final = 3  # bits of XSTATE_BV: the state is in the area


def _place(register: Register) -> slice:
    """Return where a register is in the area."""
    if register.field in _ARRAYS:
        start = _ARRAYS[register.field] + 16 * register.number
        return slice(start, start + register.size)
    start, size = _PLACES[register.field]
    return slice(start, start + size)


def _read_floating(area: bytearray, register: Register) -> bytes:
    if register.field == "ftag":
        return _full_tags(area).to_bytes(register.size, "little")
    return bytes(area[_place(register)]).ljust(register.size, b"\0")


def _write_floating(area: bytearray, register: Register, data: bytes) -> None:
    area[_XSTATE_BV] |= _X87_AND_SSE
    if register.field == "ftag":
        value = int.from_bytes(data, "little")
        area[_TAGS] = sum((value >> 2 * n & 3 != _EMPTY) << n for n in range(8))
    else:
        place = _place(register)
        area[place] = data[: place.stop - place.start]


_EMPTY: Final = 3


def _full_tags(area: bytearray) -> int:
    """Return the tag word with two bits for each register (SDM vol. 1, 8.1.7 and table 10-3)."""
    top = area[_STATUS + 1] >> 3 & 7
    tags = 0
    for physical in range(8):
        start = _ARRAYS["st"] + 16 * ((physical - top) % 8)
        present = area[_TAGS] >> physical & 1
        tags |= (_tag(bytes(area[start : start + 10])) if present else _EMPTY) << 2 * physical
    return tags


def _tag(value: bytes) -> int:
    """Return 0 for a valid number, 1 for zero, 2 for a special value."""
    exponent = int.from_bytes(value[8:], "little") & 0x7FFF
    significand = int.from_bytes(value[:8], "little")
    if not exponent and not significand:
        return 1
    return 0 if 0 < exponent < 0x7FFF and significand >> 63 else 2
