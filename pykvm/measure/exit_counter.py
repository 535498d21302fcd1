"""VM exits of a vCPU, counted by KVM itself (KVM_GET_STATS_FD), between two marks of a guest."""

from dataclasses import dataclass
from typing import Any, Final

from pykvm.kvm import Stats, Vcpu

__all__ = ["ExitCounter", "Exits"]

# An external interrupt leaves the guest for the host's own sake (its timer, above all).
_COUNTED: Final = (
    *("exits", "irq_exits", "io_exits", "hypercalls", "halt_exits", "mmio_exits"),
    *("elisa_held", "elisa_returns"),
)


@dataclass(frozen=True)
class Exits:
    """Differences of KVM's counters over one measured part of a guest's run."""

    counters: dict[str, int]
    marks: int

    @property
    def own(self) -> int:
        """Exits that the measured code caused: all, less the host's interrupts and less the
        exits with which the guest marks where the part ends."""
        return self.counters["exits"] - self.counters["irq_exits"] - self.marks

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {"own": self.own, "marks": self.marks, **self.counters}

    def __add__(self, other: "Exits") -> "Exits":
        both = {name: self.counters[name] + other.counters[name] for name in self.counters}
        return Exits(both, self.marks + other.marks)


class ExitCounter:
    """Reads the counters at marks: `mark(2n)` begins part n, `mark(2n + 1)` ends it.

    The guest waits in its mark exit while the counters are read. The exit of the mark that ends a
    part falls into the part; that of the mark that begins it does not.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._stats: Stats = vcpu.stats()
        self._begun: dict[int, dict[str, int]] = {}
        self.parts: dict[int, Exits] = {}

    def mark(self, value: int) -> None:
        """For `BareGuest.run(on_mark=...)`."""
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
