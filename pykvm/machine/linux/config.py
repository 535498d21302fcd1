"""Configuration of a Linux machine, as its user has written it: on a command line or in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from pykvm.errors import PykvmError
from pykvm.machine.linux import layout
from pykvm.sizes import GIB, KIB, MIB, PAGE_SIZE

__all__ = ["Disk", "MachineConfig", "MachineConfigError", "Share", "parse_size"]

_UNITS: Final = {"K": KIB, "M": MIB, "G": GIB, "": MIB}


class MachineConfigError(PykvmError, ValueError):
    """A machine that cannot be."""


def parse_size(text: str) -> int:
    """Return the bytes that a text such as 512M or 2G means; M where there is no unit.

    Raises:
        MachineConfigError: it means none.
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise MachineConfigError(f"{text!r} is no size", "write a size like 512M or 2G") from None


@dataclass(frozen=True)
class Disk:
    """A file or block device that the guest has as a disk.

    Attributes:
        path: the file; raw, or of a format that QEMU knows (qcow2, ...).
        read_only: whether the guest cannot change it.
    """

    path: Path
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what ``FILE`` or ``FILE,ro`` describes.

        Raises:
            MachineConfigError: it describes none.
        """
        path, mode = _with_mode(text, "rw")
        if not path:
            raise MachineConfigError(f"{text!r} is no disk", "write --disk FILE, or FILE,ro")
        return cls(Path(path), mode == "ro")

    def __str__(self) -> str:
        return _and_mode(str(self.path), "ro" if self.read_only else "rw", "rw")


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
    def parse(cls, text: str) -> Self:
        """Return what ``TAG=DIRECTORY`` or ``TAG=DIRECTORY,rw`` describes.

        Raises:
            MachineConfigError: it describes none.
        """
        tag, equals, rest = text.partition("=")
        directory, mode = _with_mode(rest, "ro")
        if not (tag and equals and directory):
            raise MachineConfigError(
                f"{text!r} is no shared directory", "write --share TAG=DIRECTORY, or ...,rw"
            )
        return cls(tag, Path(directory), mode == "ro")

    def __str__(self) -> str:
        mode = "ro" if self.read_only else "rw"
        return f"{self.tag}={_and_mode(str(self.directory), mode, 'ro')}"


def _with_mode(text: str, default: str) -> tuple[str, str]:
    """Split ``,ro`` or ``,rw`` from the end of a path, which may have other commas."""
    path, comma, mode = text.rpartition(",")
    return (path, mode) if comma and mode in ("ro", "rw") else (text, default)


def _and_mode(path: str, mode: str, default: str) -> str:
    """Return what `_with_mode` splits."""
    return path if _with_mode(path, default) == (path, mode) else f"{path},{mode}"


@dataclass(frozen=True)
class MachineConfig:
    """Parts of a machine.

    Attributes:
        kernel: a bzImage (vmlinuz), or an ELF kernel with PVH (vmlinux).
        unpack: whether a bzImage is unpacked by the host, once, instead of by itself at each boot.
        command_line: the kernel's command line.
        initrds: initial RAM disks, which the kernel finds one behind the other.
        memory: bytes of RAM.
        cpus: number of processors.
        name: the machine's name, which decides its MAC addresses; empty for none.
        disks: its disks, ``/dev/vda`` and so on.
        networks: its network interfaces, each as `NetworkSpecification.parse` takes it.
        shares: directories of the host that it can mount.
    """

    kernel: Path
    unpack: bool = True
    command_line: str = ""
    initrds: tuple[Path, ...] = ()
    memory: int = 512 * MIB
    cpus: int = 1
    name: str = ""
    disks: tuple[Disk, ...] = ()
    networks: tuple[str, ...] = ()
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
        if self.networks:
            # What makes networks takes long to import, and most machines have none.
            from pykvm.network.specification import NetworkSpecification  # noqa: PLC0415

            for network in self.networks:
                NetworkSpecification.parse(network)

    def to_values(self) -> dict[str, Any]:
        """Return the configuration as values for JSON."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                values[field.name] = [str(part) for part in value]
            else:
                values[field.name] = str(value) if isinstance(value, Path) else value
        return values

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """Return the configuration that `to_values` gave.

        Raises:
            MachineConfigError: it is another's.
        """
        try:
            return cls(**{name: _READERS[name](value) for name, value in values.items()})
        except (AttributeError, KeyError, TypeError) as error:
            raise MachineConfigError(
                "the saved configuration is of another kind of machine", "use another snapshot"
            ) from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Return the configuration in a TOML file.

        The keys are the options of `pykvm run`: kernel, unpack, initrd, append, memory, cpus, name,
        disk, net and share. Those that may be given several times are lists, or one value. Relative
        paths start at the file's directory.

        Raises:
            MachineConfigError: it cannot be read, or has a key or value that means nothing.
        """
        try:
            found = tomllib.loads(path.read_text())
        except OSError as error:
            raise MachineConfigError(
                f"{path} cannot be read: {error.strerror}", "check its name"
            ) from error
        except ValueError as error:
            raise MachineConfigError(f"{path}: {error}", "write it as TOML") from error
        except RecursionError as error:
            raise MachineConfigError(
                f"{path}: lists within lists without end", "write it as TOML"
            ) from error
        values: dict[str, Any] = {}
        for key, given in found.items():
            if key not in _KEYS:
                raise MachineConfigError(
                    f"{path}: no key {key!r}", f"use {', '.join(sorted(_KEYS))}"
                )
            one_of_many = key in _LISTS and not isinstance(given, list)
            size = key == "memory" and isinstance(given, str)
            value = [given] if one_of_many else parse_size(given) if size else given
            try:
                values[_KEYS[key]] = _READERS[_KEYS[key]](value)
            except TypeError:
                raise MachineConfigError(
                    f"{path}: {key} has a value of another kind", "see: pykvm run --help"
                ) from None
        if "kernel" not in values:
            raise MachineConfigError(f"{path} names no kernel", 'write kernel = "vmlinuz"')
        return cls(**values)._relative_to(path.parent)

    def _relative_to(self, directory: Path) -> Self:
        return replace(
            self,
            kernel=directory / self.kernel,
            initrds=tuple(directory / initrd for initrd in self.initrds),
            disks=tuple(replace(disk, path=directory / disk.path) for disk in self.disks),
            shares=tuple(
                replace(share, directory=directory / share.directory) for share in self.shares
            ),
        )

    def described(self) -> str:
        """Return what the machine is made of, a line for each part."""
        how = "unpacked here, PVH" if self.unpack else "as it is"
        lines = [f"kernel    {self.kernel} ({how})"]
        lines += [f"initrd    {initrd}" for initrd in self.initrds]
        lines += [f"append    {self.command_line}"] if self.command_line else []
        lines += [f"cpus      {self.cpus}", f"memory    {self.memory >> 20} MiB"]
        for disk in self.disks:
            lines.append(f"disk      {disk.path} ({_how(disk.read_only)})")
        lines += [f"net       {network}" for network in self.networks]
        for share in self.shares:
            lines.append(f"share     {share.tag}: {share.directory} ({_how(share.read_only)})")
        return "\n".join(lines)


def _how(read_only: bool) -> str:
    return "read-only" if read_only else "writable"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    if "\0" in value:
        raise MachineConfigError(f"{value!r} has a zero byte", "leave it out")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _list(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [_text(part) for part in value]


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "kernel": lambda value: Path(_text(value)),
    "unpack": _switch,
    "command_line": _text,
    "initrds": lambda value: tuple(map(Path, _list(value))),
    "memory": _number,
    "cpus": _number,
    "name": _text,
    "disks": lambda value: tuple(map(Disk.parse, _list(value))),
    "networks": lambda value: tuple(_list(value)),
    "shares": lambda value: tuple(map(Share.parse, _list(value))),
}
_LISTS: Final = ("initrd", "disk", "net", "share")
_KEYS: Final = {
    "kernel": "kernel",
    "unpack": "unpack",
    "append": "command_line",
    "initrd": "initrds",
    "memory": "memory",
    "cpus": "cpus",
    "name": "name",
    "disk": "disks",
    "net": "networks",
    "share": "shares",
}
"""Keys of a file, and the attributes that they are."""
