"""Records of measurements as JSON: raw samples, the figure derived from them, and the machine.

On the emulated host the time-stamp counter advances one tick with each instruction, so the
difference of two readings is a count of instructions; it is never called a time. On hardware, ticks
are converted with the vCPU's TSC frequency.
"""

import errno
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykvm.errors import PykvmError

__all__ = [
    "RecordError",
    "Samples",
    "extra_protections",
    "read_record",
    "require_writable",
    "typical",
    "unit_of_host",
    "write_record",
]


class RecordError(PykvmError):
    """A record that cannot be read or written."""


def unit_of_host(host: str) -> str:
    """Return the unit of costs on this kind of host: "instructions" or "ns"."""
    return "instructions" if host == "emulated" else "ns"


def typical(values: Sequence[int], *, counted: bool) -> float:
    """Return the figure for many readings: the minimum of counts, the median of times.

    An interrupt of the host can only add instructions to a count, so the least count is that of an
    uninterrupted run, and it repeats exactly. Times vary in both directions.
    """
    return min(values) if counted else statistics.median(values)


@dataclass(frozen=True)
class Samples:
    """Raw readings of one quantity.

    Attributes:
        values: TSC differences, one for each call or burst.
        scale: one tick in the record's unit: 1 on the emulated host, ns per tick on hardware.
        overhead: ticks that the measurement itself takes; subtracted from every value.
        counted: whether the values count instructions; otherwise they are times.
    """

    values: Sequence[int]
    scale: float = 1.0
    overhead: int = 0
    counted: bool = False

    @property
    def cost(self) -> float:
        """Figure for the samples, without the overhead, in the record's unit (`typical`)."""
        return (typical(self.values, counted=self.counted) - self.overhead) * self.scale

    def as_dict(self) -> dict[str, Any]:
        """Return the samples for a record, in its unit and without the overhead.

        A raw reading of the counter is sample / scale + overhead.
        """
        samples = [(value - self.overhead) * self.scale for value in self.values]
        return {
            "samples": samples,
            "figure": "min" if self.counted else "median",
            "median": statistics.median(samples),
            "max": max(samples),
            "scale": self.scale,
            "overhead": self.overhead,
        }


def require_writable(path: Path) -> None:
    """Check, before anything is measured, that a record can be written; create its folder.

    Args:
        path: file of the record.

    Raises:
        RecordError: the file cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically.

    Args:
        path: file of the record; its folder is created.
        record: the record.

    Raises:
        RecordError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RecordError:
    next_step = "name a file in a folder that you can write to with --json"
    return RecordError(f"cannot write {path} ({error.strerror})", next_step)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record from a file.

    Raises:
        RecordError: the file cannot be read, or is not a JSON object.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"cannot read {path} ({error.strerror})", "check the name") from error
    except ValueError as error:
        raise RecordError(f"{path} is not a record ({error})", "measure again") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path} is not a record", "measure again")
    return record


def extra_protections(crossing: Mapping[str, Any]) -> str:
    """Return a line that says what a crossing's figures contain for weak processors.

    Args:
        crossing: a record of `pykvm.measure.crossing_cost`.
    """
    names = ", ".join(crossing["for_weak_processors"]) or "none"
    return f"protections for weak processors in a call by VMFUNC: {names}"
