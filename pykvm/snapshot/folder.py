"""The folder of a snapshot: it appears whole or not at all, and is checked when it is read.

===================  =========================================================================
``manifest.json``    format, configuration of the machine, states, disks, each file's length
``manifest.sha256``  its checksum, as ``sha256sum`` writes it
``memory``           the guest's memory (`pykvm.snapshot.memory`)
others               what devices keep as bytes
===================  =========================================================================

It holds whatever secrets the guest's memory holds, and is its owner's alone.

It is written under another name and renamed at the end. What a killed process leaves is removed
when a snapshot of the same name is next written. The memory is not read when the folder is opened,
so that its size does not matter then: its length is checked and its contents are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.snapshot.disks import SavedDisk

__all__ = [
    "CHECKSUM",
    "FORMAT",
    "KIND",
    "MANIFEST",
    "MEMORY",
    "Contents",
    "NotASnapshotError",
    "SnapshotDamagedError",
    "SnapshotExistsError",
    "SnapshotMissingError",
    "SnapshotVersionError",
    "SnapshotWriteError",
    "may_be_named",
]

FORMAT: Final = 1
"""Number of the format; another one is refused."""

KIND: Final = "pykvm snapshot"
MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "manifest.sha256"
MEMORY: Final = "memory"
_FILE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,100}")


class SnapshotMissingError(PykvmError):
    """No folder of that name, or one that may not be read."""


class NotASnapshotError(PykvmError):
    """A folder that holds something else."""


class SnapshotVersionError(PykvmError):
    """A snapshot of a format that this version does not know."""


class SnapshotDamagedError(PykvmError):
    """A snapshot of which something is missing, or has changed."""


class SnapshotExistsError(PykvmError):
    """A file or folder where a snapshot is to be."""


class SnapshotWriteError(PykvmError):
    """A snapshot that cannot be written: no space, no permission, no folder for it."""


@dataclass(frozen=True)
class Contents:
    """Contents of a snapshot beside its memory.

    Attributes:
        machine: the configuration, as values for JSON.
        kvm: what `pykvm.snapshot.kvm_state.save_kvm` returned.
        devices: the states of devices by name, as values for JSON.
        disks: the machine's disks.
        blobs: bytes, by names of small letters, digits, dots, dashes and underlines.
    """

    machine: Mapping[str, Any]
    kvm: Mapping[str, Any]
    devices: Mapping[str, Any]
    disks: Sequence[SavedDisk] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict)


def may_be_named(name: str) -> bool:
    """Return whether a blob may have a name."""
    return bool(_FILE_NAME.fullmatch(name)) and name not in (MANIFEST, CHECKSUM, MEMORY)
