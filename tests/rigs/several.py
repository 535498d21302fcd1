"""Guests with several vCPUs, and the object in which they stay together (objects/several.c)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import IntEnum
from functools import partial

from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.kvm import Exit, Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import Probe, Step, prepare, results, run
from tests.rigs.sources import OBJECTS
from tests.rigs.waiting import wait_for

_VCPUS = 8  # as in several.c


class Op(IntEnum):
    """First argument of several.c."""

    WHO = 0
    STAY = 1
    ADD = 2
    ADD_OWN = 3


def who(guest: int, vcpus: int, vcpu: int) -> int:
    """Return the answer to WHO."""
    return guest << 32 | vcpus << 16 | vcpu


class Several:
    """The object as the host sees it, and the word that releases those inside."""

    def __init__(self, instance: ObjectInstance) -> None:
        self._words = instance.shared.cast("Q")

    @property
    def inside(self) -> int:
        return self._words[0]

    @property
    def sum(self) -> int:
        return self._words[2]

    def own(self, guest: int, vcpu: int) -> int:
        """Return the sum of one vCPU."""
        return self._words[4 + guest * _VCPUS + vcpu]

    def hold(self) -> None:
        self._words[1] = 0

    def release(self) -> None:
        self._words[1] = 1

    def wait_for(self, inside: int) -> None:
        wait_for(lambda: self.inside == inside)

    def forget(self) -> None:
        """Release the view of the object's memory, which keeps it mapped."""
        self._words.release()


@contextmanager
def several_object(vcpus: int = 2, guests: int = 2) -> Iterator[tuple[ObjectInstance, Several]]:
    declaration = SharedObject("several", OBJECTS / "several.c", guests=guests, vcpus=vcpus)
    with declaration.open() as instance:
        several = Several(instance)
        try:
            yield instance, several
        finally:
            several.forget()


@contextmanager
def guest_of(kvm: Kvm, vcpus: int, *, name: str = "guest") -> Iterator[BareGuest]:
    """Create a prepared guest, each vCPU of which executes the steps passed to `give_each`."""
    with BareGuest(kvm, Probe(), vcpus=vcpus, name=name) as guest:
        prepare(guest)
        yield guest


def give_each(guest: BareGuest, *steps: Sequence[Step]) -> None:
    """Set the steps of each vCPU before the first run."""
    guest.set_input(Probe([step for each in steps for step in each]).input())
    for number in range(1, _VCPUS):
        guest.info.param[1 + number] = len(steps[number]) if number < len(steps) else 0


def start_over(guest: BareGuest) -> None:
    """Put all vCPUs back to the program's start."""
    entry = Probe().image().entry
    for number, vcpu in enumerate(guest.vcpus):
        stack = layout.stack_top(number)
        guest.start_vcpu(vcpu, entry, stack, layout.BOOT_INFO_GPA, number=number)


def results_of(guest: BareGuest, number: int) -> list[int | None]:
    """Return the results of one vCPU's steps; None for one that has not come back."""
    found = results(guest)
    counts = [int(guest.info.param[1 + each]) for each in range(1, _VCPUS)]
    counts = [len(found) - sum(counts), *counts]
    first = sum(counts[:number])
    return found[first : first + counts[number]]


def run_each(guest: BareGuest) -> list[list[Exit]]:
    """Run all vCPUs at the same time, each as `tests.rigs.probe.run` does."""
    with ThreadPoolExecutor(len(guest.vcpus)) as pool:
        ends = [pool.submit(partial(run, guest, vcpu=vcpu)) for vcpu in guest.vcpus]
        return [end.result() for end in ends]
