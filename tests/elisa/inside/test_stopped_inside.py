"""Changes that a VMM makes to a vCPU that it stopped inside a context.

The VMM is trusted, but its requests must not open a way for the guest.
"""

import pytest

from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import UnexpectedExitError
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.interrupts import VECTOR
from tests.rigs.probe import calls, events, events_taken, give, results
from tests.rigs.spinning import LONG, RETURN_PAGE, Spin

pytestmark = pytest.mark.elisa

SMAP = 1 << 21
EXCEPTION = 0  # basic exit reason, SDM vol. 3D appendix C


def stop_inside(guest: BareGuest, instance: ObjectInstance) -> Spin:
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    guest.stop()
    assert spin.inside
    return spin


@pytest.mark.attack("T11")
def test_an_interrupt_on_its_way(guest: BareGuest, instance: ObjectInstance) -> None:
    """KVM_SET_VCPU_EVENTS sets an interrupt that KVM would inject at the next entry."""
    spin = stop_inside(guest, instance)
    state = guest.vcpu.get_vcpu_events()
    assert not state.interrupt.injected
    state.interrupt.injected, state.interrupt.nr = 1, VECTOR
    guest.vcpu.set_vcpu_events(state)
    guest.start()
    spin.work_on()
    assert events_taken(guest) == 0
    spin.release()
    assert guest.wait(60) == 0
    (event,) = events(guest)
    assert (event.vector, event.rip) == (VECTOR, RETURN_PAGE)


@pytest.mark.attack("T7")
def test_another_mode(guest: BareGuest, instance: ObjectInstance) -> None:
    """Without SMAP not even the return's VMFUNC works, and the vCPU stops. With SMAP it goes on."""
    spin = stop_inside(guest, instance)
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 &= ~SMAP
    guest.vcpu.set_sregs(sregs)
    spin.release()
    guest.start()
    with pytest.raises(UnexpectedExitError) as caught:
        guest.wait(60)
    exit = caught.value.exit
    assert isinstance(exit, ElisaExit)
    assert (exit.cause, exit.at, exit.vmx_exit_reason) == (
        uapi.lib.KVM_ELISA_EXIT_REFUSED,
        uapi.lib.KVM_ELISA_AT_SUB,
        EXCEPTION,
    )
    assert not spin.inside  # it stopped on its way back

    sregs = guest.vcpu.get_sregs()
    sregs.cr4 |= SMAP
    guest.vcpu.set_sregs(sregs)
    guest.start()
    assert guest.wait(60) == 0
    assert results(guest)[0] is not None
