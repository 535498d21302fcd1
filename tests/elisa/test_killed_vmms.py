"""VMM processes that share one switch by VMFUNC are killed and stopped; the others go on.

The owner opens the switch and forks a process for each guest, which attaches it and runs it.
tests/rigs/switch/fire has the native test with many more kills, which checks every byte.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import connect
from pykvm.measure.programs import BurstProgram, Phase, SwitchPath
from pykvm.switch import SwitchConfig
from pykvm.switch.hosted import HostedSwitch
from tests.rigs.host_state import nothing_stays, quiet_kernel

pytestmark = pytest.mark.elisa

PORTS = 3
KILLS = 8
SIZE = 300
PATIENCE = 60.0
STATIONS = [bytes([2, 0, 0, 0, 0, n]) for n in range(PORTS)]


def expected_frame(source: int, to: int) -> bytes:
    """Return the frame that burst.c sends."""
    head = STATIONS[to] + STATIONS[source] + b"\x88\xb5"
    return head + bytes(n & 0xFF for n in range(len(head), SIZE))


class Vmms:
    """A switch, and for each port a process that runs a guest sending without end."""

    def __init__(self, hosted: HostedSwitch) -> None:
        self.hosted = hosted
        self.switch = hosted.switch
        self.pids: dict[int, int] = {}

    def start(self, port: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self._run(port)
            finally:
                os._exit(1)
        self.pids[port] = pid

    def _run(self, port: int) -> None:
        """Run the guest in the child until the child is killed."""
        to = (port + 1) % PORTS
        program = BurstProgram(
            SwitchPath.VMFUNC,
            STATIONS[port],
            STATIONS[to],
            [Phase(SIZE, 16, (1 << 32) - 1)],
            idle_limit=1 << 60,
        )
        with Kvm() as kvm, BareGuest(kvm, program) as guest:
            connect(guest, self.hosted, port, SwitchPath.VMFUNC)
            guest.run()

    def kill(self, port: int) -> bool:
        """Kill a VMM; return whether its vCPU was inside the switch and had to be settled."""
        pid = self.pids.pop(port)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the VMM of port {port} had ended: {status:#x}"
        before = self.switch.counters().ports[port].cut
        self.switch.disable(port, vcpu_gone=True)
        counters = self.switch.counters()
        assert not [line for line in counters.check() if line.startswith(f"port {port}:")]
        return counters.ports[port].cut > before

    def require_progress(self, stopped: set[int]) -> None:
        """Wait until each guest that is not stopped makes calls."""
        before = [port.calls for port in self.switch.counters().ports]
        deadline = time.monotonic() + PATIENCE
        waiting = set(self.pids) - stopped
        while waiting:
            now = self.switch.counters().ports
            waiting = {port for port in waiting if now[port].calls < before[port] + 3}
            for port in self.pids:
                assert os.waitpid(self.pids[port], os.WNOHANG) == (0, 0), f"VMM {port} ended"
            assert time.monotonic() < deadline, f"{waiting} stand still"
            time.sleep(0.01)

    def check_lanes(self) -> None:
        """Check that each frame in a lane is a whole frame of its sender's for this port."""
        config = self.hosted.config
        for to in range(PORTS):
            window = self.hosted.instance.window(to)
            for source in range(PORTS):
                start = config.lane_offset(source)
                for slot in range(config.lane_slots):
                    at = start + slot * 2048
                    length = int.from_bytes(window[at : at + 4], "little")
                    frame = bytes(window[at + 8 : at + 8 + length])
                    allowed = {expected_frame(source, (source + 1) % PORTS), b""}
                    assert frame in allowed, f"lane from {source} to {to}"

    def close(self) -> None:
        for port in list(self.pids):
            pid = self.pids.pop(port)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextmanager
def vmms() -> Iterator[Vmms]:
    config = SwitchConfig(ports=PORTS, lane_slots=16, tx_slots=16)
    with Kvm() as kvm, HostedSwitch(config, epoch=None) as hosted:
        hosted.instance.register(kvm)  # once, for the guests of all processes
        for port, station in enumerate(STATIONS):
            hosted.switch.pin(":".join(f"{octet:02x}" for octet in station), port)
        started = Vmms(hosted)
        try:
            yield started
        finally:
            started.close()


@pytest.mark.attack("T19")
def test_vmms_are_killed_and_stopped_at_random() -> None:
    """All VMMs die, and all pinned pages come back."""
    with quiet_kernel(), nothing_stays():
        inside = under_fire()
    print(f"{KILLS + PORTS} VMMs killed, {inside} inside the switch")


def under_fire() -> int:
    """Return the number of VMMs killed while their vCPU was inside the switch."""
    choice = random.Random(7)
    inside = 0
    with vmms() as all_vmms:
        for port in range(PORTS):
            all_vmms.start(port)
        all_vmms.require_progress(set())
        for _ in range(KILLS):
            victim, stopped = choice.sample(range(PORTS), 2)
            time.sleep(choice.random() * 0.05)
            os.kill(all_vmms.pids[stopped], signal.SIGSTOP)
            inside += all_vmms.kill(victim)
            all_vmms.require_progress({stopped})
            os.kill(all_vmms.pids[stopped], signal.SIGCONT)
            all_vmms.start(victim)  # waits for calls that were stopped inside, if any
            all_vmms.require_progress(set())
        for port in range(PORTS):
            inside += all_vmms.kill(port)
        counters = all_vmms.switch.counters()
        assert counters.check() == []
        all_vmms.check_lanes()
        assert all(port.frames > 100 for port in counters.ports)
        # Each receiver has taken frames of its own sender only.
        for source in range(PORTS):
            for to in range(PORTS):
                delivered = counters.lanes[source][to].delivered
                assert (delivered > 0) == (to == (source + 1) % PORTS)
    return inside
