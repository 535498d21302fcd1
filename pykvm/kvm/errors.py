"""What can go wrong with KVM: one class per cause.

Every class derives from `pykvm.errors.PykvmError` by way of `KvmError`; ``errno`` is the errno
that the kernel gave, or None where the kernel was not asked.
"""

from __future__ import annotations

import errno as errno_module
import os
from typing import TYPE_CHECKING

from pykvm.errors import PykvmError

if TYPE_CHECKING:
    from pykvm.kvm.exits import Exit
    from pykvm.kvm.ioctls import Ioctl

__all__ = [
    "ApiVersionError",
    "CapabilityMissingError",
    "ConsoleError",
    "HandleClosedError",
    "HypercallNumberError",
    "IoctlError",
    "KvmError",
    "KvmMissingError",
    "KvmPermissionError",
    "MemorySlotError",
    "MemorySlotOverlapError",
    "MsrError",
    "NotKvmError",
    "ReplyError",
    "UnexpectedExitError",
    "VcpuRunningError",
]


class KvmError(PykvmError):
    """Root of this package's errors."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class KvmMissingError(KvmError):
    """There is no KVM device: no module, no virtualization, or a container without it."""


class KvmPermissionError(KvmError):
    """The KVM device is there, and this user may not open it."""


class NotKvmError(KvmError):
    """The file opened is not the KVM device."""


class ApiVersionError(KvmError):
    """KVM_GET_API_VERSION is not 12; every kernel since 2.6.22 says 12."""


class HandleClosedError(KvmError):
    """Use of a handle after close()."""


class CapabilityMissingError(KvmError):
    """This kernel or processor lacks what a call needs; `capability` is its macro's name."""

    def __init__(self, capability: str, wanted_by: str) -> None:
        super().__init__(
            f"{wanted_by} needs {capability}, which this kvm does not have: "
            "type `pykvm doctor` to see what this host can do",
            errno_module.ENOTTY,
        )
        self.capability = capability


class IoctlError(KvmError):
    """An ioctl failed; `ioctl` is its macro's name."""

    def __init__(self, entry: Ioctl, errno: int) -> None:
        name = errno_module.errorcode.get(errno, str(errno))
        text = os.strerror(errno).lower()
        super().__init__(
            f"{entry.name} failed with {name} ({text}): {_next(entry, errno)}",
            errno,
        )
        self.ioctl = entry.name


class MemorySlotError(KvmError):
    """A memory slot that KVM cannot make: alignment, size, number or flags."""


class MemorySlotOverlapError(KvmError):
    """A memory slot whose guest addresses another slot has already."""


class MsrError(KvmError):
    """KVM refused an MSR; `index` is its number."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class VcpuRunningError(KvmError):
    """The vCPU is inside run() in another thread, where its state cannot be touched."""


class ConsoleError(KvmError):
    """A console port or buffer that cannot be had."""


class HypercallNumberError(KvmError):
    """More hypercalls than the run loop answers."""


class ReplyError(KvmError):
    """An exit that takes no reply, or a reply that does not fit it."""


class UnexpectedExitError(KvmError):
    """An exit that the caller has no use for.

    exit: the exit. report: registers, context, instruction bytes and the last exits, several
    lines (`pykvm.kvm.report`).
    """

    def __init__(self, exit: Exit, report: str) -> None:
        super().__init__(f"the guest stopped with {exit}: print the error's .report to see where")
        self.exit = exit
        self.report = report


_HINTS = {
    errno_module.EACCES: "run it as root, or type `pykvm doctor`",
    errno_module.EPERM: "run it as root, or type `pykvm doctor`",
    errno_module.ENOMEM: "free some memory, or raise the limit with `ulimit -l unlimited`",
    errno_module.EMFILE: "raise the limit of open files with `ulimit -n 65536`",
    errno_module.EFAULT: "pass addresses of memory that stays mapped",
    errno_module.EBUSY: "close what uses it first",
    errno_module.EIO: "the vm belongs to another process, or is dead: create it again",
}


def _next(entry: Ioctl, errno: int) -> str:
    if entry.hint and errno not in (errno_module.EPERM, errno_module.EACCES, errno_module.ENOMEM):
        return entry.hint
    return _HINTS.get(errno, "check the arguments, and type `pykvm doctor` to see what kvm has")
