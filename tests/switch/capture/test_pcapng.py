"""The pcapng format, which Wireshark writes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pykvm.switch.capture import (
    CaptureError,
    CutFrameError,
    DamagedCaptureError,
    EmptyCaptureError,
    ForeignCaptureError,
    Frame,
    LinkTypeError,
    TruncatedCaptureError,
    encode_capture,
    read_capture,
)
from tests.rigs.switch.capture_files import A, B, block, enhanced, interface, option, section

pytestmark = pytest.mark.unit

ONE, OTHER = B + A + bytes(range(61)), A + B + bytes(50)


def read(tmp_path: Path, content: bytes) -> list[Frame]:
    path = tmp_path / "x.pcapng"
    path.write_bytes(content)
    return read_capture(path).frames


@pytest.mark.parametrize("order", ["<", ">"])
def test_packets_of_each_kind_of_block(tmp_path: Path, order: str) -> None:
    old = struct.pack(order + "HHIIII", 0, 9, 0, 7, len(OTHER), len(OTHER)) + OTHER
    simple = struct.pack(order + "I", len(ONE)) + ONE
    frames = read(
        tmp_path,
        section(order)
        + interface(order=order)
        + block(5, bytes(12), order)  # statistics
        + enhanced(ONE, order=order)
        + block(2, old, order)
        + block(0x0BAD, b"custom", order)
        + block(3, simple, order),
    )
    assert frames == [Frame(7000, ONE), Frame(7000, OTHER), Frame(0, ONE)]
    assert [frame.number for frame in frames] == [1, 2, 3]


def test_sections_have_byte_orders_and_interfaces_of_their_own(tmp_path: Path) -> None:
    frames = read(
        tmp_path,
        section("<") + interface() + interface(113) + enhanced(ONE)
        + section(">") + interface(order=">") + enhanced(OTHER, order=">"),
    )  # fmt: skip
    assert [frame.data for frame in frames] == [ONE, OTHER]


@pytest.mark.parametrize(
    ("options", "time", "time_ns"),
    [
        (b"", 1_700_000_000_000_001, 1_700_000_000_000_001_000),
        (option(9, b"\x09"), 1_700_000_000_000_000_001, 1_700_000_000_000_000_001),
        (option(9, b"\x83"), 12, 1_500_000_000),  # in eighths of a second
        (option(14, struct.pack("<q", -5)), 7_000_000, 2_000_000_000),
        (option(1, b"a remark") + option(9, b"\0"), 3, 3_000_000_000),
        (option(0, b"") + option(9, b"\0"), 3, 3_000),  # after the end
    ],
)
def test_units_of_time(tmp_path: Path, options: bytes, time: int, time_ns: int) -> None:
    content = section() + interface(options=options) + enhanced(ONE, time=time)
    assert read(tmp_path, content) == [Frame(time_ns, ONE)]


@pytest.mark.parametrize("length", [4, 32])
def test_the_checksum_of_an_interface(tmp_path: Path, length: int) -> None:
    """The length is in bits by the draft, and in bytes by its example and for Wireshark."""
    content = section() + interface(options=option(13, bytes([length]))) + enhanced(ONE + bytes(4))
    assert [frame.data for frame in read(tmp_path, content)] == [ONE]


def test_the_checksum_of_one_packet(tmp_path: Path) -> None:
    flags = option(2, struct.pack("<I", 1 | 4 << 5))
    content = section() + interface() + enhanced(ONE + bytes(4), flags) + enhanced(OTHER)
    assert [frame.data for frame in read(tmp_path, content)] == [ONE, OTHER]


def test_any_cut_is_refused_or_ends_between_blocks(tmp_path: Path) -> None:
    whole = section() + interface() + enhanced(ONE) + enhanced(OTHER)
    accepted, refusals = [], []
    for size in range(1, len(whole)):
        try:
            accepted.append(read(tmp_path, whole[:size]))
        except CaptureError as error:
            refusals.append(error)
    assert [len(frames) for frames in accepted] == [1]
    kinds = {type(error) for error in refusals}
    assert kinds == {ForeignCaptureError, TruncatedCaptureError, EmptyCaptureError}
    assert "ends inside the block of frame 2" in str(refusals[-1])


@pytest.mark.parametrize(
    ("content", "kind", "problem"),
    [
        (section(version=2), ForeignCaptureError, "has pcapng version 2, not 1"),
        (section()[:8] + bytes(4) + section()[12:], DamagedCaptureError, "of no byte order"),
        (section(), EmptyCaptureError, "holds no frames"),
        (section() + enhanced(ONE), DamagedCaptureError, "belongs to interface 0, of which"),
        (
            section() + interface() + enhanced(ONE, index=1),
            DamagedCaptureError,
            "belongs to interface 1, of which",
        ),
        (
            section() + interface() + interface(127) + enhanced(ONE, index=1),
            LinkTypeError,
            "Wi-Fi frames of monitor mode (link type 127)",
        ),
        (
            section() + interface() + enhanced(ONE, captured=200, original=200),
            DamagedCaptureError,
            "claims to hold 200 bytes, in a block with room for less",
        ),
        (
            section() + interface() + enhanced(ONE, original=70),
            DamagedCaptureError,
            "record 1 is damaged: it claims to hold 73 of 70 bytes",
        ),
        (
            section() + interface() + enhanced(ONE, original=700),
            CutFrameError,
            "frame 1 was cut to 73 of 700 bytes",
        ),
        (
            section() + interface(snapshot=60) + block(3, struct.pack("<I", 73) + ONE[:60]),
            CutFrameError,
            "frame 1 was cut to 60 of 73 bytes",
        ),
        (section() + block(1, b"\1\0"), DamagedCaptureError, "is too short for its kind"),
        (section() + b"\6\0\0\0\7\0\0\0" + bytes(9), DamagedCaptureError, "is a block of 7 bytes"),
        (
            section() + interface()[:-4] + bytes(4),
            DamagedCaptureError,
            "is a block of 20 bytes that ends with another size",
        ),
    ],
)
def test_what_is_refused_and_why(
    tmp_path: Path, content: bytes, kind: type[CaptureError], problem: str
) -> None:
    with pytest.raises(CaptureError) as refusal:
        read(tmp_path, content)
    assert type(refusal.value) is kind
    assert problem in refusal.value.problem
    assert refusal.value.next_step


def test_what_another_format_says_of_the_same_packets(tmp_path: Path) -> None:
    frames = read(
        tmp_path, section() + interface() + enhanced(ONE, time=5) + enhanced(OTHER, time=6)
    )
    path = tmp_path / "x.pcap"
    path.write_bytes(encode_capture(frames))
    assert read_capture(path).frames == frames
