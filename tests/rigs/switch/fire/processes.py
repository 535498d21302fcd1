"""Eight guests, each a process that runs the native build of the switch, under fire.

`Fire.run` stops and kills them at random moments. It gives each dead guest's port back to the
switch, starts a successor there, and checks after every blow that all others make progress. guest.c
checks every frame that arrives; `Fire.finish` checks that the counters add up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pykvm.resources import GUEST_SOURCES
from pykvm.switch import PortBusyError, Switch, SwitchConfig
from pykvm.switch._native import ffi, lib

__all__ = ["CONFIG", "Fire", "StuckError", "build_guest"]

CONFIG: Final = SwitchConfig(ports=8, lane_slots=32, tx_slots=64)
_PORTS: Final = CONFIG.ports
_MAX_PORTS: Final[int] = lib.SWITCH_MAX_PORTS

WITNESSES: Final = (0, 1)
"""Ports whose guests are stopped but never killed, so that every frame can be accounted for."""


class StuckError(AssertionError):
    """A guest that nobody stopped makes no progress."""


class Record(ctypes.Structure):
    """`struct record` of guest.c."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("stop", "incarnation", "rounds", "submitted")),
        *((name, ctypes.c_uint64) for name in ("dealt", "received", "error", "unused")),
        ("sent_to", ctypes.c_uint64 * _MAX_PORTS),
        ("received_from", ctypes.c_uint64 * _MAX_PORTS),
    )


def build_guest(directory: Path, switch: Path = GUEST_SOURCES / "switch/switch.c") -> Path:
    """Build the guest with this source of the switch."""
    program = directory / "guest"
    command = ["cc", "-O2", "-Wall", f"-I{GUEST_SOURCES / 'include'}", "-o", str(program)]
    sources = [str(Path(__file__).with_name("guest.c")), str(switch)]
    subprocess.run([*command, *sources], check=True)
    return program


