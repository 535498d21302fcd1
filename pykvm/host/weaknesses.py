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

_CACHE: Final = "a guest may read what an object left in the first-level cache"
_BUFFERS: Final = "a guest may read what an object left in the processor's buffers"
_RETURNS: Final = "a guest may train where an object's returns lead in speculation"
_VECTORS: Final = "a guest may read what an object left in vector registers"

# What each lets a guest do, by the kernel's name, and the name that the KVM patch has for all of
# its kind; empty where contexts need no answer of their own.
_KNOWN: Final[Mapping[str, tuple[str, str]]] = {
    "l1tf": (_CACHE, "l1tf"),
    "mds": (_BUFFERS, "buffers"),
    "mmio_stale_data": (_BUFFERS, "buffers"),
    "reg_file_data_sampling": ("a guest may read what an object left in registers", "buffers"),
    "retbleed": (_RETURNS, "returns"),
    "indirect_target_selection": (_RETURNS, "returns"),
    "tsx_async_abort": (_BUFFERS, ""),
    "gather_data_sampling": (_VECTORS, ""),
}


@dataclass(frozen=True)
class Weakness:
    """A weakness of this processor.

    Attributes:
        name: the kernel's name for it.
        risk: what it lets a guest do to an object.
        kernel: what the kernel says that it does about it.
        kind: the KVM patch's name for its kind (`pykvm.kernel.weaknesses`), or empty where nothing
            depends on it.
    """

    name: str
    risk: str
    kernel: str
    kind: str

    @property
    def siblings(self) -> bool:
        """True if the kernel says that another thread of the core can use it at once."""
        return bool(self.kind) and "SMT vulnerable" in self.kernel

    @property
    def lacks_microcode(self) -> bool:
        """True if the processor lacks the microcode with which the kernel would answer."""
        return "no microcode" in self.kernel.lower()


def read_weaknesses(directory: Path = DIRECTORY) -> list[Weakness] | None:
    """Return what this processor has of the weaknesses that matter for contexts.

    None if the kernel does not tell. A weakness that this kernel does not know is not reported.
    """
    if not directory.is_dir():
        return None
    found = []
    for name, (risk, kind) in _KNOWN.items():
        file = directory / name
        kernel = file.read_text().strip() if file.is_file() else "Not affected"
        if not kernel.startswith("Not affected"):
            found.append(Weakness(name, risk, kernel, kind))
    return found
