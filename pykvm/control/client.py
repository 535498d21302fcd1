"""Requests to a running machine."""

from __future__ import annotations

import json
import socket
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.control.directory import MachineNameError, socket_of
from pykvm.errors import PykvmError

__all__ = ["ControlError", "MachineClient"]

_LONGEST: Final = 16 << 20


class ControlError(PykvmError):
    """A request that a machine has refused, or not answered."""


class MachineClient(Closeable):
    """A connection to the control socket of a machine.

    Args:
        name: the machine's name.
        patience: seconds to wait for an answer.

    Raises:
        MachineNameError: no machine of this user has the name.
    """

    def __init__(self, name: str, *, patience: float = 60.0) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        self._buffered = b""
        try:
            self._socket.connect(str(socket_of(name)))
        except OSError as error:
            self._socket.close()
            raise MachineNameError(f"the machine {name} does not answer", "try again") from error
        except PykvmError:
            self._socket.close()
            raise

    def request(self, command: str, **arguments: Any) -> Any:
        """Ask for something; return the result.

        Raises:
            ControlError: the machine refuses it, or has ended, or does not answer.
        """
        try:
            line = json.dumps({"command": command, **arguments}).encode() + b"\n"
            self._socket.sendall(line)
            answer = json.loads(self._line())
        except TimeoutError as error:
            raise ControlError(f"the machine {self.name} does not answer", "try again") from error
        except (OSError, ValueError) as error:
            raise ControlError(f"the machine {self.name} has ended", "see: pykvm ps") from error
        if "problem" in answer:
            raise ControlError(str(answer["problem"]), str(answer.get("next_step", "")))
        return answer.get("result")

    def stream(self, command: str, **arguments: Any) -> tuple[socket.socket, bytes]:
        """Ask for a stream; return the connection, still this client's, and bytes read already.

        Raises:
            ControlError: see `request`.
        """
        if self.request(command, **arguments) != "stream":
            raise ControlError(f"{command} is no stream", "use request()")
        self._socket.settimeout(None)
        return self._socket, self._buffered

    def _line(self) -> bytes:
        while b"\n" not in self._buffered:
            data = self._socket.recv(65536)
            if not data or len(self._buffered) > _LONGEST:
                raise ConnectionResetError
            self._buffered += data
        line, _, self._buffered = self._buffered.partition(b"\n")
        return line

    def close(self) -> None:
        """End the connection. Harmless twice."""
        self._socket.close()
