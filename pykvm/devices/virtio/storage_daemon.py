"""A disk in an image of any format that QEMU knows, served by a qemu-storage-daemon of ours.

Source: VIRTIO 1.2, 5.2; QEMU docs/tools/qemu-storage-daemon.rst and qapi/block-core.json.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm.devices.virtio.backend_process import LISTENER, BackendMissingError, BackendProcess
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.vhost_user import VhostUserDevice
from pykvm.devices.virtio.vhost_user_connection import REPLY_SECONDS
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["FORMATS", "ImageError", "StorageDaemonDisk", "image_format"]

FORMATS: Final = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
"""Names of QEMU's drivers of formats."""

_BY_SUFFIX: Final = {".vhd": "vpc", **{f".{name}": name for name in FORMATS}}

_QUEUE_SIZE: Final = 256
_MOST_QUEUES: Final = 64
_CONFIG_SIZE: Final = 60
"""struct virtio_blk_config (5.2.4) without what it has for secure erase and zones."""

_PATIENCE_SECONDS: Final = 60.0
"""Seconds that it may take at its end to write what it still has."""

_PROGRAM: Final = "qemu-storage-daemon"


class ImageError(PykvmError, ValueError):
    """An image that cannot be a disk."""


def image_format(image: Path) -> str:
    """Return the format that a file's name says, "raw" by default.

    Its content is not looked at: a guest could write the first sectors of a raw disk so that they
    look like another format, one that names any file of the host as its backing file.
    """
    return _BY_SUFFIX.get(image.suffix.lower(), "raw")


class StorageDaemonDisk(VhostUserDevice):
    """A disk. What its guest has flushed is in the image.

    Args:
        image: a file or a block device.
        memory: the guest's.
        format: one of `FORMATS`; by default what the file's name says.
        read_only: whether nothing can be written.
        queues: number of queues.
        program: the qemu-storage-daemon; by default the one that is found by its name.
        timeout: seconds that each of its replies may take.

    Attributes:
        pid: process ID of its qemu-storage-daemon.

    Raises:
        ImageError: the image, its format or the number of queues cannot be.
        BackendMissingError: qemu-storage-daemon is not installed.
        BackendError: it cannot serve the image: another process uses it, or it is damaged.
    """

    stateless = True

    def __init__(
        self,
        image: Path,
        memory: GuestMemory,
        *,
        format: str | None = None,
        read_only: bool = False,
        queues: int = 1,
        program: Path | None = None,
        timeout: float = REPLY_SECONDS,
    ) -> None:
        if not 1 <= queues <= _MOST_QUEUES:
            raise ImageError(f"a disk of {queues} queues", f"use 1 to {_MOST_QUEUES}")
        format = image_format(image) if format is None else format
        if format not in FORMATS:
            raise ImageError(f"no images of format {format!r}", f"use {', '.join(FORMATS)}")
        kind = _kind(image, read_only)
        process = BackendProcess(
            f"qemu-storage-daemon of {image}",
            _command(program or _program(), image, kind, format, read_only, queues),
            patience=_PATIENCE_SECONDS,
            timeout=timeout,
        )
        self.pid = process.pid
        self._image = image
        super().__init__(
            DeviceType.BLOCK,
            process.connection,
            memory,
            queue_sizes=[_QUEUE_SIZE] * queues,
            config_size=_CONFIG_SIZE,
            process=process,
        )

    def disk_files(self) -> Sequence[Path]:
        """Return the image's file; files behind it are not the guest's to change."""
        return (self._image,)


def _program() -> Path:
    found = shutil.which(_PROGRAM)
    if found is None:
        raise BackendMissingError(_PROGRAM, "qemu-utils", older="qemu-system-common")
    return Path(found)


def _command(
    program: Path, image: Path, kind: str, format: str, read_only: bool, queues: int
) -> list[str]:
    file = {
        "driver": kind,
        "node-name": "file",
        "filename": os.path.abspath(image),
        "read-only": read_only,
        "discard": "unmap",
    }
    disk = {
        "driver": format,
        "node-name": "disk",
        "file": "file",
        "read-only": read_only,
        "discard": "unmap",
    }
    export = {
        "type": "vhost-user-blk",
        "id": "disk",
        "node-name": "disk",
        "addr": {"type": "fd", "str": str(LISTENER)},
        "writable": not read_only,
        "num-queues": queues,
    }
    return [
        os.fspath(program),
        *("--blockdev", json.dumps(file)),
        *("--blockdev", json.dumps(disk)),
        *("--export", json.dumps(export)),
    ]


def _kind(image: Path, read_only: bool) -> str:
    """Return QEMU's driver of the file itself; check what qemu-storage-daemon says less clearly."""
    try:
        mode = image.stat().st_mode
        os.close(os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ImageError(f"cannot open {image} ({reason})", "name another image") from error
    if stat.S_ISBLK(mode):
        return "host_device"
    if stat.S_ISREG(mode):
        return "file"
    raise ImageError(f"{image} is no file and no block device", "name another image")
