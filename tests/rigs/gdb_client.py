"""A client of GDB's remote protocol, written apart from the stub."""

from __future__ import annotations

import socket
from pathlib import Path

from pykvm.closeable import Closeable


class GdbClient(Closeable):
    """A connection in no-ack mode, after what GDB says first.

    Args:
        where: the stub's socket, or its port.
    """

    def __init__(self, where: Path | int) -> None:
        if isinstance(where, int):
            self.socket = socket.create_connection(("127.0.0.1", where), timeout=30)
        else:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(30)
            self.socket.connect(str(where))
        self._acknowledged = False
        self._buffer = b""
        self.features = self.ask("qSupported:swbreak+;hwbreak+").split(";")
        assert self.ask("QStartNoAckMode") == "OK"
        self._acknowledged = True

    def send(self, text: str) -> None:
        """Send a packet."""
        body = text.encode("latin-1")
        self.socket.sendall(b"$" + body + b"#" + f"{sum(body) % 256:02x}".encode())

    def interrupt(self) -> None:
        """Send Ctrl-C."""
        self.socket.sendall(b"\x03")

    def receive(self) -> str:
        """Return the contents of the next packet."""
        while b"#" not in self._buffer or len(self._buffer.partition(b"#")[2]) < 2:
            data = self.socket.recv(4096)
            if not data:
                raise EOFError
            self._buffer += data
        head, _, rest = self._buffer.partition(b"#")
        self._buffer = rest[2:]
        noise, _, body = head.partition(b"$")
        assert noise in (b"", b"+")
        assert int(rest[:2], 16) == sum(body) % 256
        if not self._acknowledged:
            self.socket.sendall(b"+")
        plain, escaped = bytearray(), False
        for byte in body:
            if byte == 0x7D and not escaped:
                escaped = True
            else:
                plain.append(byte ^ 0x20 if escaped else byte)
                escaped = False
        return plain.decode("latin-1")

    def ask(self, text: str) -> str:
        """Send a packet and return the answer."""
        self.send(text)
        return self.receive()

    def monitor(self, command: str) -> str:
        """Return what `monitor COMMAND` prints."""
        answer = self.ask("qRcmd," + command.encode().hex())
        text = b""
        while answer != "OK":
            assert answer.startswith("O")
            text += bytes.fromhex(answer[1:])
            answer = self.receive()
        return text.decode()

    def is_closed(self) -> bool:
        """Wait until the stub closes the connection; return False if it sends more instead."""
        try:
            return not self._buffer and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()
