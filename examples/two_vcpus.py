"""Attach an object to a guest with two vCPUs, and then give the guest a third one."""

from pathlib import Path

from pykvm.elisa import SharedObject
from pykvm.kvm import Kvm
from pykvm.machine.bare.build import GuestProgram
from pykvm.machine.bare.guest import BareGuest

HERE = Path(__file__).parent
# adder.c adds with one atomic instruction, so three vCPUs of a guest may be in it at once.
adder = SharedObject("adder", HERE / "adder.c", shared=4096, window=0, guests=1, vcpus=3)
program = GuestProgram(HERE / "two_vcpus_guest.c", parameters=[1000])

with Kvm() as kvm, BareGuest(kvm, program, vcpus=2) as guest, adder.open() as instance:
    instance.attach(guest)  # contexts and a stack for each vCPU, behind the same slot
    guest.start()  # each vCPU in a thread of its own
    guest.add_vcpu()  # while the others run; it has the object, too
    guest.start(numbers=[2])
    guest.wait(60)
    print(f"sums when the last call of each returned: {guest.results()[:3]}")
    print(f"the sum in the object's memory: {int.from_bytes(instance.shared[:8], 'little')}")
