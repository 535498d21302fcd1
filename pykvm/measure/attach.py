"""Cost for the host of attaching, detaching and revoking an object, in pages and in time.

An object's memory is registered once. After that an attachment costs the same whatever the
object's size, and however many there are: the first and the last of 64 are measured for each size.

The time-stamp counter is read in this process, before and after each call. On the emulated host it
counts instructions: those of this process, most of which are Python's, and those of the kernel on
its behalf. None of them are on the data path.
"""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pykvm.elisa import calls
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.elisa.protections import answers, needed
from pykvm.elisa.vcpu_attachment import AttachmentCost
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm, Vcpu
from pykvm.measure.records import Samples, typical
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import MIB, PAGE_SIZE

__all__ = ["ATTACHMENTS", "AttachCost", "measure_attach"]

ATTACHMENTS: Final = 64
"""Number of attachments of an object at the end, the most that it can have."""

# rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_READ_COUNTER: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")


@dataclass(frozen=True)
class AttachCost:
    """Cost of attaching one object.

    Attributes:
        size: MiB of the object's memory, besides the windows.
        registered: pages that its memory takes: ``charged`` ones, ``tables`` among them, and
            ``large`` pages of 2 MiB.
        pages: pages of memory of one attachment.
        charged: pages that each attachment was charged.
        steps: samples of "register", "attach first", "attach last", "detach" and "revoke".
    """

    size: int
    registered: dict[str, int]
    pages: AttachmentCost
    charged: list[int]
    steps: dict[str, Samples]

    def as_dict(self) -> dict[str, Any]:
        """Return the costs for a record.

        Of the pages, ``ept_tables`` are the kernel's, ``own`` were allocated for this attachment,
        and ``mapped`` are what the contexts map besides the object's memory, some of them shared
        with other attachments. ``charged`` are what counts towards RLIMIT_MEMLOCK.
        """
        gate, sub = self.pages.gate, self.pages.sub
        return {
            "mib": self.size,
            "registered": self.registered,
            "pages": {
                "ept_tables": gate.ept_tables + sub.ept_tables,
                "guest_tables": gate.guest_tables + sub.guest_tables,
                "own": self.pages.own,
                "mapped": gate.mapped + sub.mapped,
                "charged": self.charged,
            },
            **{
                name: {"cost": samples.cost, **samples.as_dict()}
                for name, samples in self.steps.items()
            },
        }


class _Stopwatch:
    """Readings of the time-stamp counter around steps, by the steps' names."""

    def __init__(self) -> None:
        self.ticks: dict[str, list[int]] = {}
        self._page = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._page.write(_READ_COUNTER)
        code = ctypes.c_char.from_buffer(self._page)
        self._read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))

    def time(self, name: str, step: Callable[[], Any]) -> Any:
        before = self._read()
        result = step()
        self.ticks.setdefault(name, []).append(self._read() - before)
        return result


def _charged_pages() -> int:
    """Return the pages that count towards this process's RLIMIT_MEMLOCK (proc(5), VmLck)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return (int(line.split()[1]) << 10) // PAGE_SIZE
    return 0


def measure_attach(kvm: Kvm, size: int, repeats: int, scale: float) -> AttachCost:
    """Attach and detach, then attach and revoke, while the vCPU is not running.

    Args:
        kvm: an open ``/dev/kvm``.
        size: MiB of the object's memory, besides the windows.
        repeats: number of repetitions.
        scale: one tick of the time-stamp counter in the record's unit.

    Raises:
        PykvmError: see `ObjectInstance.attach_vcpu`.
    """
    counter = SharedObject(
        "counter", GUEST_SOURCES / "objects" / "counter.c", shared=size * MIB, guests=ATTACHMENTS
    )
    watch = _Stopwatch()
    with counter.open() as instance, kvm.create_vm() as vm:
        calls.enable_contexts(vm, answered=answers(needed()))
        vcpu = vm.create_vcpu(0)
        before = _charged_pages()
        memory = watch.time("register", lambda: instance.register(kvm))
        registered = {
            "charged": _charged_pages() - before,
            "tables": memory.tables,
            "large": memory.large_pages,
        }
        for end in ("detach", "revoke"):  # what the first time alone takes is no attachment's cost
            getattr(instance.attach_vcpu(vcpu, 0), end)()
        charged = []
        for number in range(ATTACHMENTS):
            if number in (0, ATTACHMENTS - 1):
                _repeat(watch, instance, vcpu, number, repeats)
            before = _charged_pages()
            attachment = instance.attach_vcpu(vcpu, number)
            charged.append(_charged_pages() - before)
    counted = is_emulated()
    overhead = int(typical(watch.ticks.pop("nothing"), counted=counted))
    return AttachCost(
        size,
        registered,
        attachment.cost,
        charged,
        {name: Samples(values, scale, overhead, counted) for name, values in watch.ticks.items()},
    )


def _repeat(
    watch: _Stopwatch, instance: ObjectInstance, vcpu: Vcpu, number: int, repeats: int
) -> None:
    name = "attach last" if number else "attach first"
    for _ in range(repeats):
        for end in ("detach", "revoke"):
            watch.time("nothing", lambda: None)
            attachment = watch.time(name, lambda: instance.attach_vcpu(vcpu, number))
            watch.time(end, getattr(attachment, end))
