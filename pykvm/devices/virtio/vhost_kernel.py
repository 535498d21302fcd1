"""The kernel's own virtio data planes: handles on /dev/vhost-net and /dev/vhost-vsock.

A thread of the kernel serves the rings, in the memory of the process that has opened the device.

Source: Linux include/uapi/linux/vhost.h, drivers/vhost/vhost.c.
"""

from __future__ import annotations

import errno as errno_module
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio._vhost import ffi, lib
from pykvm.devices.virtio.device import Feature, Ring
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import Region

__all__ = ["VhostError", "VhostKernel", "VhostMissingError", "VhostPermissionError"]


class VhostError(PykvmError):
    """A call that a vhost device refuses.

    Attributes:
        errno: the kernel's answer.
    """

    def __init__(self, problem: str, next_step: str = "", *, errno: int | None = None) -> None:
        super().__init__(problem, next_step)
        self.errno = errno


class VhostMissingError(VhostError):
    """There is no such device: its module is not loaded, or the kernel has none."""


class VhostPermissionError(VhostError):
    """The device is there, and this user may not open it."""


class VhostKernel(Closeable):
    """An open vhost device, which works on behalf of this process.

    Args:
        path: the device: "/dev/vhost-net", "/dev/vhost-vsock".
        module: the kernel module that makes it.

    Attributes:
        features: what its kernel can do.

    Raises:
        VhostMissingError: there is no such device.
        VhostPermissionError: this user may not open it.
        VhostError: the file is not a vhost device, or the kernel has no more threads.
    """

    def __init__(self, path: Path, module: str) -> None:
        self._path = path
        self._fd = _open(path, module)
        try:
            self.call("VHOST_SET_OWNER")
            self.features = self._get_number("VHOST_GET_FEATURES")
            if not self.features & Feature.VERSION_1:
                raise VhostError(f"{path} does without virtio 1.0", "boot a newer kernel")
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, -1 after close()."""
        return self._fd

    def set_features(self, features: int) -> None:
        """Tell what was negotiated; the device is told the part that is its own."""
        accepted = (features | Feature.VERSION_1) & self.features
        self.call("VHOST_SET_FEATURES", _number(accepted))

    def set_memory(self, regions: Sequence[Region]) -> None:
        """Let the device use `regions`, by their addresses in this process.

        Raises:
            VhostError: they are more than the kernel takes (64 by default).
        """
        table = ffi.new("struct vhost_memory *", {"regions": len(regions)})
        table.nregions = len(regions)
        for entry, region in zip(table.regions[0 : len(regions)], regions, strict=True):
            entry.guest_phys_addr = region.gpa
            entry.memory_size = region.size
            entry.userspace_addr = region.host_address
        self.call("VHOST_SET_MEM_TABLE", table)

    def set_ring(self, ring: Ring, memory: GuestMemory, error: int) -> None:
        """Set a ring up; it does not run yet.

        Args:
            ring: the ring, which lies in `memory` (`check_rings`).
            memory: the guest's.
            error: an eventfd that is written when the ring is not well-formed.
        """
        index = ring.index
        self.call("VHOST_SET_VRING_NUM", _state(index, ring.size))
        self.call("VHOST_SET_VRING_BASE", _state(index, ring.base))
        address = ffi.new("struct vhost_vring_addr *", {"index": index})
        address.desc_user_addr = memory.host_address(ring.descriptors)
        address.avail_user_addr = memory.host_address(ring.driver)
        address.used_user_addr = memory.host_address(ring.device)
        self.call("VHOST_SET_VRING_ADDR", address)
        self.call("VHOST_SET_VRING_ERR", _file(index, error))
        self.call("VHOST_SET_VRING_CALL", _file(index, ring.call))  # NO_CALL is VHOST_FILE_UNBIND
        self.call("VHOST_SET_VRING_KICK", _file(index, ring.kick))

    def base(self, index: int) -> int:
        """Return where a ring that does not run has come to, as `Ring.base`."""
        state = _state(index, 0)
        self.call("VHOST_GET_VRING_BASE", state)
        return int(state.num)

    def set_backend(self, index: int, fd: int) -> None:
        """Join a ring of vhost-net to a TAP's descriptor and let it run; -1 stops it."""
        self.call("VHOST_NET_SET_BACKEND", _file(index, fd))

    def set_guest_cid(self, cid: int) -> None:
        """Give vhost-vsock the guest's context ID."""
        self.call("VHOST_VSOCK_SET_GUEST_CID", _number(cid))

    def set_running(self, running: bool) -> None:
        """Let the rings of vhost-vsock run, or stop them."""
        self.call("VHOST_VSOCK_SET_RUNNING", ffi.new("int *", running))

    def call(self, name: str, argument: Any = None) -> None:
        """Make an ioctl of linux/vhost.h.

        Args:
            name: its macro.
            argument: a cffi pointer, which the kernel may write to; None for calls without.

        Raises:
            VhostError: the kernel refuses.
            ForkedProcessError: the device works for the parent process.
        """
        self.require_own(f"{name} on {self._path}")
        try:
            if argument is None:
                fcntl.ioctl(self._fd, getattr(lib, name))
            else:
                fcntl.ioctl(self._fd, getattr(lib, name), _bytes(argument), True)
        except OSError as error:
            number = error.errno or 0
            raise VhostError(
                f"{self._path} refuses {name} with {errno_module.errorcode.get(number, number)} "
                f"({os.strerror(number).lower()})",
                _STEPS.get(number, ""),
                errno=number,
            ) from error

    def _get_number(self, name: str) -> int:
        value = _number(0)
        self.call(name, value)
        return int(value[0])

    def close(self) -> None:
        """Stop the rings and close the device. Harmless twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_STEPS: Final = {
    errno_module.ENOTTY: "name a vhost device",
    errno_module.E2BIG: "give the guest its memory in fewer regions",
    errno_module.ENOMEM: "free some memory, or give the guest less",
    errno_module.EAGAIN: "end some processes, or raise the limit with `ulimit -u`",
}


def _open(path: Path, module: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number).lower()
        if number in (errno_module.ENOENT, errno_module.ENODEV, errno_module.ENXIO):
            from pykvm.host import advice  # noqa: PLC0415  (only where something is missing)

            step = advice.load_module(module, "boot a kernel that has it")
            raise VhostMissingError(f"no {path} here", step, errno=number) from error
        if number in (errno_module.EACCES, errno_module.EPERM):
            raise VhostPermissionError(
                f"no permission for {path}", "join its group, or run it as root", errno=number
            ) from error
        raise VhostError(f"cannot open {path} ({reason})", "", errno=number) from error


def _bytes(pointer: Any) -> Any:
    """Return the bytes that a pointer owns, an array behind a struct among them."""
    if ffi.typeof(pointer) is not ffi.typeof("struct vhost_memory *"):
        return ffi.buffer(pointer)
    region = ffi.sizeof("struct vhost_memory_region")
    return ffi.buffer(pointer, ffi.sizeof("struct vhost_memory") + pointer.nregions * region)


def _number(value: int) -> Any:
    return ffi.new("unsigned long long *", value)


def _state(index: int, value: int) -> Any:
    return ffi.new("struct vhost_vring_state *", {"index": index, "num": value})


def _file(index: int, fd: int) -> Any:
    return ffi.new("struct vhost_vring_file *", {"index": index, "fd": fd})
