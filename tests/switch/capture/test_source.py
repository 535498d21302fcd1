"""Files, pipes and standard input; compressed and unreadable files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pykvm.switch.capture import (
    CaptureError,
    CompressionError,
    ForeignCaptureError,
    FrameSizeError,
    TooLargeCaptureError,
    UnreadableCaptureError,
    read_capture,
)
from pykvm.switch.capture.source import LIMIT
from tests.rigs.switch.capture_files import A, B, enhanced, interface, packet, pcap, section

pytestmark = pytest.mark.unit

CAPTURE = pcap(packet(B + A + bytes(50)) + packet(A + B + bytes(50)))


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Return a function that gives bytes to standard input, through a pipe."""
    with ExitStack() as opened:

        def give(content: bytes) -> None:
            reading, writing = os.pipe()
            with open(writing, "wb") as pipe:
                pipe.write(content)
            stream = opened.enter_context(open(reading, encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", stream)

        yield give


def frames(path: str | Path) -> int:
    return len(read_capture(path).frames)


@pytest.mark.parametrize(
    "content",
    [
        CAPTURE,
        gzip.compress(CAPTURE),
        gzip.compress(CAPTURE[:50]) + gzip.compress(CAPTURE[50:]),
        gzip.compress(section() + interface() + enhanced(B + A + bytes(50)) * 2),
    ],
    ids=["plain", "gzip", "two members", "pcapng"],
)
def test_files_pipes_and_standard_input(
    tmp_path: Path, content: bytes, stdin: Callable[[bytes], None]
) -> None:
    path = tmp_path / "any name"
    path.write_bytes(content)
    assert frames(path) == frames(str(path)) == 2
    stdin(content)
    assert frames("-") == 2
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    assert frames(fifo) == 2
    writer.join()


@pytest.mark.parametrize("argument", ["-", "/dev/stdin", "<(cat {})", "{}"])
def test_as_a_shell_passes_it(tmp_path: Path, argument: str) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(CAPTURE)
    script = (
        "import sys; from pykvm.switch import read_capture; "
        "print(len(read_capture(sys.argv[1]).frames))"
    )
    done = subprocess.run(
        ["bash", "-c", f"exec $0 -c '{script}' {argument.format(path)}", sys.executable],
        input=CAPTURE,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"2\n"


def refusal(path: str | Path, kind: type[CaptureError]) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        read_capture(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("content", "kind", "problem", "next_step"),
    [
        (b"", ForeignCaptureError, "is empty", "`tcpdump -w FILE` writes one"),
        (b"\x7fELF" + bytes(60), ForeignCaptureError, "is neither pcap nor pcapng", "`editcap -F"),
        (b"\xa1\xb2", ForeignCaptureError, "is neither pcap nor pcapng", "`editcap -F"),
        (
            b"12:00:00.1 IP 10.0.0.1 > 10.0.0.2: ICMP echo request\n",
            ForeignCaptureError,
            "is text, not a capture",
            "`tcpdump -w FILE`",
        ),
        (
            gzip.compress(CAPTURE)[:-9],
            CompressionError,
            "is damaged gzip data (ends too early)",
            "copy or compress it again",
        ),
        (gzip.compress(b""), ForeignCaptureError, "is empty", "`tcpdump -w FILE`"),
        (b"\x1f\x8b\xff" + bytes(20), CompressionError, "is damaged gzip data", "copy or"),
        (bz2.compress(CAPTURE), CompressionError, "with bzip2", "`bzcat FILE | pykvm demo"),
        (lzma.compress(CAPTURE), CompressionError, "with xz", "`xzcat FILE | pykvm demo"),
        (b"\x28\xb5\x2f\xfd", CompressionError, "with zstd", "`zstdcat FILE | pykvm demo"),
        (b"PK\x03\x04", CompressionError, "with zip", "`unzip -p FILE | pykvm demo"),
    ],
)
def test_what_is_no_capture(
    tmp_path: Path, content: bytes, kind: type[CaptureError], problem: str, next_step: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    error = refusal(path, kind)
    assert error.problem.startswith(str(path))
    assert problem in error.problem
    file = "FILE" if "tcpdump" in next_step else str(path)
    assert next_step.replace("FILE", file) in error.next_step


def test_a_damaged_checksum_of_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap.gz"
    data = bytearray(gzip.compress(CAPTURE))
    data[-8] ^= 1
    path.write_bytes(data)
    assert "is damaged gzip data (CRC check failed" in refusal(path, CompressionError).problem


def test_commands_name_files_as_a_shell_takes_them(
    tmp_path: Path, stdin: Callable[[bytes], None]
) -> None:
    short = pcap(packet(b"short"))
    path = tmp_path / "it's mine.pcap"
    path.write_bytes(short)
    error = refusal(path, FrameSizeError)
    assert f"tcpdump -r '{tmp_path}/it'\"'\"'s mine.pcap' -w" in error.next_step
    packed = tmp_path / "x.pcap.gz"
    packed.write_bytes(gzip.compress(short))
    assert f"tcpdump -r <(zcat {packed}) -w" in refusal(packed, FrameSizeError).next_step
    stdin(short)
    error = refusal("-", FrameSizeError)
    assert error.problem.startswith("standard input: frame 1")
    assert "tcpdump -r FILE -w" in error.next_step


def test_names_that_would_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.pcap"
    path.write_bytes(b"")
    assert "two\\nlines.pcap' is empty" in refusal(path, ForeignCaptureError).problem
    undecodable = os.fsdecode(bytes(tmp_path) + b"/\xff.pcap")
    Path(undecodable).write_bytes(b"")
    assert refusal(undecodable, ForeignCaptureError).problem.isascii()


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(tmp_path / "none.pcap", UnreadableCaptureError)
    assert error.problem == f"cannot read {tmp_path}/none.pcap: No such file or directory"
    assert "Is a directory" in refusal(tmp_path, UnreadableCaptureError).problem
    assert "null byte" in refusal("a\0b", UnreadableCaptureError).problem
    monkeypatch.setattr(sys, "stdin", None)
    error = refusal("-", UnreadableCaptureError)
    assert error.problem == "cannot read standard input: it is closed"


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    try:
        error = refusal(os.ttyname(terminal), UnreadableCaptureError)
        assert "is a terminal" in error.problem
        with open(terminal, encoding="utf-8", closefd=False) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            error = refusal("-", UnreadableCaptureError)
        assert error.problem == "standard input is a terminal"
        assert "| pykvm demo --capture -`" in error.next_step
    finally:
        os.close(terminal)
        os.close(controller)


def test_more_than_any_guest_holds(tmp_path: Path) -> None:
    assert "more than 64 MiB" in refusal("/dev/zero", TooLargeCaptureError).problem
    path = tmp_path / "x.pcap"
    with path.open("wb") as file:
        file.write(pcap())
        file.truncate(LIMIT + 1)
    error = refusal(path, TooLargeCaptureError)
    assert f"`tcpdump -r {path} -w first.pcap -c 10000`" in error.next_step


def test_a_bomb_of_zeros(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as stream:
        for _ in range(LIMIT // (1 << 20) + 2):
            stream.write(bytes(1 << 20))
    path = tmp_path / "x.gz"
    path.write_bytes(buffer.getvalue())
    assert path.stat().st_size < 100_000
    assert "more than 64 MiB" in refusal(path, TooLargeCaptureError).problem
