"""Errors of KVM: one class per cause.

Every class derives from `pykvm.errors.PykvmError` by way of `KvmError`; ``errno`` is the errno
that the kernel gave, or None where the kernel was not asked.
"""

from __future__ import annotations

import errno as errno_module
import os

from pykvm.errors import PykvmError
from pykvm.kvm.exits import Exit

__all__ = [
    "ApiVersionError",
    "BreakpointError",
    "CapabilityMissingError",
    "CpuidError",
    "DirtyLogError",
    "GsiRoutingError",
    "HandleClosedError",
    "HandlerError",
    "HandlerOverlapError",
    "IoctlError",
    "KvmError",
    "KvmMissingError",
    "KvmPermissionError",
    "MemorySlotError",
    "MemorySlotOverlapError",
    "MsrError",
    "MsrFilterError",
    "NotKvmError",
    "ReplyError",
    "StateSizeError",
    "UnexpectedExitError",
    "VcpuRunningError",
]


class KvmError(PykvmError):
    """Root of this package's errors."""

    def __init__(self, problem: str, next_step: str = "", *, errno: int | None = None) -> None:
        super().__init__(problem, next_step)
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
    """This kernel or processor lacks what a call needs.

    Attributes:
        capability: the name of its macro.
    """

    def __init__(self, capability: str, wanted_by: str) -> None:
        super().__init__(
            f"{wanted_by} needs {capability}, which this kvm does not have",
            "type `pykvm doctor` to see what this host can do",
            errno=errno_module.ENOTTY,
        )
        self.capability = capability


class IoctlError(KvmError):
    """An ioctl failed.

    Args:
        ioctl: the name of its macro.
        errno: the kernel's answer.
        next_step: what to do, where the call knows more than its errno says.
    """

    def __init__(self, ioctl: str, errno: int, next_step: str | None = None) -> None:
        name = errno_module.errorcode.get(errno, str(errno))
        super().__init__(
            f"{ioctl} failed with {name} ({os.strerror(errno).lower()})",
            next_step or _STEPS.get(errno, _CHECK_ARGUMENTS),
            errno=errno,
        )
        self.ioctl = ioctl


class MemorySlotError(KvmError):
    """A memory slot that KVM cannot make: alignment, size, number or flags."""


class MemorySlotOverlapError(KvmError):
    """A memory slot whose guest addresses another slot has already."""


class DirtyLogError(KvmError, ValueError):
    """Page numbers that a memory slot does not have."""


class GsiRoutingError(KvmError, ValueError):
    """A routing table that KVM cannot take."""


class CpuidError(KvmError, ValueError):
    """More CPUID leaves than KVM keeps for a vCPU."""


class MsrError(KvmError):
    """KVM refused an MSR.

    Attributes:
        index: its number.
    """

    def __init__(self, problem: str, next_step: str, index: int) -> None:
        super().__init__(problem, next_step)
        self.index = index


class MsrFilterError(KvmError, ValueError):
    """An MSR filter that KVM cannot take."""


class StateSizeError(KvmError, ValueError):
    """A state of the wrong length: the kernel would read or write behind its end."""


class BreakpointError(KvmError, ValueError):
    """Breakpoints that the processor does not have."""


class VcpuRunningError(KvmError):
    """The vCPU is inside run(), where its state cannot be touched."""


class HandlerError(KvmError, ValueError):
    """A handler for places that do not exist, or one that is not in the table."""


class HandlerOverlapError(KvmError, ValueError):
    """A handler for places that another handler serves already."""


class ReplyError(KvmError):
    """An exit that takes no reply, or a reply that does not fit it."""


class UnexpectedExitError(KvmError):
    """An exit that the caller has no use for.

    Attributes:
        exit: the exit.
        report: registers, context, instruction bytes and the last exits, several lines
            (`pykvm.kvm.x86.report`).
    """

    def __init__(self, exit: Exit, report: str) -> None:
        super().__init__(f"the guest stopped with {exit}", "print the error's .report to see where")
        self.exit = exit
        self.report = report


_CHECK_ARGUMENTS = "check the arguments, and type `pykvm doctor` to see what kvm has"

_STEPS = {
    errno_module.E2BIG: "pass fewer entries in one call",
    errno_module.EACCES: "run it as root, or type `pykvm doctor`",
    errno_module.EBUSY: "close what uses it first, or let the vcpu run on",
    errno_module.EFAULT: "pass addresses of memory that stays mapped",
    errno_module.EIO: "the vm belongs to another process, or is dead: create it again",
    errno_module.EMFILE: "raise the limit of open files with `ulimit -n 65536`",
    errno_module.ENFILE: "close files of other programs: the whole system has too many",
    errno_module.ENOMEM: "free some memory, or raise the limit with `ulimit -l unlimited`",
    errno_module.EPERM: "run it as root, or type `pykvm doctor`",
}
