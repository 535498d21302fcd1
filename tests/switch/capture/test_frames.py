"""Records that are frames of the switch, and the errors for all others."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from pykvm.switch.capture import (
    CaptureError,
    CutFrameError,
    Frame,
    FrameSizeError,
    LoopbackCaptureError,
    encode_capture,
    read_capture,
)
from tests.rigs.switch.capture_files import A, B, packet, pcap

pytestmark = pytest.mark.unit

TAG, SERVICE_TAG = b"\x81\x00\x00\x64", b"\x88\xa8\xe0\x0a"
IP = b"\x08\x00"


def of_size(size: int, tags: bytes = b"") -> bytes:
    return (B + A + tags + IP).ljust(size, b"\x5a")


def refusal(path: Path, content: bytes) -> CaptureError:
    path.write_bytes(content)
    with pytest.raises(CaptureError) as caught:
        read_capture(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("tags", "size"),
    [
        (b"", 14),
        (b"", 1514),
        (TAG, 18),
        (TAG, 1518),
        (SERVICE_TAG, 1518),
        (SERVICE_TAG + TAG, 1522),
        (TAG * 8, 1546),
    ],
)
def test_four_bytes_more_for_each_tag(tmp_path: Path, tags: bytes, size: int) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(encode_capture([Frame(0, of_size(size, tags))]))
    assert read_capture(path).frames[0].data == of_size(size, tags)
    if size > 1500:
        error = refusal(path, encode_capture([Frame(0, of_size(size + 1, tags))]))
        assert type(error) is FrameSizeError
        assert f"frame 1 has {size + 1} bytes, more than the {size} of one" in error.problem


def test_a_ninth_tag_does_not_count(tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.pcap", encode_capture([Frame(0, of_size(1550, TAG * 9))]))
    assert "more than the 1546 of one" in error.problem


def test_another_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(encode_capture([Frame(0, of_size(2040, TAG))]))
    assert len(read_capture(path, frame_limit=2040).frames[0].data) == 2040
    path.write_bytes(encode_capture([Frame(0, of_size(2041, TAG))]))
    with pytest.raises(FrameSizeError, match="more than the 2040 of one"):
        read_capture(path, frame_limit=2040)


def test_frames_put_together_by_the_network_card(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    error = refusal(path, pcap(packet(of_size(60)) * 2 + packet(of_size(65000))))
    assert type(error) is FrameSizeError
    assert "frame 3 has 65000 bytes" in error.problem
    assert "(offload), or a jumbo frame" in error.problem
    assert "`ethtool -K eth0 gro off lro off gso off tso off`" in error.next_step
    assert f"`tcpdump -r {path} -w out.pcap less 1514`" in error.next_step


@pytest.mark.parametrize("tags", [b"", TAG])
def test_a_checksum_that_is_not_announced(tmp_path: Path, tags: bytes) -> None:
    path = tmp_path / "x.pcap"
    data = of_size(1514 + len(tags), tags)
    error = refusal(path, pcap(packet(data + zlib.crc32(data).to_bytes(4, "little"))))
    assert type(error) is FrameSizeError
    assert "with a checksum (FCS) that the capture does not announce" in error.problem
    assert error.next_step == f"take it off: `editcap -F pcap -L -C -4 {path} out.pcap`"


@pytest.mark.parametrize("size", [0, 1, 13])
def test_records_without_a_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.pcap"
    error = refusal(path, pcap(packet(of_size(60)) + packet(of_size(60)[:size])))
    assert type(error) is FrameSizeError
    assert f"frame 2 has {size} bytes, less than an Ethernet header" in error.problem
    assert f"`tcpdump -r {path} -w out.pcap greater 14`" in error.next_step


def test_records_with_nothing_but_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    error = refusal(path, pcap(packet(b"\1\2\3"), link=1 | 1 << 26 | 2 << 28))
    assert "frame 1 has 0 bytes" in error.problem
    assert f"`tcpdump -r {path} -w out.pcap greater 18`" in error.next_step


@pytest.mark.parametrize("size", [14, 15, 16, 17])
def test_a_frame_that_ends_inside_its_tag(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.pcap"
    error = refusal(path, pcap(packet(of_size(60, TAG)[:size])))
    assert type(error) is FrameSizeError
    assert "frame 1 ends inside its VLAN tag" in error.problem
    assert f"`tcpdump -r {path} -w out.pcap greater 18`" in error.next_step


def test_frames_cut_by_the_snapshot_length(tmp_path: Path) -> None:
    """The error is CutFrameError even if the frame was too long before it was cut."""
    for original in (700, 65000):
        cut = packet(of_size(96), original=original)
        error = refusal(tmp_path / "x.pcap", pcap(packet(of_size(60)) + cut))
        assert type(error) is CutFrameError
        assert f"frame 2 was cut to 96 of {original} bytes (snapshot length)" in error.problem
        assert "`tcpdump -s 0 -w FILE`" in error.next_step


def test_a_capture_that_was_cut_inside_the_checksum_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    data = of_size(60)
    path.write_bytes(pcap(packet(data + b"\1", original=64), link=1 | 1 << 26 | 2 << 28))
    assert [frame.data for frame in read_capture(path).frames] == [data]


@pytest.mark.parametrize("size", [60, 65549])
def test_linux_loopback_interface(tmp_path: Path, size: int) -> None:
    """`lo` claims to be an Ethernet; its frames have no addresses, and up to 65549 bytes."""
    error = refusal(tmp_path / "x.pcap", pcap(packet(bytes(12) + IP + bytes(size - 14))))
    assert type(error) is LoopbackCaptureError
    assert "frame 1 has no addresses, as on a loopback interface (`lo`)" in error.problem
    assert "`tcpdump -i eth0 -w FILE`" in error.next_step


def test_tags_and_vlan_of_a_frame() -> None:
    for tags, count, vlan in (
        (b"", 0, 0),
        (TAG, 1, 100),
        (SERVICE_TAG + TAG, 2, 10),
        (b"\x81\x00\xe0\x00", 1, 0),
        (b"\x91\x00\x00\x64", 0, 0),
    ):
        frame = Frame(0, of_size(60, tags))
        assert (frame.tags, frame.vlan) == (count, vlan)
        assert (frame.destination, frame.source) == (B, A)
