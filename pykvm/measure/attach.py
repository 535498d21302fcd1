"""Cost for the host of attaching, detaching and revoking an object, in pages and in time.

The time-stamp counter is read in this process, before and after each call. On the emulated host it
counts instructions: those of this process, most of which are Python's, and those of the kernel on
its behalf. None of them are on the data path.
"""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa.objects import SharedObject
from pykvm.elisa.vcpu_attachment import AttachmentCost
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.programs import CrossingProgram
from pykvm.measure.records import Samples, typical
from pykvm.resources import GUEST_SOURCES

__all__ = ["AttachCost", "measure_attach"]

# rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_READ_COUNTER: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")


@dataclass(frozen=True)
class AttachCost:
    """Cost of attaching one object.

    Attributes:
        pages: pages of memory of one attachment.
        steps: samples of "attach", "detach" and "revoke".
    """

    pages: AttachmentCost
    steps: dict[str, Samples]

    def as_dict(self) -> dict[str, Any]:
        """Return the costs for a record.

        Of the pages, ``ept_tables`` are the kernel's, ``own`` were allocated for this attachment,
        and ``mapped`` are all that the contexts map, most of them shared with other attachments.
        """
        gate, sub = self.pages.gate, self.pages.sub
        return {
            "pages": {
                "ept_tables": gate.ept_tables + sub.ept_tables,
                "guest_tables": gate.guest_tables + sub.guest_tables,
                "own": self.pages.own,
                "mapped": gate.mapped + sub.mapped,
            },
            **{
                name: {"cost": samples.cost, **samples.as_dict()}
                for name, samples in self.steps.items()
            },
        }


def measure_attach(kvm: Kvm, repeats: int, scale: float) -> AttachCost:
    """Attach and detach, then attach and revoke, while the vCPU is not running.

    Args:
        kvm: an open ``/dev/kvm``.
        repeats: number of repetitions.
        scale: one tick of the time-stamp counter in the record's unit.

    Raises:
        PykvmError: see `ObjectInstance.attach`.
    """
    counter = SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c", guests=1)
    ticks: dict[str, list[int]] = {"nothing": [], "attach": [], "detach": [], "revoke": []}
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_READ_COUNTER)
    code = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))

    def timed(name: str, step: Callable[[], Any]) -> Any:
        before = read()
        result = step()
        ticks[name].append(read() - before)
        return result

    with counter.open() as instance, BareGuest(kvm, CrossingProgram(1, [])) as guest:
        for _ in range(repeats):
            for end in ("detach", "revoke"):
                timed("nothing", lambda: None)
                attachment = timed("attach", lambda: instance.attach_vcpu(guest.vcpu, 0))
                timed(end, getattr(attachment, end))
    counted = is_emulated()
    overhead = int(typical(ticks.pop("nothing"), counted=counted))
    return AttachCost(
        attachment.cost,
        {name: Samples(values, scale, overhead, counted) for name, values in ticks.items()},
    )
