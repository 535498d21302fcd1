"""Host of a measurement: this machine if it can cross with VMFUNC, else the emulated host."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pykvm.elisa import calls
from pykvm.errors import PykvmError
from pykvm.host.commands import program
from pykvm.host.emulation import counts_exactly, is_emulated
from pykvm.kvm import Kvm, KvmError
from pykvm.measure.records import read_record, require_writable, write_record

__all__ = ["InsideFailedError", "can_run_here", "can_run_linux", "on_suitable_host", "ticks_scale"]

_RECORD: Final = Path("build") / "record.json"  # files below build/ are copied back


class InsideFailedError(PykvmError):
    """The command failed on the emulated host, where it printed the reason."""


def can_run_here() -> bool:
    """Return whether this machine runs the patched KVM, so that guests can cross with VMFUNC."""
    try:
        with Kvm() as kvm:
            return calls.version(kvm) > 0
    except KvmError:
        return False


def can_run_linux() -> bool:
    """Return whether this machine's KVM runs guests on the processor, not in software."""
    try:
        Kvm().close()
    except KvmError:
        return False
    return any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))


def ticks_scale(kvm: Kvm) -> float:
    """Return one tick of a guest's time-stamp counter in the record's unit.

    That is 1 instruction on the emulated host, and the tick's length in nanoseconds elsewhere.
    """
    if is_emulated():
        return 1.0
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return 1e6 / vcpu.get_tsc_khz()


def on_suitable_host(
    measure: Callable[[], dict[str, Any]],
    arguments: list[str],
    *,
    files: Mapping[str, bytes],
    out: Path,
    memory: int | None = None,
    here: Callable[[], bool] = can_run_here,
) -> dict[str, Any]:
    """Measure on this machine or on the emulated host; write the record and return it.

    Args:
        measure: function that measures on this machine and returns the record.
        arguments: arguments of this `pykvm` command, with which it is repeated on the emulated
            host; --json FILE is added there.
        files: contents of the files to carry in, by the option that names the file.
        out: file of the record.
        memory: MiB of memory of the emulated host, if not the usual ones.
        here: tells whether this machine can measure.

    Raises:
        InsideFailedError: the command failed on the emulated host.
        RecordError: the record cannot be written or read.
        PykvmError: `measure` failed, or the emulated host cannot be started.
    """
    require_writable(out)
    if is_emulated() and not counts_exactly():
        raise PykvmError(
            "this emulated host does not count every instruction", "leave out --fast and --cpu"
        )
    if is_emulated() or here():
        record = measure()
        write_record(out, record)
        return record
    print(
        f"this machine cannot do it (see: {program()} doctor): running on the emulated Intel host",
        flush=True,
    )
    return _measure_inside(arguments, files, out, memory)


def _measure_inside(
    arguments: list[str], files: Mapping[str, bytes], out: Path, memory: int | None
) -> dict[str, Any]:
    from pykvm.measure.prebuild import build_images  # noqa: PLC0415
    from pykvm.testbed import Testbed  # noqa: PLC0415
    from pykvm.testbed.bochs import MEMORY  # noqa: PLC0415

    build_images()  # here, because compiling is slow on the emulated host
    with tempfile.TemporaryDirectory(prefix="pykvm-") as name:
        folder = Path(name)
        command = ["pykvm", *arguments, "--json", str(_RECORD)]
        for option, content in files.items():
            path = folder / option.lstrip("-")
            path.write_bytes(content)
            command += [option, path.name]
        testbed = Testbed(folder, memory=memory or MEMORY)
        outcome = testbed.run(command, stdout=_show(sys.stdout), stderr=_show(sys.stderr))
        if outcome.status or not (folder / _RECORD).exists():
            raise InsideFailedError(
                f"the command failed on the emulated host (exit status {outcome.status})",
                f"to look closer, type: {program()} testbed -- pykvm {shlex.join(arguments)}",
            )
        record = read_record(folder / _RECORD)
    write_record(out, record)
    return record


def _show(stream: Any) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.buffer.flush()

    return write
