"""Packets that read and write registers and memory: g, G, p, P, m, M and X.

Each function takes a paused vCPU, and what follows the packet's letter.
"""

from __future__ import annotations

from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.address_space import AddressSpace
from pykvm.inspection.gdb.arguments import ArgumentError, number, numbers, octets
from pykvm.inspection.gdb.packets import PACKET_SIZE
from pykvm.inspection.gdb.registers import Registers
from pykvm.inspection.gdb.target_description import REGISTERS, Register
from pykvm.kvm import Vcpu

__all__ = [
    "OK",
    "read_memory",
    "read_register",
    "read_registers",
    "write_memory",
    "write_register",
    "write_registers",
]

OK: Final = b"OK"
_NO_MEMORY: Final = b"E0e"  # EFAULT; GDB wants two digits here

_MOST_BYTES: Final = PACKET_SIZE // 2


def read_registers(vcpu: Vcpu) -> bytes:
    """Answer g."""
    return b"".join(map(_digits, Registers(vcpu).read_all(), REGISTERS))


def write_registers(vcpu: Vcpu, rest: str) -> bytes:
    """Answer G.

    Raises:
        ArgumentError: the length is wrong.
        RegisterError: see `Registers.write`. Those before are set.
        KvmError: KVM refuses a value.
    """
    data = octets(rest)
    if len(data) != sum(register.size for register in REGISTERS):
        raise ArgumentError
    registers, start = Registers(vcpu), 0
    for register in REGISTERS:
        if registers.read(register) is not None:
            registers.write(register, data[start : start + register.size])
        start += register.size
    return OK


def read_register(vcpu: Vcpu, rest: str) -> bytes:
    """Answer p."""
    register = _register(rest)
    return _digits(Registers(vcpu).read(register), register)


def write_register(vcpu: Vcpu, rest: str) -> bytes:
    """Answer P.

    Raises:
        RegisterError: see `Registers.write`.
        KvmError: KVM refuses the value.
    """
    name, _, value = rest.partition("=")
    Registers(vcpu).write(_register(name), octets(value))
    return OK


def _register(digits: str) -> Register:
    index = number(digits)
    if index >= len(REGISTERS):
        raise ArgumentError
    return REGISTERS[index]


def _digits(value: bytes | None, register: Register) -> bytes:
    return b"xx" * register.size if value is None else value.hex().encode()


def read_memory(space: AddressSpace, rest: str) -> bytes:
    """Answer m; with fewer bytes than asked for where the packet or the memory ends."""
    address, size = numbers(rest, 2)
    data = space.read(address, min(size, _MOST_BYTES))
    return data.hex().encode() if data or not size else _NO_MEMORY


def write_memory(space: AddressSpace, rest: str, *, binary: bool) -> bytes:
    """Answer M or, if `binary`, X."""
    place, _, body = rest.partition(":")
    address, size = numbers(place, 2)
    data = body.encode("latin-1") if binary else octets(body)
    if len(data) != size:
        raise ArgumentError
    try:
        space.write(address, data)
    except PykvmError:
        return _NO_MEMORY
    return OK
