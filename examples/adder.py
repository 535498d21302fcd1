"""Attach an object of one's own to two guests, which call it at the same time with VMFUNC."""

from pathlib import Path

from pykvm.elisa import SharedObject
from pykvm.kvm import Kvm
from pykvm.machine.bare.build import GuestProgram
from pykvm.machine.bare.guest import BareGuest

HERE = Path(__file__).parent
adder = SharedObject("adder", HERE / "adder.c", shared=4096, window=0, guests=2)
program = GuestProgram(HERE / "adder_guest.c", parameters=[1000])

with (
    Kvm() as kvm,
    BareGuest(kvm, program, name="first") as first,
    BareGuest(kvm, program, name="second") as second,
    adder.open() as instance,  # compiles it, and allocates its memory
):
    for guest in (first, second):
        instance.attach(guest)  # both EPT contexts, and a slot of the vCPU's EPTP list
    for guest in (first, second):
        guest.start()
    for guest in (first, second):
        guest.wait(60)
        print(f"the sum when its last call returned: {guest.results()[0]}")
    print(f"the sum in the object's memory: {int.from_bytes(instance.shared[:8], 'little')}")
