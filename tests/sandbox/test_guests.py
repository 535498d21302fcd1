"""Guests in a sandbox: made, run, stopped and written to files as they are outside."""

import os
import pty
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from pykvm.devices.serial import Serial
from pykvm.kvm import Handlers, Kvm
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.failures import GuestTimeoutError
from pykvm.machine.bare.guest import BareGuest
from pykvm.machine.linux.console import ESCAPE, Console
from pykvm.sandbox import Applied, Confinement, enter
from pykvm.toolchain.elf import ElfFile
from tests.rigs.confined import in_child, in_sandbox, outcomes
from tests.rigs.native_device import NativeDevice
from tests.rigs.sources import GUESTS
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.kvm, pytest.mark.native]


@dataclass(frozen=True)
class Selftest:
    """Guest program selftest.c, built before the sandbox."""

    built: ElfFile
    what: int
    value: int = 0

    def image(self) -> ElfFile:
        return self.built

    def params(self) -> list[int]:
        return [self.what, self.value]


@pytest.fixture(scope="module")
def built() -> ElfFile:
    return build_guest([GUESTS / "selftest.c"])


def test_a_guest_from_beginning_to_end(kvm: Kvm, built: ElfFile) -> None:
    """Of /dev/kvm, only the descriptor is there."""

    def body(applied: Applied) -> str:
        assert applied.complete
        for irqchip in (False, True):
            with BareGuest(kvm, Selftest(built, 0), irqchip=irqchip, contexts=False) as guest:
                assert guest.run() == 0
                said = guest.console
        with BareGuest(kvm, Selftest(built, 5, 20), contexts=False) as guest:
            marks: list[int] = []
            assert guest.run(marks.append) == 0
            assert marks == list(range(20))
        return said

    assert in_sandbox(body).endswith(", 18446744073709551615\n")
    assert outcomes(lambda: os.open("/dev/kvm", os.O_RDONLY)) == ["EACCES"]


def test_a_guest_that_is_there_before(built: ElfFile) -> None:
    """Its thread is confined with the others; it stops, goes on, and stops."""

    def body() -> list[str]:
        with BareGuest(Kvm(), Selftest(built, 6)) as guest:
            guest.start()
            wait_for(lambda: guest.vcpu.running)
            threads = enter(Confinement()).threads
            with pytest.raises(GuestTimeoutError, match="did not finish"):
                guest.wait(0.2)
            guest.start()
            wait_for(lambda: guest.vcpu.running)
            guest.stop()
            return [str(threads), str(guest.vcpu.running)]

    assert in_child(body) == ["2", "False"]


def test_interrupts_by_eventfds(kvm: Kvm) -> None:
    def body(_: Applied) -> bool:
        with kvm.create_vm() as vm:
            vm.create_irqchip()
            event = os.eventfd(0, os.EFD_CLOEXEC)
            vm.register_irqfd(event, 4)
            os.eventfd_write(event, 1)
            vm.unregister_irqfd(event, 4)
        return True

    assert in_sandbox(body)


def test_memory_into_a_file(kvm: Kvm, built: ElfFile, tmp_path: Path) -> None:
    """As snapshots are written: sparse, in a folder that gets its name at the end."""

    def body(_: Applied) -> int:
        with BareGuest(kvm, Selftest(built, 0), contexts=False) as guest:
            guest.run()
            partial = tmp_path / ".partial"
            partial.mkdir()
            with open(partial / "memory", "wb") as file:
                content = guest.memory.read(0, 1 << 20)
                file.write(content)
                file.truncate(1 << 24)
                os.fsync(file.fileno())
            partial.rename(tmp_path / "snapshot")
        return len(content.strip(b"\0"))

    assert in_sandbox(body, Confinement(writable=(tmp_path,))) > 1000
    assert (tmp_path / "snapshot" / "memory").stat().st_size == 1 << 24


def test_a_console() -> None:
    """On a terminal that is raw before or becomes so inside, and is restored inside."""
    keyboard, terminal = pty.openpty()

    def body(_: Applied) -> bytes:
        left, serial = threading.Event(), Serial()
        device = NativeDevice(serial.attach(Handlers()))
        with Console(serial.feed, left.set, terminal):
            os.write(keyboard, b"a")
            device.write(1, 1)  # IER
            wait_for(lambda: device.read(5)[0] & 1)  # LSR
            found = device.read(0)
            os.write(keyboard, ESCAPE)
            assert left.wait(20)
        serial.close()
        return found

    assert in_sandbox(body) == b"a"
    os.close(keyboard)
    os.close(terminal)
