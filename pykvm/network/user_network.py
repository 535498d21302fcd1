"""User-mode networks: passt turns a guest's frames into sockets of this user, without privileges.

passt ends when the socket is closed.

Source: passt(1).
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm.errors import PykvmError
from pykvm.host.commands import as_root
from pykvm.network.addresses import StaticAddress
from pykvm.network.child_process import ChildProcess
from pykvm.network.frame_stream import LARGEST_MTU, FrameStream
from pykvm.network.specification import Forward

__all__ = ["PasstError", "UserNetwork"]

_GUEST: Final = "10.0.2.15/24"
_GATEWAY: Final = "10.0.2.2"
_RESOLVER: Final = "10.0.2.3"
_GATEWAY_MAC: Final = "02:50:56:00:00:02"
_ROOM: Final = 4 << 20  # bytes; net.core.wmem_max is an ordinary user's limit
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_SECONDS_TO_START: Final = 10.0
_LENGTH: Final = struct.Struct("!I")
_LARGEST_FRAME: Final = 65535


class PasstError(PykvmError):
    """passt is missing, does not start, or has ended."""


class UserNetwork(FrameStream):
    """A network of one guest, with the host's connections to the world.

    The guest is 10.0.2.15, its gateway 10.0.2.2, its resolver 10.0.2.3 (the host's); passt tells it
    so by DHCP, too. IPv4 only.

    Attributes:
        fd: becomes readable when passt has ended; `complaint` says why.

    Args:
        mac: the guest's MAC address.
        forwards: ports of the host that lead to the guest.
        host: whether the guest reaches the host's 127.0.0.1, as its gateway.
        mtu: the largest frame's payload; by default 65520, passt's substitute for offloads, or 9000
            where the kernel gives the socket little room.

    Raises:
        PasstError: passt is not installed, or refuses a port.
    """

    def __init__(
        self,
        mac: str,
        *,
        forwards: Sequence[Forward] = (),
        host: bool = False,
        mtu: int | None = None,
    ) -> None:
        program = shutil.which("passt")
        if program is None:
            raise PasstError(
                "--net user needs passt, which is not installed",
                f"type `{as_root('apt-get install passt')}`",
            )
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        super().__init__(ours)
        with other:
            mtu = mtu or _mtu_for(_make_room(other))
            self.mtu = mtu
            command = [program, *_arguments(other.fileno(), forwards, host, mtu)]
            self._child = ChildProcess(
                command, ends_with=other.fileno(), is_noise=lambda line: "to syslog" in line
            )
        try:
            self._wait_until_it_answers(bytes.fromhex(mac.replace(":", "")))
        except BaseException:
            self.close()
            raise
        self.socket.setblocking(False)

    @property
    def fd(self) -> int:
        """A pidfd of passt."""
        return self._child.fd

    @property
    def address(self) -> StaticAddress:
        """The guest's address, for a kernel command line."""
        return StaticAddress(
            ipaddress.IPv4Interface(_GUEST),
            ipaddress.IPv4Address(_GATEWAY),
            (ipaddress.IPv4Address(_RESOLVER),),
        )

    def complaint(self, patience: float = 0) -> str:
        """Return why passt has ended; empty while it runs, and when it was closed."""
        if self._child.fd < 0 or not self._child.wait(patience):
            return ""
        return f"passt has ended: {self._child.complaint() or 'it does not say why'}"

    def close(self) -> None:
        """Close the socket, by which passt ends."""
        super().close()
        self._child.close()

    def _wait_until_it_answers(self, mac: bytes) -> None:
        """Ask for the gateway's MAC address (RFC 826) and wait for the answer."""
        addresses = [ipaddress.IPv4Address(text).packed for text in (_GUEST[:-3], _GATEWAY)]
        question = struct.pack(
            "!6s6sHHHBBH6s4s6s4s",
            *(b"\xff" * 6, mac, 0x0806, 1, 0x0800, 6, 4, 1, mac, addresses[0], bytes(6)),
            addresses[1],
        ).ljust(60, b"\0")
        deadline = time.monotonic() + _SECONDS_TO_START
        try:
            self.socket.sendall(_LENGTH.pack(len(question)) + question)
            while not _is_answer(self._receive(deadline), addresses[1]):
                pass
        except (OSError, EOFError):
            self._child.wait(1)
            reason = self._child.complaint() or "it does not answer"
            raise PasstError(
                f"passt does not start: {reason}", "choose other ports, or try --net tap"
            ) from None

    def _receive(self, deadline: float) -> bytes:
        size: int = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))[0]
        if size > _LARGEST_FRAME:
            raise EOFError
        return self._exactly(size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def _make_room(stream: socket.socket) -> int:
    """Let much wait in a socket; return how many bytes the kernel allows.

    The passt of Debian 12 drops what finds no room, and TCP then waits for its timer: 8 MB took 6 s
    in place of 0.06.
    """
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        with contextlib.suppress(PermissionError):
            stream.setsockopt(socket.SOL_SOCKET, option, _ROOM)
            break
    return stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _mtu_for(room: int) -> int:
    return LARGEST_MTU if room >= _ROOM else 9000


def _is_answer(frame: bytes, gateway: bytes) -> bool:
    """Return whether a frame is the ARP reply of the gateway."""
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2" and frame[28:32] == gateway


def _arguments(descriptor: int, forwards: Sequence[Forward], host: bool, mtu: int) -> list[str]:
    arguments = ["--foreground", "--stderr", "--fd", str(descriptor), "--ipv4-only"]
    address, _, prefix = _GUEST.partition("/")
    arguments += ["--address", address, "--netmask", prefix, "--gateway", _GATEWAY]
    arguments += ["--mac-addr", _GATEWAY_MAC, "--mtu", str(mtu)]
    arguments += ["--dns", _RESOLVER, "--dns-forward", _RESOLVER]
    if not host:
        arguments += ["--no-map-gw"]
    if not _has_default_route():
        arguments += ["--interface", "lo"]  # it insists on one, and then hardly uses it
    for one in forwards:
        where = f"{one.address}/" if one.address else ""
        arguments += [f"--{one.protocol}-ports", f"{where}{one.host_port}:{one.guest_port}"]
    return arguments


def _has_default_route() -> bool:
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]:
            _, destination, *_, mask = line.split()[:8]
            if destination == mask == "00000000":
                return True
    return False
