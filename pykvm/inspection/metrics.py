"""Counters of a running machine: a table, JSON, and Prometheus's text format.

The run loop counts the exits that reach this process (`Vcpu.exit_counts`); KVM counts what it does
itself (`pykvm.kvm.stats`). Reading either disturbs no vCPU.

Source of the text format: prometheus.io, "Exposition formats", version 0.0.4.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.inspection.exposition import Family, render
from pykvm.kvm import Statistic, Stats, Vcpu, Vm

__all__ = ["CONTENT_TYPE", "Metrics", "exit_counts", "exit_table"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""HTTP's content type of `Metrics.prometheus`."""

Values = dict[str, int | list[int]]


def _reason(name: str) -> str:
    return name.removeprefix("KVM_EXIT_").lower()


def exit_counts(vcpu: Vcpu) -> dict[str, dict[str, int]]:
    """Return a vCPU's exits by reason: how many were served by "native" code and in "python"."""
    counts = vcpu.exit_counts()
    reasons = sorted({*counts.native, *counts.returned})
    return {
        _reason(name): {
            "native": counts.native.get(name, 0),
            "python": counts.returned.get(name, 0),
        }
        for name in reasons
    }


def exit_table(vcpus: Iterable[Vcpu]) -> str:
    """Return the exits of vCPUs as a table for a reader, the most frequent reasons first."""
    columns = {vcpu.id: exit_counts(vcpu) for vcpu in vcpus}
    totals: dict[tuple[str, str], int] = {}
    for counts in columns.values():
        for reason, served in counts.items():
            for by, count in served.items():
                totals[reason, by] = totals.get((reason, by), 0) + count
    rows = [["exits", "served by", *(f"vcpu {number}" for number in columns), "all"]]
    for (reason, by), total in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        if total:
            each = (counts.get(reason, {}).get(by, 0) for counts in columns.values())
            rows.append([reason, by, *map(str, each), str(total)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_row(row, widths) for row in rows)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right).rstrip()


class Metrics(Closeable):
    """The counters of one machine. Make it before the vCPUs run: KVM's counters are opened here.

    Args:
        vm: its VM.
        vcpus: its processors.
        labels: labels for every sample of the text format, such as the machine's name.

    Raises:
        VcpuRunningError: a vCPU runs already.
    """

    def __init__(
        self, vm: Vm, vcpus: Sequence[Vcpu], labels: Mapping[str, str] | None = None
    ) -> None:
        self._vcpus = vcpus
        self._labels = dict(labels or {})
        self._vm_stats: Stats | None = None
        self._vcpu_stats: dict[int, Stats] = {}
        if vm.check_extension("KVM_CAP_BINARY_STATS_FD"):
            self._vm_stats = vm.stats()
            self._vcpu_stats = {vcpu.id: vcpu.stats() for vcpu in vcpus}

    def close(self) -> None:
        """Close KVM's counters."""
        for stats in (self._vm_stats, *self._vcpu_stats.values()):
            if stats is not None:
                stats.close()

    def read(self) -> dict[str, Any]:
        """Return all counters now.

        Returns:
            "vcpus": for each vCPU its "id", "runs" (KVM_RUN calls), "interrupted" ones, "exits"
            (see `exit_counts`) and "kvm" (KVM's statistics by name, lists for histograms); and
            "kvm" for the VM. "kvm" is empty where KVM has no binary statistics.
        """
        return {
            "kvm": self._vm_stats.read() if self._vm_stats else {},
            "vcpus": [self._read(vcpu) for vcpu in self._vcpus],
        }

    def _read(self, vcpu: Vcpu) -> dict[str, Any]:
        counts = vcpu.exit_counts()
        stats = self._vcpu_stats.get(vcpu.id)
        return {
            "id": vcpu.id,
            "runs": counts.runs,
            "interrupted": counts.interrupted,
            "exits": exit_counts(vcpu),
            "kvm": stats.read() if stats else {},
        }

    def json(self) -> str:
        """Return `read` as one line of JSON."""
        return json.dumps(self.read())

    def prometheus(self) -> str:
        """Return all counters in Prometheus's text format (`CONTENT_TYPE`)."""
        runs = Family("pykvm_vcpu_runs_total", "counter", "KVM_RUN calls.")
        interrupted = Family(
            "pykvm_vcpu_interrupted_runs_total", "counter", "KVM_RUN calls that a signal ended."
        )
        exits = Family(
            "pykvm_vcpu_exits_total",
            "counter",
            "Exits to user space, by reason and by what served them.",
        )
        families = {family.name: family for family in (runs, interrupted, exits)}
        for vcpu in self._vcpus:
            labels = {**self._labels, "vcpu": str(vcpu.id)}
            counts = vcpu.exit_counts()
            runs.add(labels, counts.runs)
            interrupted.add(labels, counts.interrupted)
            for reason, served in exit_counts(vcpu).items():
                for by, count in served.items():
                    exits.add({**labels, "reason": reason, "served_by": by}, count)
            if (stats := self._vcpu_stats.get(vcpu.id)) is not None:
                _add_statistics(families, "vcpu", stats, labels)
        if self._vm_stats is not None:
            _add_statistics(families, "vm", self._vm_stats, self._labels)
        return render(families.values())


def _add_statistics(
    families: dict[str, Family], what: str, stats: Stats, labels: Mapping[str, str]
) -> None:
    values = stats.read()
    for each in stats.statistics:
        made = _family(each, what)
        family = families.setdefault(made.name, made)
        value, scale = values[each.name], _scale(each)
        if family.kind == "histogram":
            buckets = value if isinstance(value, list) else [value]
            family.add_histogram(labels, _bounds(each, len(buckets), scale), buckets)
        elif isinstance(value, list):  # an array that is no histogram
            for index, item in enumerate(value):
                family.add({**labels, "index": str(index)}, item * scale)
        else:
            family.add(labels, value * scale)


def _scale(each: Statistic) -> int | float:
    """Return what one count stands for, in the base unit."""
    if each.unit == "none" and not each.exponent:
        return 1
    # 10.0 ** -9 is not 1e-09.
    return float(f"1e{each.exponent}") if each.base == 10 else 2**each.exponent


def _family(each: Statistic, what: str) -> Family:
    name = f"pykvm_kvm_{what}_{each.name}"
    if each.unit == "seconds":
        name = name.removesuffix("_ns") + "_seconds"
    elif each.unit in ("bytes", "cycles") and not name.endswith(each.unit):
        name = f"{name}_{each.unit}"
    text = f"KVM's statistic {each.name} of a {what}."
    if each.kind in ("linear hist", "log hist"):
        return Family(name, "histogram", text)
    if each.kind == "cumulative":
        return Family(f"{name}_total", "counter", text)
    return Family(name, "gauge", text)


def _bounds(each: Statistic, count: int, scale: float) -> list[float]:
    """Return the greatest value of each bucket but the last, which has no bound (api.rst 4.133)."""
    if each.kind == "linear hist":
        greatest = [each.bucket_size * (n + 1) - 1 for n in range(count - 1)]
    else:
        greatest = [2**n - 1 for n in range(count - 1)]
    return [float(f"{value * scale:.12g}") for value in greatest]
