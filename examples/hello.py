"""Run the smallest guest: one vCPU, one program, no firmware and no kernel."""

from pathlib import Path

from pykvm.kvm import Kvm
from pykvm.machine.bare.build import GuestProgram
from pykvm.machine.bare.guest import BareGuest

program = GuestProgram(Path(__file__).with_name("hello.c"))
with Kvm() as kvm, BareGuest(kvm, program) as guest:
    status = guest.run()
    print(guest.console, end="")
print(f"it ended with status {status}")
