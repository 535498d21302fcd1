"""A forked child of a VMM with objects gives back what it has, and the guests run on."""

import os

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import ForkedProcessError, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.switch import SwitchConfig
from pykvm.switch.hosted import HostedSwitch
from tests.rigs.forks import in_fork
from tests.rigs.host_state import nothing_stays
from tests.rigs.messages import one_line
from tests.rigs.probe import Probe, calls, give, prepare, results
from tests.rigs.spinning import LONG, Spin, spin_object


def mapped(name: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f"memfd:{name}" in line for line in maps)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.unit
def test_an_object_without_guests(counter: ObjectInstance) -> None:
    counter.shared[0:4] = b"kept"
    maps, files = mapped("counter"), open_files()
    assert maps >= 2

    def body() -> None:
        before = open_files()
        counter.close()
        counter.close()
        assert mapped("counter") == 0
        assert open_files() < before

    in_fork(body)
    assert (mapped("counter"), open_files()) == (maps, files)
    assert bytes(counter.shared[0:4]) == b"kept"


@pytest.mark.unit
def test_a_switch_with_its_clock() -> None:
    """The clock's thread belongs to the parent: the child waits for nothing."""
    config = SwitchConfig(ports=2, lane_slots=16, tx_slots=16)
    with HostedSwitch(config, epoch=0.001) as hosted:
        in_fork(hosted.close)
        assert hosted.switch.counters().epoch >= 0
        hosted.switch.enable(0)


@pytest.mark.elisa
def test_a_guest_inside_the_object(kvm: Kvm) -> None:
    """A child closes its copy of the object while a vCPU of the parent's works in it."""
    with nothing_stays(), spin_object().open() as instance, BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        spin = Spin(instance)
        attachment = instance.attach(guest)
        give(guest, calls(attachment.slot, LONG))
        guest.start()
        spin.wait_until_inside()

        def refused() -> None:
            for call in (attachment.detach, attachment.revoke, guest.stop):
                with pytest.raises(ForkedProcessError, match="make it in the process") as caught:
                    call()
                one_line(caught.value)

        def close_all() -> None:
            instance.close()
            guest.close()
            attachment.close()  # harmless again
            spin.forget()
            assert mapped("spin") == mapped("guest") == 0

        def close_guest_first() -> None:
            guest.close()
            instance.close()

        in_fork(refused)
        spin.work_on()
        in_fork(close_all)
        spin.work_on()
        in_fork(close_guest_first)
        spin.work_on()
        assert attachment.attached
        spin.release()
        assert guest.wait(60) == 0
        assert results(guest) != [None]
        attachment.detach()
        spin.forget()
