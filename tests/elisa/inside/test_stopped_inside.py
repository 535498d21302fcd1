"""Changes that a VMM makes to a vCPU that it stopped inside a context.

The VMM is trusted, but its requests must not open a way for the guest: they are refused until the
vCPU is back in its default context.
"""

import errno

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import IoctlError
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.interrupts import VECTOR
from tests.rigs.probe import calls, events_taken, give, results
from tests.rigs.spinning import LONG, Spin

pytestmark = pytest.mark.elisa

SMAP = 1 << 21


def stop_inside(guest: BareGuest, instance: ObjectInstance) -> Spin:
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    guest.stop()
    assert spin.inside
    return spin


def goes_on(guest: BareGuest, spin: Spin) -> None:
    guest.start()
    spin.work_on()
    spin.release()
    assert guest.wait(60) == 0
    assert results(guest)[0] is not None


@pytest.mark.attack("T11")
def test_an_interrupt_on_its_way(guest: BareGuest, instance: ObjectInstance) -> None:
    """KVM_SET_VCPU_EVENTS would set an interrupt that KVM injects at the next entry."""
    spin = stop_inside(guest, instance)
    state = guest.vcpu.get_vcpu_events()
    assert not state.interrupt.injected
    state.interrupt.injected, state.interrupt.nr = 1, VECTOR
    with pytest.raises(IoctlError) as caught:
        guest.vcpu.set_vcpu_events(state)
    assert caught.value.errno == errno.EBUSY
    goes_on(guest, spin)
    assert events_taken(guest) == 0


@pytest.mark.attack("T7")
def test_another_mode(guest: BareGuest, instance: ObjectInstance) -> None:
    """Without SMAP not even the return's VMFUNC would work."""
    spin = stop_inside(guest, instance)
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 &= ~SMAP
    with pytest.raises(IoctlError) as caught:
        guest.vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EBUSY
    assert guest.vcpu.get_sregs().cr4 & SMAP
    goes_on(guest, spin)
