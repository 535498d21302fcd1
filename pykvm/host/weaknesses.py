"""Weaknesses of the host's processor that matter between a guest and an object.

KVM answers most of them when it enters a guest: it flushes the first-level cache, or overwrites the
processor's buffers. A crossing enters no guest, so those answers are not in it, and the kernel's
word "Mitigation" says nothing about contexts. What needs an indirect branch in the victim
(spectre_v2) is not among them: objects have none (`pykvm.elisa.object_code`).

Source: Linux, Documentation/admin-guide/hw-vuln, and /sys/devices/system/cpu/vulnerabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["DIRECTORY", "Weakness", "read_weaknesses"]

DIRECTORY: Final = Path("/sys/devices/system/cpu/vulnerabilities")

_BUFFERS: Final = "a guest may read what an object left in the processor's buffers"
_RETURNS: Final = "a guest may train where an object's returns lead in speculation"

# What each lets a guest do, by the kernel's name, and whether its mitigation, which is then one of
# the processor's microcode, holds for contexts too.
_KNOWN: Final[Mapping[str, tuple[str, bool]]] = {
    "l1tf": ("a guest may read what an object left in the first-level cache", False),
    "mds": (_BUFFERS, False),
    "tsx_async_abort": (_BUFFERS, False),
    "mmio_stale_data": (_BUFFERS, False),
    "reg_file_data_sampling": ("a guest may read what an object left in registers", False),
    "gather_data_sampling": ("a guest may read what an object left in vector registers", True),
    "retbleed": (_RETURNS, False),
    "indirect_target_selection": (_RETURNS, False),
}


@dataclass(frozen=True)
class Weakness:
    """A weakness of this processor.

    Attributes:
        name: the kernel's name for it.
        risk: what it lets a guest do to an object.
        kernel: what the kernel says that it does about it.
        open: whether that leaves contexts without an answer.
    """

    name: str
    risk: str
    kernel: str
    open: bool


def read_weaknesses(directory: Path = DIRECTORY) -> list[Weakness] | None:
    """Return what this processor has of the weaknesses that matter for contexts.

    None if the kernel does not tell. A weakness that this kernel does not know is not reported.
    """
    if not directory.is_dir():
        return None
    found = []
    for name, (risk, microcode) in _KNOWN.items():
        file = directory / name
        kernel = file.read_text().strip() if file.is_file() else "Not affected"
        if not kernel.startswith("Not affected"):
            answered = microcode and kernel.startswith("Mitigation")
            found.append(Weakness(name, risk, kernel, not answered))
    return found
