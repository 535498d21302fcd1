"""I6: a system-management interrupt waits until the vCPU is back in its default context."""

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import calls, give, results
from tests.rigs.smram import IN_HANDLER, smram
from tests.rigs.spinning import LONG, RETURN_PAGE, Spin

pytestmark = pytest.mark.elisa


@pytest.mark.attack("T11")
def test_a_system_management_interrupt(guest: BareGuest, instance: ObjectInstance) -> None:
    """The handler finds the guest on the return page, not the object's registers."""
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG), calls(slot, 7))
    spin = Spin(instance)
    marks: list[tuple[int, int]] = []
    with smram(guest) as ram:
        guest.start()
        spin.wait_until_inside()
        guest.stop()
        guest.vcpu.smi()
        guest.start(lambda mark: marks.append((mark, ram.saved_rip)))
        spin.work_on()
        assert (marks, ram.saved_rip) == ([], 0)
        spin.release()
        assert guest.wait(60) == 0
    assert marks == [(IN_HANDLER, RETURN_PAGE)]
    first, second = results(guest)
    assert first
    assert second == 0  # the object is called again after the handler
