"""The base of the handles: one file descriptor each, closed once, with ioctls by name."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from typing import Any, ClassVar, TypeVar

from pykvm.closeable import Closeable
from pykvm.kvm.errors import CapabilityMissingError, HandleClosedError, IoctlError
from pykvm.kvm.ioctls import IOCTLS, Capability, Ioctl, Scope
from pykvm.kvm.native import Struct, ffi, lib

__all__ = ["Handle", "capability_number"]

_Child = TypeVar("_Child", bound="Handle")


def capability_number(capability: str | int | Capability) -> int:
    """Return the number of a ``KVM_CAP_*`` macro.

    Raises:
        CapabilityMissingError: linux/kvm.h did not have the name when pykvm was built.
    """
    if isinstance(capability, int):
        return capability
    if isinstance(capability, Capability):
        return capability.number
    number = getattr(lib, capability, None)
    if not isinstance(number, int):
        raise CapabilityMissingError(capability, "this build of pykvm")
    return number


class Handle(Closeable):
    """Owner of one file descriptor, which closes the handles that it has adopted before itself.

    In a process that was forked later, KVM refuses calls on VMs, vCPUs and devices, because it
    compares address spaces. They raise ForkedProcessError there, and `close` closes the
    descriptor.

    Args:
        fd: the descriptor; the handle owns it from now on.
        parent: the handle that this one was made from. It answers for capabilities where the
            descriptor itself cannot be asked.
    """

    scope: ClassVar[Scope]

    def __init__(self, fd: int, parent: Handle | None = None) -> None:
        self._fd = fd
        self._parent = parent
        self._children: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._extensions: dict[int, int] = {}

    # ---- the descriptor ---------------------------------------------------------------------
    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            HandleClosedError: the handle is closed.
        """
        if self._fd < 0:
            raise HandleClosedError(f"this {self._noun()} is closed", "create another one")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def adopt(self, child: _Child) -> _Child:
        """Close `child` together with this handle; return it."""
        self._children.add(child)
        return child

    def close(self) -> None:
        """Close the adopted handles, then the descriptor."""
        for child in list(self._children):
            child.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._give_back(fd)

    def _give_back(self, fd: int) -> None:
        os.close(fd)

    def __del__(self) -> None:
        # A constructor that raised leaves no _fd behind.
        if getattr(self, "_fd", -1) >= 0:
            if not self.inherited:  # a child process is not the one who forgot to close it
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._fd < 0 else f'fd {self._fd}'}>"

    def _noun(self) -> str:
        return type(self).__name__.lower()

    @property
    def system(self) -> Handle:
        """The handle on /dev/kvm that this one comes from, or itself."""
        return self if self._parent is None else self._parent.system

    # ---- capabilities -----------------------------------------------------------------------
    def check_extension(self, capability: str | int | Capability) -> int:
        """Return the value of a capability (KVM_CHECK_EXTENSION).

        Returns:
            0 if it is absent, else 1 or a number that the capability defines.
        """
        call = IOCTLS["KVM_CHECK_EXTENSION"]
        if self.scope not in call.scopes:
            return self._parent.check_extension(capability) if self._parent else 0
        number = capability_number(capability)
        if number not in self._extensions:
            self._extensions[number] = max(self._raw_ioctl(call, number), 0)
        return self._extensions[number]

    def require(self, capability: str | Capability, wanted_by: str) -> int:
        """Return the value of a capability that a caller cannot do without.

        Raises:
            CapabilityMissingError: the value is 0.
        """
        value = self.check_extension(capability)
        if not value:
            name = capability if isinstance(capability, str) else capability.name
            raise CapabilityMissingError(name, wanted_by)
        return value

    def enable_cap(self, capability: str | int | Capability, *args: int, flags: int = 0) -> None:
        """Enable a capability (KVM_ENABLE_CAP).

        Args:
            capability: name or number.
            args: up to four numbers; api.rst chapters 6 and 7 say which.
            flags: see there.

        Raises:
            IoctlError: the capability cannot be enabled here, or not any more.
        """
        number = capability_number(capability)
        request = ffi.new("struct kvm_enable_cap *", {"cap": number, "flags": flags})
        request.args = args
        self.ioctl("KVM_ENABLE_CAP", request)
        self._extensions.clear()  # enabling one can change what others say

    # ---- calls ------------------------------------------------------------------------------
    def ioctl(self, call: str | Ioctl, arg: Any = 0) -> int:
        """Make a call of the table (`pykvm.kvm.ioctls`), by name, or one that a patch adds.

        A call that a signal interrupts is made again after Python's handlers have run (PEP 475).

        Args:
            call: a name of the table, or an entry.
            arg: an integer, or a cffi pointer (of any FFI).

        Returns:
            The call's result, 0 or more.

        Raises:
            CapabilityMissingError: this KVM does not have the call.
            IoctlError: the call failed.
            HandleClosedError: the handle is closed.
            ForkedProcessError: the handle belongs to the parent process.
        """
        entry = IOCTLS[call] if isinstance(call, str) else call
        if needed := entry.needs(self.scope):
            self.require(needed, entry.name)
        result = self._raw_ioctl(entry, arg)
        if result < 0:
            raise IoctlError(entry.name, -result, entry.next_step(-result))
        return result

    def _raw_ioctl(self, entry: Ioctl, arg: Any = 0) -> int:
        """Make a call without probing; return its result, or -errno."""
        if self.scope not in entry.scopes:
            raise TypeError(f"{entry.name} is not a call on a {self._noun()}")
        if self.scope is not Scope.SYSTEM:
            self.require_own(f"{entry.name} on a {self._noun()}")
        word = arg if isinstance(arg, int) else int(ffi.cast("uintptr_t", arg))
        number = getattr(lib, entry.name) if entry.number is None else entry.number
        # Handlers of signals run, and may raise, between two turns of the loop.
        while (result := int(lib.pykvm_ioctl(self.fileno(), number, word))) == -errno.EINTR:
            pass
        return result

    def _get(self, name: str, struct: str) -> Struct:
        """Make a call that fills a struct; return the struct."""
        result = ffi.new(f"struct {struct} *")
        self.ioctl(name, result)
        return result
