"""MAC addresses of guests: written by a user, or derived from a machine's name.

Source: IEEE 802-2014, 8.2: in the first octet bit 0 marks groups, bit 1 locally administered ones.
"""

from __future__ import annotations

import hashlib
import re

from pykvm.errors import PykvmError

__all__ = ["MacAddressError", "mac_address", "parse_mac"]

_GROUP = 0x01
_LOCAL = 0x02


class MacAddressError(PykvmError, ValueError):
    """Text that is no MAC address of an interface."""


def mac_address(machine: str, index: int = 0) -> str:
    """Return the locally administered MAC address of a machine's interface.

    It depends on nothing but the arguments, so a machine keeps its address, and the lease that goes
    with it, from one run to the next. Two names have the same address with a probability of 2**-46.

    Args:
        machine: the machine's name.
        index: number of the interface, from 0 on.
    """
    octets = bytearray(hashlib.sha256(f"pykvm\0{machine}\0{index}".encode()).digest()[:6])
    octets[0] = octets[0] & ~_GROUP | _LOCAL
    return octets.hex(":")


def parse_mac(text: str) -> str:
    """Return a MAC address in lower case, with colons.

    Raises:
        MacAddressError: it is none, or that of a group, or zero.
    """
    if not re.fullmatch(r"[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}", text, re.ASCII | re.IGNORECASE):
        raise MacAddressError(
            f"{text!r} is no MAC address", "write six octets such as 02:00:00:12:34:56"
        )
    octets = bytes.fromhex(re.sub("[:-]", "", text))
    if octets[0] & _GROUP:
        raise MacAddressError(
            f"{text} is the address of a group", "use an even first octet such as 02"
        )
    if not any(octets):
        raise MacAddressError(
            f"{text} is the address of nobody", "use one such as 02:00:00:12:34:56"
        )
    return octets.hex(":")
