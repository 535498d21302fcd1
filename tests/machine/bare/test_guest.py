"""Bare-metal guests on a real /dev/kvm, which may be one that interprets guests."""

import threading
from dataclasses import dataclass, field

import pytest

from pykvm.kvm import Io, Kvm, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.failures import (
    GuestAssertionError,
    GuestFaultError,
    GuestTimeoutError,
    ImageAddressError,
    InputTooLargeError,
)
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.programs import CrossingProgram, Way, way_samples
from pykvm.toolchain.elf import ElfFile, Segment
from tests.rigs.forks import in_fork
from tests.rigs.sources import GUESTS
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.kvm


@dataclass(frozen=True)
class Selftest:
    """Guest program selftest.c; its head lists the numbers."""

    what: int
    value: int = 0
    given: bytes = field(default=b"")

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "selftest.c"])

    def params(self) -> list[int]:
        return [self.what, self.value]

    def input(self) -> bytes:
        return self.given


def test_prints_and_finishes(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(0)) as guest:
        assert guest.run() == 0
        start = guest.console
    assert start.startswith("hello from 0x1")
    assert start.endswith(", 18446744073709551615\n")
    assert guest.console == start  # readable after the end


def test_status(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(4, 77)) as guest:
        assert guest.run() == 77
        assert guest.run() == 77  # the same answer again


def line_of(text: str) -> int:
    lines = (GUESTS / "selftest.c").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_failed_assertion_has_file_and_line(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(1, 6)) as guest, pytest.raises(GuestAssertionError) as caught:
        guest.run()
    line = line_of("ASSERT(value == 7)")
    assert (caught.value.file, caught.value.line) == ("selftest.c", line)
    assert str(caught.value) == f"selftest.c:{line}: the guest asserts value == 7"


def test_failed_comparison_has_both_values(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(2, 6)) as guest, pytest.raises(GuestAssertionError) as caught:
        guest.run()
    line = line_of("ASSERT_EQUAL(value, 7)")
    assert str(caught.value) == f"selftest.c:{line}: the guest asserts value == 7 (0x6 and 0x7)"


def test_assertions_that_hold(kvm: Kvm) -> None:
    for what in (1, 2):
        with BareGuest(kvm, Selftest(what, 7)) as guest:
            assert guest.run() == 0


@pytest.mark.parametrize(
    "address",
    [layout.NULL_PAGE_GPA, layout.IMAGE_GPA, layout.IMAGE_END_GPA - 8, layout.RAM_SIZE],
    ids=["null", "text", "behind the image", "behind the memory"],
)
def test_a_wrong_write_is_a_page_fault(kvm: Kvm, address: int) -> None:
    with BareGuest(kvm, Selftest(3, address)) as guest, pytest.raises(GuestFaultError) as caught:
        guest.run()
    assert caught.value.vector == 14
    assert caught.value.cr2 == address
    assert caught.value.error_code & 2  # a write
    assert layout.IMAGE_GPA <= caught.value.rip < layout.IMAGE_GPA + 0x1000
    assert f"address {address:#x}" in str(caught.value)


def test_call_without_an_attached_object_is_no_assertion(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(8)) as guest, pytest.raises(GuestFaultError) as caught:
        guest.run()
    assert (caught.value.vector, caught.value.rip, caught.value.cr2) == (14, 0, 0)
    assert str(caught.value) == (
        "page fault in the guest at rip 0x0, error code 0x10, address 0x0: "
        "it called a null pointer; attach the object that it calls before it runs"
    )


def test_marks_reach_the_host_in_order(kvm: Kvm) -> None:
    seen: list[int] = []
    with BareGuest(kvm, Selftest(5, 20)) as guest:
        assert guest.run(seen.append) == 0
    assert seen == list(range(20))


def test_an_unknown_exit_is_reported(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(7)) as guest, pytest.raises(UnexpectedExitError) as caught:
        guest.run()
    assert isinstance(caught.value.exit, Io)
    assert caught.value.exit.port == 0x123
    assert "rip" in caught.value.report


def test_a_guest_that_never_ends_is_stopped(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(6)) as guest:
        guest.start()
        with pytest.raises(GuestTimeoutError, match="did not finish"):
            guest.wait(0.2)
        assert not guest.vcpu.running
        guest.start()  # it goes on from there, and can be stopped again
        wait_for(lambda: guest.vcpu.running)
        guest.stop()
        assert not guest.vcpu.running
        guest.start()  # close() stops it, too
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]


def test_outcome_of_a_thread(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(4, 5)) as one, BareGuest(kvm, Selftest(1, 0)) as other:
        one.start()
        other.start()
        assert one.wait(60) == 5
        with pytest.raises(GuestAssertionError):
            other.wait(60)


def test_crossing_program_without_elisa(kvm: Kvm) -> None:
    program = CrossingProgram(calls=50, ways=[Way.EMPTY, Way.DIRECT])
    marks: list[int] = []
    with BareGuest(kvm, program) as guest:
        assert guest.run(marks.append) == 0
        assert guest.results()[0] == program.params()[1]
        samples = way_samples(guest.samples(), program)
    assert marks == [0, 1, 8, 9]
    assert set(samples) == {Way.EMPTY, Way.DIRECT}
    assert all(len(each) == 50 and min(each) > 0 for each in samples.values())


def test_vmfunc_needs_an_attachment(kvm: Kvm) -> None:
    program = CrossingProgram(calls=1, ways=[Way.VMFUNC])
    with BareGuest(kvm, program) as guest, pytest.raises(GuestAssertionError) as caught:
        guest.run()
    assert caught.value.file == "crossing.c"


def test_too_much_input(kvm: Kvm) -> None:
    with pytest.raises(InputTooLargeError, match="send fewer"):
        BareGuest(kvm, Selftest(0, given=bytes(layout.CAPTURE_SIZE + 1)))


def test_image_at_a_wrong_address(kvm: Kvm) -> None:
    class Wrong(Selftest):
        def image(self) -> ElfFile:
            return ElfFile(0x1000, (Segment(0x1000, 16, 5, b"\xf4" * 16),), (), ())

    with pytest.raises(ImageAddressError, match="link it between"):
        BareGuest(kvm, Wrong(0))


def test_a_forked_process_lets_a_running_guest_run(kvm: Kvm) -> None:
    with BareGuest(kvm, Selftest(6)) as guest:
        guest.start()
        wait_for(lambda: guest.vcpu.running)
        in_fork(guest.close)
        assert guest.vcpu.running
        guest.memory.write(layout.CAPTURE_GPA, b"mine still")
        guest.stop()
        assert guest.memory.read(layout.CAPTURE_GPA, 10) == b"mine still"
