"""A running machine under its name: what can be asked of it through its control socket."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pykvm.closeable import Closeable
from pykvm.control.directory import MachineDirectory
from pykvm.control.server import ControlServer, Session, Stream, listening_socket
from pykvm.errors import PykvmError
from pykvm.inspection.metrics import Metrics
from pykvm.machine.linux.machine import LinuxMachine

if TYPE_CHECKING:
    from pykvm.inspection.gdb.server import GdbServer

__all__ = ["MachineService"]

_CHUNK: Final = 4096
_TAIL: Final = 8192  # bytes that a new console is shown
_POLL: Final = 0.02  # seconds, while a guest has no room for more input

Request = Mapping[str, Any]


class MachineService(Closeable):
    """Name and control socket of a machine. Make it before the machine runs.

    Commands: status, pause, resume, stop, console, metrics (with "format": "prometheus" for text),
    report, walk ("address", "cpu"), gdb, snapshot ("path").

    Attributes:
        directory: the machine's directory.

    Args:
        machine: the machine.
        directory: its directory, which stays the caller's.
    """

    def __init__(self, machine: LinuxMachine, directory: MachineDirectory) -> None:
        self._machine = machine
        self._started = time.time()
        self._gdb: GdbServer | None = None
        self._lock = threading.Lock()
        self.directory = directory
        with ExitStack() as stack:
            # A confined process makes no sockets: what GDB connects to is there from the start.
            self._gdb_socket = listening_socket(directory.path / "gdb")
            stack.callback(self._gdb_socket.close)
            labels = {"machine": self.directory.name}
            self._metrics = stack.enter_context(Metrics(machine.vm, machine.vcpus, labels))
            handlers = {
                "status": self._status,
                "pause": self._pause,
                "resume": self._resume,
                "stop": self._stop,
                "console": lambda request: Stream(self._console),
                "metrics": self._read_metrics,
                "report": self._report,
                "walk": self._walk,
                "gdb": self._start_gdb,
                "snapshot": self._snapshot,
            }
            stack.enter_context(ControlServer(self.directory.socket, handlers))
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Answer no more, and give the name back. Harmless twice."""
        self._resources.close()

    def _status(self, request: Request) -> dict[str, Any]:
        config = self._machine.config
        return {
            "name": self.directory.name,
            "pid": os.getpid(),
            "state": "paused" if self._machine.is_paused else "running",
            "cpus": config.cpus,
            "memory": config.memory,
            "kernel": str(config.kernel),
            "started": self._started,
        }

    def _pause(self, request: Request) -> None:
        self._machine.pause()

    def _resume(self, request: Request) -> None:
        self._machine.resume()

    def _stop(self, request: Request) -> None:
        self._machine.stop()

    def _read_metrics(self, request: Request) -> Any:
        if request.get("format") == "prometheus":
            return self._metrics.prometheus()
        return self._metrics.read()

    def _report(self, request: Request) -> str:
        from pykvm.inspection.hang import report  # noqa: PLC0415  (asked for now and then)

        return report(self._machine)

    def _walk(self, request: Request) -> str:
        from pykvm.inspection.walk import describe_walk, parse_address  # noqa: PLC0415

        number = int(request.get("cpu", 0))
        if not 0 <= number < len(self._machine.vcpus):
            raise PykvmError(
                f"no processor {number}", f"use 0 to {len(self._machine.vcpus) - 1} (--cpu)"
            )
        address = parse_address(str(request["address"]))
        with self._machine.gate.paused():
            return describe_walk(self._machine.vcpus[number], self._machine.memory, address)

    def _start_gdb(self, request: Request) -> str:
        from pykvm.inspection.gdb.server import GdbServer  # noqa: PLC0415

        with self._lock:
            if self._gdb is None:
                path = self.directory.path / "gdb"
                self._gdb = GdbServer(self._machine, self._gdb_socket, path)
                self._resources.push(self._gdb)
            return self._gdb.address

    def _snapshot(self, request: Request) -> int:
        return self._machine.snapshot(Path(str(request["path"])))

    def _console(self, session: Session) -> None:
        serial = self._machine.serial
        connection = session.socket
        connection.sendall(serial.tail(_TAIL))
        if not serial.watch(connection.fileno()):
            connection.sendall(b"pykvm: this machine has four consoles already\r\n")
            return
        try:
            while data := connection.recv(_CHUNK):
                while data := data[serial.feed(data) :]:
                    if self._machine.gate.closed:
                        return
                    time.sleep(_POLL)
        finally:
            serial.unwatch(connection.fileno())
