"""A guest that lets its object run code in the object's own memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pykvm.elisa import Attachment, SharedObject, crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.protections import Protection
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import HUGE_2M
from pykvm.sizes import PAGE_SIZE
from tests.rigs.probe import WILD, Probe, Step, What, calls
from tests.rigs.processor_modes import CR4, SMEP

CODE: Final = bytes.fromhex("b8 4d 00 00 00 c3")  # mov $77, %eax; ret
_RUN: Final = 3  # of wild.c


@contextmanager
def wild_guest(kvm: Kvm) -> Iterator[tuple[BareGuest, ObjectInstance, Attachment]]:
    """Yield a guest, the object `wild.c` with a large page of shared memory, and its attachment."""
    wild = SharedObject(
        "wild",
        WILD,
        shared=HUGE_2M,
        window=PAGE_SIZE,
        guests=1,
        without={Protection.CODE_CHECK},
    )
    with wild.open() as instance, BareGuest(kvm, Probe()) as guest:
        yield guest, instance, instance.attach(guest)


def run_memory(instance: ObjectInstance, attachment: Attachment) -> tuple[Step, Step]:
    """Put `CODE` into the object's shared memory; return the steps that let the object run it.

    The memory consists of user pages, which SMEP keeps supervisor code from. So the guest turns
    that off first, as it may.
    """
    instance.shared[: len(CODE)] = CODE
    at = attachment.crossing_gva + crossing.SHARED_OFFSET
    return Step(What.WRITE_CONTROL, 4, CR4 & ~SMEP), calls(attachment.slot, _RUN, at)
