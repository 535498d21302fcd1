"""What a Linux machine is made of, as its user has written it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pykvm.errors import PykvmError
from pykvm.machine.linux import layout
from pykvm.machine.linux.config_values import from_values, to_values
from pykvm.sizes import MIB, PAGE_SIZE

__all__ = ["MachineConfig", "MachineConfigError", "Share"]


@dataclass(frozen=True)
class Share:
    """A directory of the host that the guest can mount (``mount -t virtiofs TAG /mnt``).

    Attributes:
        tag: its name for the guest.
        directory: the directory.
        read_only: whether the guest cannot change it.
    """

    tag: str
    directory: Path
    read_only: bool = True

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Return what ``TAG=DIRECTORY`` or ``TAG=DIRECTORY,rw`` describes.

        Raises:
            MachineConfigError: it describes none.
        """
        tag, equals, rest = text.partition("=")
        directory, comma, mode = rest.rpartition(",")
        if mode not in ("ro", "rw") or not comma:
            directory, mode = rest, "ro"
        if not (tag and equals and directory):
            raise MachineConfigError(
                f"{text!r} is no shared directory", "write --share TAG=DIRECTORY, or ...,rw"
            )
        return cls(tag, Path(directory), mode == "ro")


@dataclass(frozen=True)
class MachineConfig:
    """What a machine is made of.

    Attributes:
        kernel: a bzImage (vmlinuz), or an ELF kernel with PVH (vmlinux).
        unpack: whether a bzImage is unpacked by the host, once, instead of by itself at each boot.
        command_line: the kernel's command line.
        initrds: initial RAM disks, which the kernel finds one behind the other.
        memory: bytes of RAM.
        cpus: number of processors.
        shares: directories of the host that it can mount.
    """

    kernel: Path
    unpack: bool = True
    command_line: str = ""
    initrds: tuple[Path, ...] = ()
    memory: int = 512 * MIB
    cpus: int = 1
    shares: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= layout.MAX_CPUS:
            raise MachineConfigError(
                f"{self.cpus} processors", f"use 1 to {layout.MAX_CPUS} (--cpus)"
            )
        if self.memory < layout.MIN_MEMORY or self.memory % PAGE_SIZE:
            raise MachineConfigError(
                f"{self.memory} bytes of memory",
                f"use {layout.MIN_MEMORY >> 20} MiB or more, in whole pages (--memory)",
            )

    def to_values(self) -> dict[str, Any]:
        """Return the configuration as values for JSON."""
        values: dict[str, Any] = to_values(self)
        return values

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """Return the configuration that JSON describes.

        Raises:
            MachineConfigError: it describes none.
        """
        try:
            return from_values(cls, values)
        except MachineConfigError:
            raise
        except ValueError as error:
            raise MachineConfigError(
                f"the saved configuration is of another kind of machine ({error})",
                "use another snapshot",
            ) from error

    def described(self) -> str:
        """Return what the machine is made of, a line for each part."""
        how = "unpacked here, PVH" if self.unpack else "as it is"
        lines = [f"kernel    {self.kernel} ({how})"]
        lines += [f"initrd    {initrd}" for initrd in self.initrds]
        lines += [f"append    {self.command_line}"]
        lines += [f"cpus      {self.cpus}", f"memory    {self.memory >> 20} MiB"]
        for share in self.shares:
            how = "read-only" if share.read_only else "writable"
            lines.append(f"share     {share.tag}: {share.directory} ({how})")
        return "\n".join(lines)


class MachineConfigError(PykvmError, ValueError):
    """A machine that cannot be."""
