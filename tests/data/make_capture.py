"""Makes memcached-http.pcap: two network namespaces, a veth pair, real programs on both ends.

Needs root, pyroute2 (a dependency of this project), and from Debian: memcached,
libmemcached-tools, curl, ethtool. Everything happens inside the two namespaces, which are
removed afterwards. Run it as

    sudo .venv/bin/python tests/data/make_capture.py tests/data/memcached-http.pcap
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute, NetNS, netns

from pykvm.switch.capture import Frame, write_capture

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
SIDES = {
    "capture-server": ("02:00:00:00:00:01", SERVER),
    "capture-client": ("02:00:00:00:00:02", CLIENT),
}
MIN_FRAME = 60  # what an Ethernet card pads to
ETH_P_ALL = 3
SO_TIMESTAMPNS = 35
VALUE_SIZES = [1 + 37 * step for step in range(60)]
FILE_SIZES = [0, 1, 700, 1448, 5_000, 20_000, 60_000, 120_000]
WORDS = (
    "a",
    "switch",
    "learns",
    "where",
    "every",
    "station",
    "is",
    "and",
    "sends",
    "frames",
    "there",
)


def text(size: int) -> bytes:
    """`size` bytes that differ from line to line."""
    lines = (f"{n} {WORDS[n % len(WORDS)]} {WORDS[n * 7 % len(WORDS)]}\n" for n in range(size))
    out = bytearray()
    for line in lines:
        if len(out) >= size:
            break
        out += line.encode()
    return bytes(out[:size])


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """Two namespaces joined by a veth pair, without offloads, so that frames are as on a wire."""
    with contextlib.ExitStack() as undo, IPRoute() as ip:
        for name in SIDES:
            netns.create(name)
            undo.callback(netns.remove, name)
        server, client = SIDES
        ip.link("add", ifname="cap0", kind="veth", peer={"ifname": "cap1"})
        for interface, name in (("cap0", server), ("cap1", client)):
            ip.link("set", index=ip.link_lookup(ifname=interface)[0], net_ns_fd=name)
        for interface, name in (("cap0", server), ("cap1", client)):
            offloads = ["rx", "tx", "tso", "gso", "gro", "sg"]
            off = [word for offload in offloads for word in (offload, "off")]
            run_in(name, ["ethtool", "-K", interface, *off], stdout=subprocess.DEVNULL)
            run_in(name, ["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
        yield


def bring_up() -> None:
    """Addresses, and both links up."""
    for interface, (name, (mac, address)) in zip(("cap0", "cap1"), SIDES.items(), strict=True):
        with NetNS(name) as ns:
            index = ns.link_lookup(ifname=interface)[0]
            ns.link("set", index=index, address=mac)
            ns.addr("add", index=index, address=address, prefixlen=24)
            ns.link("set", index=index, state="up")


def run_in(name: str, command: list[str], **options: object) -> None:
    """Run `command` in a namespace until it ends."""
    subprocess.run(["ip", "netns", "exec", name, *command], check=True, **options)  # type: ignore[call-overload]


@contextlib.contextmanager
def serving(name: str, command: list[str], port: int) -> Iterator[None]:
    """A server in a namespace, from when it listens until it is stopped."""
    process = subprocess.Popen(["ip", "netns", "exec", name, *command], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            listening = subprocess.run(
                ["ip", "netns", "exec", name, "ss", "-Htln", f"sport = :{port}"],
                check=True,
                capture_output=True,
            )
            if listening.stdout:
                break
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class Recorder(threading.Thread):
    """Every frame that crosses the server's end of the pair, in both directions."""

    def __init__(self) -> None:
        super().__init__()
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        netns.setns("capture-server")
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.bind(("cap0", ETH_P_ALL))
        netns.setns(home)
        os.close(home)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self.socket.settimeout(0.2)
        self.frames: list[Frame] = []
        self.stopping = False

    def run(self) -> None:
        while True:
            try:
                data, control, _, _ = self.socket.recvmsg(65536, 256)
            except TimeoutError:
                if self.stopping:
                    return
                continue
            seconds, nanoseconds = struct.unpack("qq", control[0][2])
            padded = data + bytes(max(0, MIN_FRAME - len(data)))
            self.frames.append(Frame(seconds * 1_000_000_000 + nanoseconds, padded))

    def stop(self) -> list[Frame]:
        self.stopping = True
        self.join()
        self.socket.close()
        return self.frames


def talk(directory: Path) -> None:
    """The conversations, from the client's namespace."""

    def client(*command: str) -> None:
        run_in("capture-client", list(command), stdout=subprocess.DEVNULL)

    def on_files(prefix: str, sizes: list[int]) -> list[Path]:
        paths = []
        for size in sizes:
            path = directory / f"{prefix}{size}"
            path.write_bytes(text(size))
            os.utime(path, (1_700_000_000, 1_700_000_000))
            paths.append(path)
        return paths

    memcached = ["memcached", "-l", SERVER, "-p", "11211", "-U", "0", "-u", "nobody"]
    with serving("capture-server", memcached, 11211):
        values = on_files("value", VALUE_SIZES)
        client("memccp", f"--servers={SERVER}", *map(str, values))
        for path in values:
            client("memccat", f"--servers={SERVER}", path.name)
        client("memcrm", f"--servers={SERVER}", *(path.name for path in values[:10]))
        client("memcstat", f"--servers={SERVER}")
    http = [sys.executable, "-m", "http.server", "8080", "--bind", SERVER, "-d", str(directory)]
    with serving("capture-server", http, 8080):
        for path in on_files("file", FILE_SIZES):
            client("curl", "-sS", f"http://{SERVER}:8080/{path.name}")
        client("curl", "-sS", f"http://{SERVER}:8080/none-of-this-name")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: make_capture.py OUT.pcap", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory, namespaces():
        bring_up()
        recorder = Recorder()
        recorder.start()
        try:
            talk(Path(directory))
        finally:
            frames = recorder.stop()
    stations = {bytes(int(part, 16) for part in mac.split(":")) for mac, _ in SIDES.values()}
    frames = [frame for frame in frames if frame.source in stations]
    write_capture(arguments[0], frames)
    sizes = [len(frame.data) for frame in frames]
    print(f"{len(frames)} frames, {min(sizes)} to {max(sizes)} bytes, {sum(sizes)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