class Fire:
    """A switch with a guest process behind each port.

    Args:
        patience: seconds without a call after which a guest counts as stuck.
    """

    def __init__(self, program: Path, seed: int, patience: float = 30.0) -> None:
        self._program = program
        self._choice = random.Random(seed)
        self._patience = patience
        self._fd = os.memfd_create("switch")
        os.ftruncate(self._fd, CONFIG.total_size)
        self._memory = mmap.mmap(self._fd, CONFIG.total_size)
        self.switch = Switch(CONFIG, self._memory)
        self._shared = ffi.cast("struct switch_shared *", self.switch.address)
        size = -(-_PORTS * ctypes.sizeof(Record) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._records_fd = os.memfd_create("records")
        os.ftruncate(self._records_fd, size)
        self._records_memory = mmap.mmap(self._records_fd, size)
        self.records = (Record * _PORTS).from_buffer(self._records_memory)
        self._guests: dict[int, subprocess.Popen[bytes]] = {}
        self._stopped: set[int] = set()
        self._waiting: set[int] = set()  # ports that cannot be given to a new guest yet
        self._incarnation = 0
        self._frames_before = [0] * _PORTS  # frames of each port when its guest began
        self.events: Counter[str] = Counter()

    # ---- start and death of guests ----------------------------------------------------------

    def start(self) -> None:
        for port in range(_PORTS):
            self.switch.pin(f"02:00:00:00:00:{port:02x}", port)
        # Enable all ports before the first guest starts: no lane counts what a witness sends to a
        # port that is still disabled.
        for port in range(_PORTS):
            assert self._enable(port)
        for port in range(_PORTS):
            self._spawn(port)
        self._wait_for_progress({})

    def _start(self, port: int) -> bool:
        """Start a guest at `port`; return False while a call of a stopped guest prevents it."""
        if not self._enable(port):
            return False
        self._spawn(port)
        return True

    def _enable(self, port: int) -> bool:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self.switch.enable(port, timeout=0.2)
                break
            except PortBusyError as busy:
                if busy.port in self._stopped:
                    self._waiting.add(port)
                    self.events["had to wait for a stopped guest's call"] += 1
                    return False
                if time.monotonic() > deadline:
                    raise StuckError(f"guest {busy.port} does not leave the switch") from busy
        self._waiting.discard(port)
        return True

    def _spawn(self, port: int) -> None:
        self._incarnation += 1
        self._frames_before[port] = self.switch.counters().ports[port].frames
        ctypes.memset(ctypes.addressof(self.records[port]), 0, ctypes.sizeof(Record))
        fds = (self._fd, self._records_fd)
        numbers = (*fds, port, self._incarnation, CONFIG.windows_offset)
        self._guests[port] = subprocess.Popen(
            [str(self._program), *map(str, numbers)], pass_fds=fds
        )

    def _kill(self, port: int) -> None:
        guest = self._guests.pop(port)
        guest.kill()
        assert guest.wait() == -signal.SIGKILL, self._what_was_wrong(port)
        self.events["killed"] += 1
        self.events["killed while stopped"] += port in self._stopped
        self._stopped.discard(port)
        inside = bool(lib.switch_port_inside(self._shared, port))
        self.events["killed inside the switch"] += inside
        before = self.switch.counters().ports[port]
        self.switch.disable(port, vcpu_gone=True)
        self._check_dead(port, inside)
        after = self.switch.counters().ports[port]
        assert after.cut - before.cut == inside
        self.events["frames lost with their sender"] += after.lost - before.lost
        self._start(port)

    def _check_dead(self, port: int, inside: bool) -> None:
        """Check that the dead guest's calls took effect, its last one possibly in part."""
        counters, record = self.switch.counters(), self.records[port]
        wrong = [line for line in counters.check() if line.startswith(f"port {port}:")]
        assert not wrong
        frames = counters.ports[port].frames - self._frames_before[port]
        assert record.dealt <= frames <= record.submitted
        self.events["frames of cut calls dealt with"] += frames - record.dealt if inside else 0

    # ---- stops and kills --------------------------------------------------------------------

    def run(self, kills: int) -> None:
        """Stop and kill guests until `kills` of them have been killed.

        Raises:
            StuckError: a running guest makes no progress.
        """
        while self.events["killed"] < kills:
            before = {port: self._progress(port) for port in self._running()}
            self._one_blow()
            for port in sorted(self._waiting):
                self._start(port)
            self._wait_for_progress(before)
            time.sleep(self._choice.random() * 0.01)

    def _one_blow(self) -> None:
        running, stopped = sorted(self._running()), sorted(self._stopped)
        mortal = [port for port in (*running, *stopped) if port not in WITNESSES]
        actions: list[Callable[[], None]] = []
        if self._waiting:
            # A guest stopped inside a call keeps dead ports from their next guest: continue it.
            mortal = [port for port in mortal if port in stopped]
        if mortal:
            actions += [lambda: self._kill(self._choice.choice(mortal))] * 4
        if len(stopped) < 3 and not self._waiting:
            actions += [lambda: self._stop(self._choice.choice(running))] * 2
        if stopped:
            actions += [lambda: self._continue(self._choice.choice(stopped))] * 2
        self._choice.choice(actions)()

    def _stop(self, port: int) -> None:
        self._guests[port].send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._guests[port].pid, os.WSTOPPED)
        self._stopped.add(port)
        self.events["stopped"] += 1
        inside = bool(lib.switch_port_inside(self._shared, port))
        self.events["stopped inside the switch"] += inside

    def _continue(self, port: int) -> None:
        self._stopped.discard(port)
        self._guests[port].send_signal(signal.SIGCONT)

    # ---- progress of the other guests -------------------------------------------------------

    def _running(self) -> set[int]:
        return set(self._guests) - self._stopped

    def _progress(self, port: int) -> tuple[int, int, int]:
        record = self.records[port]
        return record.incarnation, record.rounds, record.received

    def _wait_for_progress(self, before: dict[int, tuple[int, int, int]]) -> None:
        """Wait until each running guest has made a call, and received something if others run."""
        others = len(self._running()) > 1
        deadline = time.monotonic() + self._patience
        for port in self._running():
            old = before.get(port, (0, 0, 0))
            while True:
                self._require_alive(port)
                new = self._progress(port)
                if new[0] != old[0]:
                    old = (new[0], 0, 0)  # a successor, which has to begin as well
                if new[1] > old[1] + 1 and (new[2] > old[2] or not others):
                    break
                if time.monotonic() > deadline:
                    raise StuckError(f"guest {port} does not go on after {dict(self.events)}")
                time.sleep(0.0005)

    def _require_alive(self, port: int) -> None:
        assert self._guests[port].poll() is None, self._what_was_wrong(port)

    def _what_was_wrong(self, port: int) -> str:
        return f"guest {port} ended: {self.records[port].error or 'no'} is the line in guest.c"

    # ---- the end ----------------------------------------------------------------------------

    def finish(self) -> None:
        """Let all guests end, and check the sums of all counters."""
        for port in sorted(self._stopped):
            self._continue(port)
        for port in sorted(self._waiting):
            assert self._start(port)
        self._wait_for_progress({port: self._progress(port) for port in self._running()})
        for record in self.records:
            record.stop = 1
        for port, guest in self._guests.items():
            assert guest.wait(self._patience) == 0, self._what_was_wrong(port)
        counters = self.switch.counters()
        assert counters.check() == []
        assert not any(lib.switch_port_inside(self._shared, port) for port in range(_PORTS))
        for port, record in enumerate(self.records):
            assert counters.ports[port].frames - self._frames_before[port] == record.dealt
            assert record.dealt == record.submitted
        for source in range(_PORTS):
            for to in range(_PORTS):
                if source != to:
                    self._account_for_lane(source, to)
        self.events["frames delivered"] = sum(
            lane.delivered for row in counters.lanes for lane in row
        )

    def _account_for_lane(self, source: int, to: int) -> None:
        """Check the counters of one lane.

        The last guest at `to` received what the lane has held since that guest began. What a
        witness sent to a witness is what the lane delivered or refused.
        """
        counters = self.switch.counters().lanes[source][to]
        lane = self._shared.lane[source][to]
        window = ffi.cast("struct switch_window *", self.switch.window(to))
        head, tail = window.lane[source].head, window.lane[source].tail
        assert (lane.delivered - lane.start) & 0xFFFFFFFF == head, "everything is published"
        assert self.records[to].received_from[source] & 0xFFFFFFFF == tail
        assert 0 <= head - tail <= CONFIG.lane_slots
        assert counters.bad_tail == 0
        if source in WITNESSES and to in WITNESSES:
            assert self.records[source].sent_to[to] == counters.delivered + counters.dropped

    def close(self) -> None:
        for guest in self._guests.values():
            guest.kill()
            guest.wait()
        for fd in (self._fd, self._records_fd):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
