"""The base of the handles: one file descriptor each, closed once, with ioctls by name."""

from __future__ import annotations

import os
import warnings
from typing import Any, ClassVar

from pykvm.closeable import Closeable
from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.errors import CapabilityMissingError, HandleClosedError, IoctlError
from pykvm.kvm.ioctls import IOCTLS, Capability, Ioctl, Scope

__all__ = ["Handle", "Struct", "capability_number"]

Struct = Any
"""A cffi struct: its fields are attributes, named as in linux/kvm.h."""


def capability_number(capability: str | int | Capability) -> int:
    """The number of a ``KVM_CAP_*`` macro. Raises CapabilityMissingError for an unknown name."""
    if isinstance(capability, int):
        return capability
    if isinstance(capability, Capability):
        return capability.number
    number = getattr(lib, capability, None)
    if not isinstance(number, int):
        raise CapabilityMissingError(capability, "this build of pykvm")
    return number


class Handle(Closeable):
    """Owns one file descriptor; a context manager; closing twice is harmless."""

    scope: ClassVar[Scope]

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor. Raises HandleClosedError after close()."""
        if self._fd < 0:
            raise HandleClosedError(f"this {self._noun()} is closed: create another one")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Give the descriptor back. Harmless when it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # A constructor that raised leaves no _fd behind.
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._fd < 0 else f'fd {self._fd}'}>"

    def check_extension(self, capability: str | int | Capability) -> int:
        """KVM_CHECK_EXTENSION: 0 if absent, else 1 or a number that the capability defines."""
        raise NotImplementedError

    def require(self, capability: str | Capability, wanted_by: str) -> int:
        """The value of a capability. Raises CapabilityMissingError where it is 0."""
        value = self.check_extension(capability)
        if not value:
            name = capability if isinstance(capability, str) else capability.name
            raise CapabilityMissingError(name, wanted_by)
        return value

    def ioctl(self, call: str | Ioctl, arg: Any = 0) -> int:
        """Make a call of the table (`pykvm.kvm.ioctls`), by name, or one that a patch adds.

        arg: an integer, or a cffi pointer (of any FFI). Returns the call's result, 0 or more.
        Raises CapabilityMissingError, IoctlError, HandleClosedError.
        """
        entry = IOCTLS[call] if isinstance(call, str) else call
        if needed := entry.needs(self.scope):
            self.require(needed, entry.name)
        result = self._raw_ioctl(entry, arg)
        if result < 0:
            raise IoctlError(entry, -result)
        return result

    def _raw_ioctl(self, entry: Ioctl, arg: Any = 0) -> int:
        """The call itself, without probing: its result, or -errno."""
        if self.scope not in entry.scopes:
            raise TypeError(f"{entry.name} is not a call on a {self._noun()}")
        word = arg if isinstance(arg, int) else int(ffi.cast("uintptr_t", arg))
        number = getattr(lib, entry.name) if entry.number is None else entry.number
        return int(lib.pykvm_ioctl(self.fileno(), number, word))

    def _get(self, name: str, struct: str) -> Struct:
        """Make a call that fills a struct; return the struct."""
        result = ffi.new(f"struct {struct} *")
        self.ioctl(name, result)
        return result

    def _noun(self) -> str:
        return type(self).__name__.lower()
