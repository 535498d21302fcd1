"""Native handlers: C functions that serve exits inside the run loop, without Python.

A VM has one table of them, which all of its vCPUs use. A handler serves a range of ports, of
guest physical addresses, or a hypercall; devices register what they serve, and the run loop knows
none of them. The functions' types are in ``native/handlers.h``.
"""

from __future__ import annotations

import errno
import threading
import weakref
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pykvm.closeable import ForkAware
from pykvm.kvm.errors import (
    HandlerError,
    HandlerOverlapError,
    KvmError,
    VcpuRunningError,
)
from pykvm.kvm.native import Struct, ffi, lib

__all__ = ["NULL_HYPERCALL", "Handler", "Handlers", "Space", "VcpuHandlers"]

NULL_HYPERCALL: Any = lib.pykvm_null_hypercall
"""A hypercall's function that returns 0, for `Handlers.add_hypercall`."""


class Space(IntEnum):
    """Kinds of numbers in a handler's range."""

    PORTS = lib.PYKVM_PORTS
    MMIO = lib.PYKVM_MMIO
    HYPERCALLS = lib.PYKVM_HYPERCALLS


_NOUNS = {Space.PORTS: "port", Space.MMIO: "gpa", Space.HYPERCALLS: "hypercall"}
_LIMITS = {Space.PORTS: 1 << 16, Space.MMIO: 1 << 64, Space.HYPERCALLS: 1 << 64}


@dataclass(frozen=True, eq=False, slots=True)
class Handler:
    """A C function, and the range that it serves.

    Attributes:
        space: what the numbers of the range are.
        first: the range's first port, address or hypercall.
        last: its last one, included.
        function: a cffi pointer, or an address.
        context: the function's first argument.
    """

    space: Space
    first: int
    last: int
    function: Any
    context: Any

    def __str__(self) -> str:
        place = f"{_NOUNS[self.space]} {self.first:#x}"
        return place if self.first == self.last else f"{place} to {self.last:#x}"


class VcpuHandlers:
    """One vCPU's copy of the table, in C.

    Args:
        vcpu: its struct pykvm_vcpu.
    """

    def __init__(self, vcpu: Struct) -> None:
        self._vcpu = vcpu
        self._installed: Sequence[Handler] = ()

    def install(self, handlers: Sequence[Handler]) -> None:
        """Replace the handlers; return when none of the old ones runs any more."""
        array = ffi.new("struct pykvm_handler[]", len(handlers))
        for slot, handler in enumerate(handlers):
            array[slot].space = handler.space
            array[slot].first = handler.first
            array[slot].last = handler.last
            array[slot].function = _pointer(handler.function)
            array[slot].context = _pointer(handler.context)
        result = lib.pykvm_set_handlers(self._vcpu, array, len(handlers))
        if result == -errno.EDEADLK:
            raise VcpuRunningError(
                "a handler cannot change the handlers of its own vcpu", "do it after run()"
            )
        if result == -errno.ENOMEM:
            raise MemoryError("no memory for a table of handlers")
        self._installed = handlers  # keeps functions and contexts alive


class Handlers(ForkAware):
    """The handlers of a VM. They may be changed while its vCPUs run, by any thread.

    A function is a cffi pointer (of any FFI) or an address; it and its context, a cffi pointer or
    an address as well, are kept alive as long as they are registered. It may be called by several
    vCPUs at once, without the GIL.
    """

    def __init__(self) -> None:
        self._handlers: tuple[Handler, ...] = ()
        self._vcpus: weakref.WeakSet[VcpuHandlers] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Handler]:
        return iter(self._handlers)

    def add_ports(self, first: int, count: int, function: Any, context: Any = None) -> Handler:
        """Serve accesses to ports.

        Args:
            first: the first port.
            count: number of ports.
            function: a ``pykvm_access_fn``.
            context: its first argument.

        Returns:
            The handler, for `remove`.

        Raises:
            HandlerError: there are no such ports, or there is no function.
            HandlerOverlapError: another handler serves one of them.
            VcpuRunningError: a handler of one of the vCPUs made this call.
            ForkedProcessError: the VM belongs to the parent process.
        """
        return self._add(Space.PORTS, first, count, function, context)

    def add_mmio(self, gpa: int, size: int, function: Any, context: Any = None) -> Handler:
        """Serve accesses to guest physical memory that no slot holds; else as `add_ports`.

        Writes to read-only slots are such accesses too.

        Args:
            gpa: the first address.
            size: bytes.
            function: a ``pykvm_access_fn``.
            context: its first argument.
        """
        return self._add(Space.MMIO, gpa, size, function, context)

    def add_hypercall(self, number: int, function: Any, context: Any = None) -> Handler:
        """Answer a hypercall that leaves to user space; else as `add_ports`.

        Stock KVM lets few leave (KVM_CAP_EXIT_HYPERCALL).

        Args:
            number: the guest's RAX.
            function: a ``pykvm_hypercall_fn``.
            context: its first argument.
        """
        return self._add(Space.HYPERCALLS, number, 1, function, context)

    def remove(self, handler: Handler) -> None:
        """Serve a handler's range no longer; on return its function does not run any more.

        Raises:
            HandlerError: it is not registered.
            VcpuRunningError: a handler of one of the vCPUs made this call.
            ForkedProcessError: the VM belongs to the parent process.
        """
        with self._change(str(handler)):
            if handler not in self._handlers:
                raise HandlerError(f"no handler of {handler}", "remove what add_...() returned")
            self._install(tuple(each for each in self._handlers if each is not handler))

    def add_vcpu(self, vcpu: VcpuHandlers) -> None:
        """Use the handlers in a vCPU of the VM as well."""
        with self._change("a vcpu"):
            vcpu.install(self._handlers)
            self._vcpus.add(vcpu)

    def _add(self, space: Space, first: int, count: int, function: Any, context: Any) -> Handler:
        handler = Handler(space, first, first + count - 1, function, context)
        limit = _LIMITS[space]
        if count < 1 or first < 0 or handler.last >= limit:
            raise HandlerError(
                f"a handler of {count} places from {_NOUNS[space]} {first:#x} on",
                f"use 1 or more, from 0 to {limit - 1:#x}",
            )
        if not int(ffi.cast("uintptr_t", _pointer(function))):
            raise HandlerError(f"a handler of {handler} without a function", "pass a c function")
        with self._change(str(handler)):
            place = bisect(self._handlers, (space, first), key=lambda one: (one.space, one.first))
            for other in self._handlers[max(place - 1, 0) : place + 1]:
                if other.space == space and first <= other.last and other.first <= handler.last:
                    raise HandlerOverlapError(
                        f"{handler} is served by the handler of {other} already",
                        "choose another place, or remove() that one first",
                    )
            self._install((*self._handlers[:place], handler, *self._handlers[place:]))
        return handler

    def _change(self, what: str) -> threading.Lock:
        self.require_own(f"a change of handlers ({what})")  # the lock may be held for ever
        return self._lock

    def _install(self, handlers: tuple[Handler, ...]) -> None:
        """Give all vCPUs the same handlers, or leave all of them as they are."""
        try:
            for vcpu in list(self._vcpus):
                vcpu.install(handlers)
        except (KvmError, MemoryError):
            for vcpu in list(self._vcpus):
                with suppress(KvmError, MemoryError):
                    vcpu.install(self._handlers)
            raise
        self._handlers = handlers


def _pointer(value: Any) -> Any:
    """A void pointer from a pointer of any FFI, an address, or None."""
    address = 0 if value is None else value
    return ffi.cast("void *", int(ffi.cast("uintptr_t", address)))
