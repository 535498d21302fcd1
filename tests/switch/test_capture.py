"""The pcap reader and writer: what they accept, and one clear line for everything else."""

from __future__ import annotations

import contextlib
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.resources import CAPTURE
from pykvm.switch.capture import (
    CaptureError,
    EmptyCaptureError,
    ForeignCaptureError,
    Frame,
    FrameSizeError,
    LinkTypeError,
    TruncatedCaptureError,
    UnreadableCaptureError,
    read_capture,
    split_capture,
    write_capture,
)

pytestmark = pytest.mark.unit

FRAMES = [
    Frame(1_700_000_000_123_456_000, bytes(range(60))),
    Frame(1_700_000_001_000_007_000, b"\1" * 1514),
]


def pcap(
    order: str = "<",
    magic: int = 0xA1B2C3D4,
    link: int = 1,
    version: tuple[int, int] = (2, 4),
    packets: bytes = b"",
) -> bytes:
    return struct.pack(order + "IHHiIII", magic, *version, 0, 0, 65535, link) + packets


def packet(data: bytes, order: str = "<", original: int | None = None, fraction: int = 7) -> bytes:
    length = len(data) if original is None else original
    return struct.pack(order + "IIII", 1_700_000_000, fraction, len(data), length) + data


def test_the_stored_capture_is_what_its_note_says() -> None:
    frames = read_capture(CAPTURE)
    sizes = [len(frame.data) for frame in frames]
    assert (len(frames), min(sizes), max(sizes)) == (1227, 60, 1514)
    assert CAPTURE.stat().st_size < 1_000_000
    client, server = split_capture(frames)
    assert {frame.source for frame in client} == {b"\x02\0\0\0\0\x02"}
    assert {frame.source for frame in server} == {b"\x02\0\0\0\0\x01"}
    assert client[0] is frames[0]
    assert client[0].destination == b"\xff" * 6
    assert len(client) + len(server) == len(frames)
    times = [frame.time_ns for frame in frames]
    assert times == sorted(times)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "unit"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1)])
def test_both_byte_orders_and_both_fractions(
    tmp_path: Path, order: str, magic: int, unit: int
) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(pcap(order, magic, packets=packet(bytes(64), order)))
    assert read_capture(path) == [Frame(1_700_000_000_000_000_000 + 7 * unit, bytes(64))]


@pytest.mark.parametrize("nanoseconds", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, nanoseconds: bool) -> None:
    path = tmp_path / "x.pcap"
    write_capture(path, FRAMES, nanoseconds=nanoseconds)
    assert read_capture(path) == FRAMES


def test_any_cut_of_a_capture_is_refused_or_ends_between_frames(tmp_path: Path) -> None:
    whole, path = tmp_path / "x.pcap", tmp_path / "cut.pcap"
    write_capture(whole, FRAMES)
    data = whole.read_bytes()
    accepted, refusals = [], []
    for size in range(len(data)):
        path.write_bytes(data[:size])
        try:
            accepted.append(read_capture(path))
        except CaptureError as error:
            refusals.append(str(error))
    assert accepted == [FRAMES[:1]]
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


@given(st.binary(max_size=200))
def test_no_file_breaks_the_reader(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pcap") as file:
        for content in (data, pcap(packets=data), pcap(packets=packet(bytes(64)) + data)):
            file.seek(0)
            file.truncate()
            file.write(content)
            file.flush()
            frames = []
            with contextlib.suppress(CaptureError):
                frames = read_capture(file.name)
            assert all(14 <= len(frame.data) <= 1514 for frame in frames)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", ForeignCaptureError, "no pcap file"),
        (b"\x7fELF" + bytes(60), ForeignCaptureError, "no pcap file"),
        (b"\x0a\x0d\x0d\x0a" + bytes(60), ForeignCaptureError, "pcapng: convert it with `editcap"),
        (pcap()[:20], TruncatedCaptureError, "ends inside its header"),
        (pcap(version=(1, 2)), ForeignCaptureError, "version 1.2"),
        (pcap(link=113), LinkTypeError, "link type 113"),
        (pcap(), EmptyCaptureError, "holds no frames"),
        (pcap(packets=packet(bytes(64)) + b"\0" * 9), TruncatedCaptureError, "header of frame 2"),
        (pcap(packets=packet(bytes(64))[:-1]), TruncatedCaptureError, "inside frame 1"),
        (
            pcap(packets=packet(bytes(64)) + packet(bytes(60), original=700)),
            TruncatedCaptureError,
            "frame 2 has 60 of 700 bytes",
        ),
        (pcap(packets=packet(bytes(13))), FrameSizeError, "frame 1 has 13 bytes"),
        (pcap(packets=packet(bytes(64)) * 2 + packet(bytes(1515))), FrameSizeError, "frame 3 has"),
    ],
)
def test_what_is_refused_and_why(
    tmp_path: Path, content: bytes, kind: type[CaptureError], message: str
) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as refusal:
        read_capture(path)
    assert type(refusal.value) is kind
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_longer_limit_takes_longer_frames(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    write_capture(path, [Frame(0, bytes(2040))])
    assert len(read_capture(path, frame_limit=2040)[0].data) == 2040
    with pytest.raises(FrameSizeError, match="takes 14 to 1514"):
        read_capture(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCaptureError, match="No such file or directory: name a pcap"):
        read_capture(tmp_path / "none.pcap")
    with pytest.raises(UnreadableCaptureError, match="Is a directory"):
        read_capture(tmp_path)


def test_a_monologue_cannot_be_split() -> None:
    with pytest.raises(EmptyCaptureError, match="one station"):
        split_capture([Frame(0, bytes(60))] * 3)
    with pytest.raises(EmptyCaptureError, match="no frames to split"):
        split_capture([])
