"""pykvm.devices.virtio.vhost_user_messages: layouts, and bytes of any kind."""

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.vhost_user_messages import (
    LONGEST_REPLY,
    MalformedMessageError,
    Request,
    SharedRegion,
)

pytestmark = pytest.mark.unit


def test_a_request() -> None:
    assert messages.request(Request.SET_OWNER) == struct.pack("=III", 3, 1, 0)
    whole = messages.request(Request.SET_FEATURES, messages.number(1 << 32), need_reply=True)
    assert whole == struct.pack("=IIIQ", 2, 9, 8, 1 << 32)


def test_payloads() -> None:
    assert messages.ring_state(3, 256) == struct.pack("=II", 3, 256)
    assert messages.ring_addresses(1, 0x1000, 0x3000, 0x2000) == struct.pack(
        "=IIQQQQ", 1, 0, 0x1000, 0x3000, 0x2000, 0
    )
    assert messages.ring_file(2) == struct.pack("=Q", 2)
    region = SharedRegion(gpa=1 << 32, size=0x2000, offset=0x1000, fd=5)
    described = struct.pack("=QQQQ", 1 << 32, 0x2000, 1 << 32, 0x1000)
    assert messages.memory_table([region]) == struct.pack("=II", 1, 0) + described
    assert messages.memory_region(region) == bytes(8) + described
    assert messages.config(4, b"ab") == struct.pack("=III", 4, 2, 0) + b"ab"


def test_replies() -> None:
    header = messages.parse_header(messages.acknowledgement(2, 1)[:12])
    assert (header.code, header.size, header.is_reply, header.need_reply) == (2, 8, True, False)
    assert messages.parse_number(struct.pack("=Q", 7)) == 7
    assert messages.parse_ring_state(struct.pack("=II", 1, 9), 1) == 9
    assert messages.parse_config(struct.pack("=III", 0, 2, 0) + b"ab", 0, 2) == b"ab"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        bytes(12),  # version 0
        struct.pack("=III", 1, 2, 8),  # version 2
        struct.pack("=III", 1, 0x15, 8),  # a flag that does not exist
        struct.pack("=III", 1, 5, LONGEST_REPLY + 1),
        struct.pack("=III", 1, 5, 0xFFFF_FFFF),
        struct.pack("=II", 1, 5),
    ],
)
def test_a_header_that_cannot_be(header: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        messages.parse_header(header)


@pytest.mark.parametrize(
    ("parse", "payload", "arguments"),
    [
        (messages.parse_number, bytes(7), ()),
        (messages.parse_number, bytes(9), ()),
        (messages.parse_ring_state, bytes(7), (0,)),
        (messages.parse_ring_state, struct.pack("=II", 1, 0), (0,)),
        (messages.parse_config, b"", (0, 2)),
        (messages.parse_config, struct.pack("=III", 0, 2, 0) + b"abc", (0, 2)),
        (messages.parse_config, struct.pack("=III", 1, 2, 0) + b"ab", (0, 2)),
        (messages.parse_config, struct.pack("=III", 0, 3, 0) + b"ab", (0, 2)),
    ],
)
def test_a_payload_that_cannot_be(parse: Any, payload: bytes, arguments: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessageError) as caught:
        parse(payload, *arguments)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=64))
def test_any_bytes_as_a_header(data: bytes) -> None:
    """A header is refused, or what it says is what its bytes say, and bounded."""
    try:
        header = messages.parse_header(data)
    except MalformedMessageError:
        return
    code, flags, size = struct.unpack("=III", data)
    assert (header.code, header.size) == (code, size)
    assert size <= LONGEST_REPLY
    assert flags == 1 | header.is_reply << 2 | header.need_reply << 3


@given(st.binary(max_size=LONGEST_REPLY), st.integers(0, 300), st.integers(0, 256))
def test_any_bytes_as_a_payload(data: bytes, offset: int, size: int) -> None:
    """A payload is refused, or has the length that was asked for."""
    with contextlib.suppress(MalformedMessageError):
        assert messages.config(offset, messages.parse_config(data, offset, size))[:8] == data[:8]
    with contextlib.suppress(MalformedMessageError):
        assert messages.number(messages.parse_number(data)) == data
    with contextlib.suppress(MalformedMessageError):
        assert messages.ring_state(size, messages.parse_ring_state(data, size)) == data
