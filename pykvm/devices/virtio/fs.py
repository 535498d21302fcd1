"""A directory of the host as a virtio file system, served by a virtiofsd of ours.

There are two programs of this name: the one in C that came with QEMU until 7.2 (Debian 12), and its
successor in Rust (Debian 13). A guest mounts the device by its tag::

    mount -t virtiofs TAG /mnt

Source: VIRTIO 1.2, 5.11; the programs' --help.
"""

from __future__ import annotations

import os
import resource
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pykvm.devices.virtio.backend_process import LISTENER, BackendMissingError, BackendProcess
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.vhost_user import VhostUserDevice
from pykvm.devices.virtio.vhost_user_connection import REPLY_SECONDS
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["ShareError", "VirtioFs", "Virtiofsd", "find_virtiofsd"]

Cache = Literal["auto", "always", "never"]

_LONGEST_TAG: Final = 36
_QUEUE_SIZE: Final = 1024
_CONFIG: Final = struct.Struct("<36sI")
_MOST_FILES: Final = 1_000_000

_C: Final = Path("/usr/lib/qemu/virtiofsd")
_RUST: Final = Path("/usr/libexec/virtiofsd")


class ShareError(PykvmError, ValueError):
    """A directory or a tag that cannot be shared."""


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """A virtiofsd that is installed.

    Attributes:
        path: its file.
        rust: whether it is the one in Rust.
    """

    path: Path
    rust: bool

    def command(self, root: Path, *, read_only: bool, cache: Cache, sandbox: bool) -> list[str]:
        """Return how to start it.

        Args:
            root: what it shares.
            read_only: whether it is told to write nothing. The one in C has no such option.
            cache: how long the guest may believe what it has read: "auto" is a second.
            sandbox: whether it can change its root directory.
        """
        # Each file that a guest has looked up is an open one.
        files = min(_MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        command = [os.fspath(self.path), f"--fd={LISTENER}", f"--rlimit-nofile={files}"]
        if not self.rust:
            cached = "none" if cache == "never" else cache
            # Its options are separated by commas.
            source = os.fspath(root).replace("\\", "\\\\").replace(",", "\\,")
            options = (f"source={source}", "sandbox=chroot", f"cache={cached}", "log_level=err")
            return [*command, "-f", *(f"-o{one}" for one in options)]
        command += [f"--shared-dir={root}", f"--cache={cache}", "--log-level=error"]
        # Overlayfs takes no lower directory with mounts that the guest is told of.
        command += ["--no-announce-submounts", f"--sandbox={'chroot' if sandbox else 'none'}"]
        return [*command, "--readonly"] if read_only else command


def find_virtiofsd() -> Virtiofsd:
    """Return the virtiofsd to use: the one in Rust where both are installed.

    Raises:
        BackendMissingError: none is.
    """
    if _RUST.exists():
        return Virtiofsd(_RUST, True)
    if _C.exists():
        return Virtiofsd(_C, False)
    if found := shutil.which("virtiofsd"):
        return Virtiofsd(Path(found), True)
    raise BackendMissingError("virtiofsd", "virtiofsd", older="qemu-system-common")


class VirtioFs(VhostUserDevice):
    """A directory of the host.

    What an ordinary user's guest sees of the owners of files differs: the virtiofsd in C runs as
    root of a user namespace, where other users' files belong to nobody (65534). The one in Rust
    shows them as they are, without a sandbox: the guest can then reach what this user can, if it
    finds an error in virtiofsd.

    Args:
        tag: its name for the guest, 1 to 36 bytes.
        root: the directory.
        memory: the guest's.
        read_only: whether nothing can be written.
        cache: how long the guest may believe what it has read: "auto" is a second.
        program: the virtiofsd; by default the one that `find_virtiofsd` finds.
        timeout: seconds that each of its replies may take.

    Attributes:
        pid: process ID of its virtiofsd.

    Raises:
        ShareError: the tag or the directory cannot be used.
        BackendMissingError: no virtiofsd is installed.
        BackendError: it cannot serve.
    """

    def __init__(
        self,
        tag: str,
        root: Path,
        memory: GuestMemory,
        *,
        read_only: bool = True,
        cache: Cache = "auto",
        program: Virtiofsd | None = None,
        timeout: float = REPLY_SECONDS,
    ) -> None:
        encoded = tag.encode(errors="surrogateescape")
        if not 1 <= len(encoded) <= _LONGEST_TAG or b"\0" in encoded:
            raise ShareError(f"a tag of {len(encoded)} bytes", f"use 1 to {_LONGEST_TAG}")
        root = _directory(root)
        program = program or find_virtiofsd()
        is_root = os.geteuid() == 0
        process = BackendProcess(
            f"virtiofsd of {root}",
            program.command(root, read_only=read_only, cache=cache, sandbox=is_root),
            read_only=read_only and (is_root or not program.rust),
            user_namespace=not is_root and not program.rust,
            timeout=timeout,
        )
        self.pid = process.pid
        self._tag = encoded
        super().__init__(
            DeviceType.FS,
            process.connection,
            memory,
            queue_sizes=[_QUEUE_SIZE, _QUEUE_SIZE],  # hiprio, and one of requests
            process=process,
        )

    def config(self) -> bytes:
        """Return the tag and the number of request queues (5.11.4)."""
        return _CONFIG.pack(self._tag, len(self.queue_sizes) - 1)


def _directory(root: Path) -> Path:
    """Return the directory without links on its way, as a program in another root finds it."""
    try:
        found = root.resolve(strict=True)
        mode = found.stat().st_mode
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ShareError(f"cannot share {root} ({reason.lower()})", "name a directory") from error
    if not stat.S_ISDIR(mode):
        raise ShareError(f"cannot share {root}: it is no directory", "name a directory")
    return found
