"""The vhost-user protocol's messages as bytes: numbers, headers and payloads, without a socket.

Source: QEMU docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from pykvm.errors import PykvmError

__all__ = [
    "ALWAYS_ANSWERED",
    "CLASSIC_REGIONS",
    "HEADER_SIZE",
    "LONGEST_CONFIG",
    "LONGEST_REPLY",
    "BackendRequest",
    "Header",
    "MalformedMessageError",
    "ProtocolFeature",
    "Request",
    "SharedRegion",
    "acknowledgement",
    "config",
    "memory_region",
    "memory_table",
    "number",
    "parse_config",
    "parse_header",
    "parse_number",
    "parse_ring_state",
    "request",
    "ring_addresses",
    "ring_file",
    "ring_state",
]


class MalformedMessageError(PykvmError, ValueError):
    """Bytes that are not the vhost-user message that belongs here."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "use a back end that follows QEMU's vhost-user specification")


class Request(IntEnum):
    """Requests of the front end ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


ALWAYS_ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_VRING_BASE,
        Request.GET_CONFIG,
        Request.GET_MAX_MEM_SLOTS,
    }
)
"""Requests with a reply of their own, with or without REPLY_ACK."""


class BackendRequest(IntEnum):
    """Requests of the back end that a front end without an IOMMU can meet."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(IntFlag):
    """Protocol features that this front end may use ("Protocol features")."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15


CLASSIC_REGIONS: Final = 8
"""Regions that SET_MEM_TABLE can hold."""

LONGEST_CONFIG: Final = 256
"""Bytes of configuration in one message, as QEMU and its back ends have them."""

_HEADER: Final = struct.Struct("=III")
_CONFIG: Final = struct.Struct("=III")
_NUMBER: Final = struct.Struct("=Q")
_RING_STATE: Final = struct.Struct("=II")
_RING_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_REGION: Final = struct.Struct("=QQQQ")

HEADER_SIZE: Final = _HEADER.size
LONGEST_REPLY: Final = _CONFIG.size + LONGEST_CONFIG

_VERSION: Final = 1
_VERSION_MASK: Final = 3
_REPLY: Final = 1 << 2
_NEED_REPLY: Final = 1 << 3
_KNOWN_FLAGS: Final = _VERSION_MASK | _REPLY | _NEED_REPLY


@dataclass(frozen=True, slots=True)
class Header:
    """The first bytes of a message.

    Attributes:
        code: number of the request.
        size: bytes of the payload.
        is_reply: whether it answers a request.
        need_reply: whether the sender waits for an acknowledgement.
    """

    code: int
    size: int
    is_reply: bool
    need_reply: bool


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A part of guest memory as a back end maps it.

    Attributes:
        gpa: guest physical address.
        size: bytes.
        offset: where the descriptor's file has its first byte.
        fd: descriptor of the file.
    """

    gpa: int
    size: int
    offset: int
    fd: int


def request(code: Request, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """Return a whole message of the front end."""
    flags = _VERSION | (_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(code, flags, len(payload)) + payload


def acknowledgement(code: int, status: int) -> bytes:
    """Return a reply to a request of the back end; status 0 is success."""
    return _HEADER.pack(code, _VERSION | _REPLY, _NUMBER.size) + _NUMBER.pack(status)


def parse_header(data: bytes) -> Header:
    """Return what the first `HEADER_SIZE` bytes of a message say.

    Raises:
        MalformedMessageError: their length, version, flags or size cannot be.
    """
    if len(data) != HEADER_SIZE:
        raise MalformedMessageError(f"a vhost-user header of {len(data)} bytes")
    code, flags, size = _HEADER.unpack(data)
    if flags & _VERSION_MASK != _VERSION or flags & ~_KNOWN_FLAGS:
        raise MalformedMessageError(f"a vhost-user message with flags {flags:#x}")
    if size > LONGEST_REPLY:
        raise MalformedMessageError(f"a vhost-user message of {size} bytes")
    return Header(code, size, bool(flags & _REPLY), bool(flags & _NEED_REPLY))


def number(value: int) -> bytes:
    """Return a payload of 64 bits."""
    return _NUMBER.pack(value)


def parse_number(payload: bytes) -> int:
    """Return the number of a payload of 64 bits.

    Raises:
        MalformedMessageError: it has another length.
    """
    _require_size(payload, _NUMBER.size)
    return int(_NUMBER.unpack(payload)[0])


def ring_state(index: int, value: int) -> bytes:
    """Return the payload that gives a ring a number: its size, base, or whether it is enabled."""
    return _RING_STATE.pack(index, value)


def parse_ring_state(payload: bytes, index: int) -> int:
    """Return the number that a payload gives for the ring `index`.

    Raises:
        MalformedMessageError: it has another length or is about another ring.
    """
    _require_size(payload, _RING_STATE.size)
    about, value = _RING_STATE.unpack(payload)
    if about != index:
        raise MalformedMessageError(f"a reply about ring {about} where ring {index} was asked for")
    return int(value)


def ring_addresses(index: int, descriptors: int, used: int, available: int) -> bytes:
    """Return the payload of SET_VRING_ADDR: user addresses, without a log of writes."""
    return _RING_ADDRESSES.pack(index, 0, descriptors, used, available, 0)


def ring_file(index: int) -> bytes:
    """Return the payload that goes with an eventfd of a ring."""
    return _NUMBER.pack(index)


def memory_table(regions: Sequence[SharedRegion]) -> bytes:
    """Return the payload of SET_MEM_TABLE. Guest memory's user addresses are its GPAs."""
    head = _RING_STATE.pack(len(regions), 0)
    return head + b"".join(_region(region) for region in regions)


def memory_region(region: SharedRegion) -> bytes:
    """Return the payload of ADD_MEM_REG and REM_MEM_REG."""
    return _NUMBER.pack(0) + _region(region)


def _region(region: SharedRegion) -> bytes:
    # The "user address" is a name for memory that ring addresses use. The GPA does as well as
    # the address in this process, and gives a back end no idea of the layout here.
    return _REGION.pack(region.gpa, region.size, region.gpa, region.offset)


def config(offset: int, data: bytes) -> bytes:
    """Return the payload of SET_CONFIG, and of GET_CONFIG with as many zeros as are asked for."""
    return _CONFIG.pack(offset, len(data), 0) + data


def parse_config(payload: bytes, offset: int, size: int) -> bytes:
    """Return the bytes of configuration in a reply to GET_CONFIG.

    Raises:
        MalformedMessageError: they are others than those that were asked for.
    """
    if not payload:
        raise MalformedMessageError("a back end that refuses to show its configuration")
    _require_size(payload, _CONFIG.size + size)
    at, length, _ = _CONFIG.unpack_from(payload)
    if (at, length) != (offset, size):
        raise MalformedMessageError(
            f"{length} bytes of configuration at {at} where {size} at {offset} were asked for"
        )
    return payload[_CONFIG.size :]


def _require_size(payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise MalformedMessageError(f"a vhost-user payload of {len(payload)} bytes, not {size}")
