"""VM exits of a vCPU between two marks of the guest, as KVM counts them (KVM_GET_STATS_FD)."""

from dataclasses import dataclass
from typing import Any, Final

from pykvm.kvm import Stats, Vcpu

__all__ = ["ExitCounter", "Exits"]

# The host's own interrupts cause irq_exits, most of them its timer's.
_COUNTED: Final = (
    *("exits", "irq_exits", "io_exits", "hypercalls", "halt_exits", "mmio_exits"),
    *("elisa_held", "elisa_returns"),
)


@dataclass(frozen=True)
class Exits:
    """Differences of KVM's counters over one measured part of a guest's run.

    Attributes:
        counters: differences by the name of the counter.
        marks: exits with which the guest marked the end of the part.
    """

    counters: dict[str, int]
    marks: int

    @property
    def own(self) -> int:
        """Exits that the measured code caused.

        These are all exits but those for the host's interrupts and those that mark the part's end.
        """
        return self.counters["exits"] - self.counters["irq_exits"] - self.marks

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for a record."""
        return {"own": self.own, "marks": self.marks, **self.counters}

    def __add__(self, other: "Exits") -> "Exits":
        both = {name: self.counters[name] + other.counters[name] for name in self.counters}
        return Exits(both, self.marks + other.marks)


class ExitCounter:
    """Reader of KVM's counters at a guest's marks: 2n begins part n, 2n + 1 ends it.

    The guest waits in the mark's exit while the counters are read. Therefore a part includes the
    exit of the mark that ends it, but not that of the mark that begins it.

    Attributes:
        parts: the exits of each part that has ended, by its number.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._stats: Stats = vcpu.stats()
        self._begun: dict[int, dict[str, int]] = {}
        self.parts: dict[int, Exits] = {}

    def mark(self, value: int) -> None:
        """Read the counters at a mark; pass this method to `BareGuest.run` as ``on_mark``."""
        now = self._read()
        part, end = divmod(value, 2)
        if not end:
            self._begun[part] = now
            return
        then = self._begun.pop(part)
        self.parts[part] = Exits({name: now[name] - then[name] for name in now}, marks=1)

    def _read(self) -> dict[str, int]:
        values = self._stats.read()
        return {name: value for name in _COUNTED if isinstance(value := values.get(name), int)}
