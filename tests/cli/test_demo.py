"""`pykvm demo --capture` carries sendable frames unchanged and refuses the rest at once.

The measurement itself is replaced: these tests end before a guest or the emulated host starts.
tests/measure/test_exchange.py sends such captures.
"""

import gzip
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pykvm.cli import main as command
from pykvm.switch.capture import read_capture
from tests.rigs.switch.capture_files import A, B, C, enhanced, interface, packet, pcap, section
from tests.rigs.switch.native_rig import BROADCAST, frame, tagged

pytestmark = pytest.mark.unit

demo = importlib.import_module("pykvm.cli.demo")

CLIENTS = [frame(A, B, mark=1), frame(B, A, mark=2), frame(A, C, mark=3), frame(C, A, mark=4)]
WITH_CHECKSUM = 1 | 1 << 26 | 2 << 28  # Ethernet, two words of checksum
SERVER = pcap(b"".join(map(packet, CLIENTS)))


class StartedError(Exception):
    """The demo has reached the host on which it runs."""


@pytest.fixture(autouse=True)
def _no_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(
        measure: Callable[[], dict[str, Any]],
        arguments: list[str],
        *,
        files: Mapping[str, bytes],
        out: Path,
    ) -> dict[str, Any]:
        assert arguments[0] == "demo"
        (tmp_path / "carried").write_bytes(files["--capture"])
        raise StartedError

    monkeypatch.setattr(demo, "on_suitable_host", start)


def carried(tmp_path: Path, *arguments: str) -> list[bytes]:
    """Return the frames that would be taken to the emulated host."""
    with pytest.raises(StartedError):
        command.main(["demo", *arguments])
    return [one.data for one in read_capture(tmp_path / "carried").frames]


@pytest.mark.parametrize(
    ("content", "frames"),
    [
        (SERVER, CLIENTS),
        (gzip.compress(SERVER), CLIENTS),
        (section() + interface() + b"".join(map(enhanced, CLIENTS)), CLIENTS),
        (pcap(b"".join(packet(one + bytes(4)) for one in CLIENTS), link=WITH_CHECKSUM), CLIENTS),
        (
            pcap(b"".join(packet(tagged(one.ljust(1514), 100)) for one in CLIENTS)),
            [tagged(one.ljust(1514), 100) for one in CLIENTS],
        ),
    ],
    ids=["server", "gzip", "pcapng", "checksums", "tagged"],
)
def test_captures_that_are_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, frames: list[bytes]
) -> None:
    path = tmp_path / "a capture"
    path.write_bytes(content)
    assert carried(tmp_path, "--capture", str(path)) == frames
    said = capsys.readouterr()
    assert said.out == f"capture: 4 frames, {sum(map(len, frames))} bytes\n"
    assert said.err == ""


def test_a_pipe_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(SERVER)
        cat.stdin.close()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(cat.stdout))
        assert carried(tmp_path, "--capture", "-") == CLIENTS


def test_the_capture_that_comes_along(tmp_path: Path) -> None:
    assert len(carried(tmp_path)) == 1227


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pcap"
    odd = [frame(b"\x01\x80\xc2\x00\x00\x00", B), frame(A, BROADCAST), frame(A, A)]
    path.write_bytes(pcap(b"".join(map(packet, [*odd, *CLIENTS, odd[0]]))))
    carried(tmp_path, "--capture", str(path))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "left out: 2 frames for the link's own protocols (01:80:c2:00:00:00 to 0f), "
        "which a switch does not forward",
        "left out: 1 frames from a group address or from none, which a switch does not forward",
        "left out: 1 frames from a station to itself, which a switch does not forward",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (pcap(packet(CLIENTS[0]), link=113), "packets of all interfaces (`any`)"),
        (pcap(packet(bytes(60))), "as on a loopback interface (`lo`)"),
        (pcap(packet(CLIENTS[0]) + packet(b"")), "frame 2 has 0 bytes"),
        (SERVER[:-3], "keep the 3 whole ones: `tcpdump -r"),
        (pcap(packet(CLIENTS[0], original=1500)), "was cut to 64 of 1500 bytes"),
        (pcap(packet(frame(B, A, size=1519))), "frame 1 has 1519 bytes"),
        (pcap(packet(CLIENTS[0])), "holds frames of one station only"),
        (SERVER + packet(frame(B, C)), "frame 5 (02:00:00:00:00:03 to 02:00:00:00:00:02)"),
        (gzip.compress(SERVER)[:-4], "is damaged gzip data"),
    ],
)
def test_captures_that_are_refused_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(content)
    assert command.main(["demo", "--capture", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"pykvm: {path}")
    assert output.err.count("\n") == 1
    assert said in output.err


def test_more_rounds_than_a_guest_has_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pcap"
    big = b"".join(packet(one.ljust(1514)) for one in CLIENTS)
    path.write_bytes(pcap(big * 2400))
    assert command.main(["demo", "--capture", str(path)]) == 1
    assert capsys.readouterr().err == (
        "pykvm: 35 MiB of frames to receive in 5 rounds, a guest has room for 28 MiB: "
        "send them less often: --rounds 4\n"
    )


def test_more_frames_than_a_guest_has_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pcap"
    big = b"".join(packet(one.ljust(1514)) for one in CLIENTS)
    path.write_bytes(pcap(big * 6000))
    assert command.main(["demo", "--capture", str(path), "--rounds", "1"]) == 1
    assert "MiB of frames to send, a guest has room for 16 MiB" in capsys.readouterr().err


def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--calls", "--rounds"):
        assert command.main(["demo", option, "0"]) == 1
        assert f"{option} 0: use 1 to" in capsys.readouterr().err
