"""Registers of a paused vCPU as bytes in GDB's order (`target_description.REGISTERS`)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.inspect.gdb.target_description import REGISTERS, Register, Source
from pykvm.kvm import KvmError, Struct, Vcpu, ffi

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
    def _fpu(self) -> Struct:
        return self._vcpu.get_fpu()

    # ---- reading ----------------------------------------------------------------------------

    def read_all(self) -> list[bytes | None]:
        """Return the values of all registers, little-endian; None for one that KVM has not."""
        return [self.read(register) for register in REGISTERS]

    def read(self, register: Register) -> bytes | None:
        """Return the value of a register, little-endian, or None if KVM does not have it."""
        if register.source is Source.FLOATING:
            return _read_floating(self._fpu, register)
        try:
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
                _write_floating(self._fpu, register, data)
                self._vcpu.set_fpu(self._fpu)
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

# GDB's names are those of FSAVE's image, in which pointers have an offset and a selector (SDM
# vol. 1, 8.1.10); struct kvm_fpu has FXSAVE's, with 64-bit pointers (vol. 1, 10.5.1).
_POINTERS: Final = {
    "fiseg": ("last_ip", 32, 0xFFFF),
    "fioff": ("last_ip", 0, 0xFFFF_FFFF),
    "foseg": ("last_dp", 32, 0xFFFF),
    "fooff": ("last_dp", 0, 0xFFFF_FFFF),
}
_WORDS: Final = {"fctrl": "fcw", "fstat": "fsw", "fop": "last_opcode", "mxcsr": "mxcsr"}


def _read_floating(fpu: Struct, register: Register) -> bytes:
    if register.field in ("fpr", "xmm"):
        return ffi.buffer(getattr(fpu, register.field)[register.number])[: register.size]
    return _floating_control(fpu, register.field).to_bytes(register.size, "little")


def _floating_control(fpu: Struct, name: str) -> int:
    if name == "ftag":
        return _full_tags(fpu)
    if name in _POINTERS:
        field, shift, mask = _POINTERS[name]
        return int(getattr(fpu, field)) >> shift & mask
    return int(getattr(fpu, _WORDS[name]))


def _write_floating(fpu: Struct, register: Register, data: bytes) -> None:
    name = register.field
    if name in ("fpr", "xmm"):
        ffi.buffer(getattr(fpu, name)[register.number])[: register.size] = data
        return
    value = int.from_bytes(data, "little")
    if name == "ftag":
        fpu.ftwx = sum((value >> 2 * n & 3 != 3) << n for n in range(8))
    elif name in _POINTERS:
        field, shift, mask = _POINTERS[name]
        setattr(fpu, field, getattr(fpu, field) & ~(mask << shift) | (value & mask) << shift)
    else:
        setattr(fpu, _WORDS[name], value if name == "mxcsr" else value & 0xFFFF)


_EMPTY: Final = 3


def _full_tags(fpu: Struct) -> int:
    """Return the tag word with two bits for each register (SDM vol. 1, 8.1.7 and table 10-3)."""
    top = fpu.fsw >> 11 & 7
    tags = 0
    for physical in range(8):
        present = fpu.ftwx >> physical & 1
        value = ffi.buffer(fpu.fpr[(physical - top) % 8])[:10]
        tags |= (_tag(value) if present else _EMPTY) << 2 * physical
    return tags


def _tag(value: bytes) -> int:
    """Return 0 for a valid number, 1 for zero, 2 for a special value."""
    exponent = int.from_bytes(value[8:], "little") & 0x7FFF
    significand = int.from_bytes(value[:8], "little")
    if not exponent and not significand:
        return 1
    return 0 if 0 < exponent < 0x7FFF and significand >> 63 else 2
