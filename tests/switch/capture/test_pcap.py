"""The classic format, read and written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.resources import CAPTURE
from pykvm.switch.capture import (
    CaptureError,
    DamagedCaptureError,
    EmptyCaptureError,
    ForeignCaptureError,
    Frame,
    LinkTypeError,
    TruncatedCaptureError,
    encode_capture,
    read_capture,
    split_capture,
    write_capture,
)
from tests.rigs.switch.capture_files import A, B, packet, pcap

pytestmark = pytest.mark.unit

ONE = B + A + bytes(range(60))
FRAMES = [Frame(1_700_000_000_123_456_000, ONE), Frame(1_700_000_001_000_007_000, b"\1" * 1514)]


def test_the_stored_capture_is_what_its_note_says() -> None:
    capture = read_capture(CAPTURE)
    sizes = [len(frame.data) for frame in capture.frames]
    assert (len(sizes), min(sizes), max(sizes)) == (1227, 60, 1514)
    assert CAPTURE.stat().st_size < 1_000_000
    assert [frame.number for frame in capture.frames] == list(range(1, 1228))
    client, server = split_capture(capture).sent
    assert {frame.source for frame in client} == {b"\x02\0\0\0\0\x02"}
    assert {frame.source for frame in server} == {b"\x02\0\0\0\0\x01"}
    assert client[0] is capture.frames[0]
    assert client[0].destination == b"\xff" * 6
    assert len(client) + len(server) == len(sizes)
    times = [frame.time_ns for frame in capture.frames]
    assert times == sorted(times)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "unit"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1)])
def test_both_byte_orders_and_both_fractions(
    tmp_path: Path, order: str, magic: int, unit: int
) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(pcap(packet(ONE, order=order), order=order, magic=magic))
    assert read_capture(path).frames == [Frame(1_700_000_000_000_000_000 + 7 * unit, ONE)]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("words", "fcs"), [(0, b""), (1, b"\1\2"), (2, b"\1\2\3\4"), (15, bytes(30))]
)
def test_a_checksum_that_is_announced_is_taken_off(
    tmp_path: Path, order: str, words: int, fcs: bytes
) -> None:
    """Bit 26 of the link type's field announces the checksum.

    Its length in 16-bit words is above bit 28.
    """
    path = tmp_path / "x.pcap"
    packets = packet(ONE + fcs, order=order) + packet(ONE, order=order, original=len(ONE + fcs))
    path.write_bytes(pcap(packets, order=order, link=1 | 1 << 26 | words << 28))
    assert [frame.data for frame in read_capture(path).frames] == [ONE, ONE]


def test_other_bits_beside_the_link_type_are_ignored(tmp_path: Path) -> None:
    """The draft demands it of readers; a length without the announcing bit is ignored too."""
    path = tmp_path / "x.pcap"
    path.write_bytes(pcap(packet(ONE), link=1 | 0xF3FF << 16))
    assert [frame.data for frame in read_capture(path).frames] == [ONE]
    path.write_bytes(pcap(packet(ONE), link=113 | 1 << 26 | 2 << 28))
    with pytest.raises(LinkTypeError, match=r"\(link type 113\)"):
        read_capture(path)


@pytest.mark.parametrize("nanoseconds", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, nanoseconds: bool) -> None:
    path = tmp_path / "x.pcap"
    write_capture(path, FRAMES, nanoseconds=nanoseconds)
    assert read_capture(path).frames == FRAMES


@given(st.integers())
def test_times_beyond_the_format_become_the_nearest(time_ns: int) -> None:
    for nanoseconds in (False, True):
        written = encode_capture([Frame(time_ns, ONE)], nanoseconds=nanoseconds)
        seconds = int.from_bytes(written[24:28], "little")
        assert seconds == min(max(time_ns // 1_000_000_000, 0), 0xFFFF_FFFF)


def test_any_cut_of_a_capture_is_refused_or_ends_between_frames(tmp_path: Path) -> None:
    path = tmp_path / "cut.pcap"
    data = encode_capture(FRAMES)
    accepted, refusals = [], []
    for size in range(len(data)):
        path.write_bytes(data[:size])
        try:
            accepted.append(read_capture(path).frames)
        except CaptureError as error:
            refusals.append(str(error))
    assert accepted == [FRAMES[:1]]
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("content", "kind", "problem", "next_step"),
    [
        (pcap()[:20], TruncatedCaptureError, "ends inside its header", "copy or capture it again"),
        (
            pcap(version=(1, 2)),
            ForeignCaptureError,
            "version 1.2, not 2.4",
            "`editcap -F pcap FILE out.pcap`",
        ),
        (pcap(), EmptyCaptureError, "holds no frames", "capture some traffic first"),
        (
            pcap(packet(ONE) + b"\0" * 9),
            TruncatedCaptureError,
            "ends inside the header of frame 2: the capture or a copy was cut short",
            "keep the 1 whole ones: `tcpdump -r FILE -w whole.pcap`",
        ),
        (
            pcap(packet(ONE)[:-1]),
            TruncatedCaptureError,
            "ends inside the bytes of frame 1",
            "copy or capture it again",
        ),
        (
            pcap(packet(ONE) * 2 + packet(ONE, captured=1 << 20, original=1 << 20)),
            DamagedCaptureError,
            "record 3 is damaged: it claims to hold 1048576 bytes",
            "keep the 2 in front of it: `tcpdump -r FILE -w good.pcap -c 2`",
        ),
        (
            pcap(packet(ONE, original=20)),
            DamagedCaptureError,
            "record 1 is damaged: it claims to hold 72 of 20 bytes",
            "copy or capture it again",
        ),
    ],
)
def test_what_is_refused_and_why(
    tmp_path: Path, content: bytes, kind: type[CaptureError], problem: str, next_step: str
) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(content)
    with pytest.raises(CaptureError) as refusal:
        read_capture(path)
    assert type(refusal.value) is kind
    assert problem in refusal.value.problem
    assert refusal.value.problem.startswith(str(path))
    assert next_step.replace("FILE", str(path)) in refusal.value.next_step


@pytest.mark.parametrize(
    ("link", "what"),
    [
        (0, "loopback or tunnel interface"),
        (108, "loopback or tunnel interface"),
        (101, "bare IP packets"),
        (113, "all interfaces (`any`)"),
        (276, "all interfaces (`any`)"),
        (127, "Wi-Fi frames of monitor mode"),
        (220, "USB transfers"),
        (147, "no Ethernet frames"),
    ],
)
def test_captures_of_something_else(tmp_path: Path, link: int, what: str) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(pcap(packet(bytes(80)), link=link))
    with pytest.raises(LinkTypeError) as refusal:
        read_capture(path)
    assert what in refusal.value.problem
    assert refusal.value.problem.endswith(f"(link type {link})")
    assert "`tcpdump -i eth0 -w FILE`" in refusal.value.next_step
