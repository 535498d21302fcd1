"""Weaknesses of the processor that decide whether there are contexts, and which of them count.

KVM answers them where it enters a guest, and a crossing enters none. The patch makes no context
while one is left that is neither answered by the contexts' own code nor accepted by the
administrator.

Source: KVM_CAP_ELISA_WEAKNESSES, kernel-patches/README.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final

from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.host.commands import as_root, program
from pykvm.host.weaknesses import Weakness
from pykvm.kernel.extension import check_extension
from pykvm.kernel.uapi import lib

__all__ = [
    "ALL",
    "ANSWERABLE",
    "NONE",
    "PARAMETER",
    "Answer",
    "UnknownWeaknessError",
    "Weak",
    "accepted",
    "answer_to",
    "names_of",
    "parse",
    "present",
    "unaccepted",
]

PARAMETER: Final = Path("/sys/module/kvm_intel/parameters/elisa_accept")
"""Parameter with the accepted weaknesses: names with commas in between, or ``all``."""


class Weak(IntFlag):
    """Weaknesses, by the patch's bits; the lower-case names are those of its parameter."""

    L1TF = lib.KVM_ELISA_L1TF
    """A guest can read the first-level cache. A crossing has no answer to it."""
    BUFFERS = lib.KVM_ELISA_BUFFERS
    """A guest can read buffers of the processor (MDS, MMIO stale data, RFDS). VERW before each
    return clears them: `pykvm.elisa.protections.Protection.BUFFER_CLEARING`."""
    RETURNS = lib.KVM_ELISA_RETURNS
    """A guest can train where returns lead (retbleed, ITS, RRSBA). Return thunks answer it:
    `pykvm.elisa.protections.Protection.RETURN_THUNKS`."""
    MICROCODE = lib.KVM_ELISA_MICROCODE
    """Buffers leak, and with this microcode VERW does not clear them."""
    SIBLINGS = lib.KVM_ELISA_SIBLINGS
    """Cache or buffers leak, and another thread of the core, which runs at once, shares them."""


NONE: Final = Weak(0)
ALL: Final = Weak(sum(Weak))
ANSWERABLE: Final = Weak.BUFFERS | Weak.RETURNS
"""Those that the code of contexts can answer itself."""


class UnknownWeaknessError(PykvmError):
    """A name that is no weakness's."""


def present() -> Weak:
    """Return what this processor has; nothing without the patch."""
    return Weak(check_extension(lib.KVM_CAP_ELISA_WEAKNESSES)) & ALL


def accepted() -> Weak:
    """Return what the administrator accepts; nothing without the patch."""
    try:
        text = PARAMETER.read_text()
    except OSError:
        return NONE
    return parse(text)


def unaccepted() -> Weak:
    """Return what this processor has and the administrator does not accept."""
    left = present() & ~accepted()
    # Who accepts that buffers leak does not ask what would clear them.
    return left & ~Weak.MICROCODE if Weak.BUFFERS in accepted() else left


def names_of(weaknesses: Weak) -> list[str]:
    """Return the names of weaknesses, as the patch's parameter has them."""
    return [one.name.lower() for one in Weak if one in weaknesses and one.name]


def parse(text: str) -> Weak:
    """Return the weaknesses of a list of names with commas in between, ``all`` among them.

    Raises:
        UnknownWeaknessError: there is no such weakness.
    """
    found = NONE
    for name in _names(text):
        if name == "all":
            found |= ALL
        elif name in names_of(ALL):
            found |= Weak[name.upper()]
        else:
            raise UnknownWeaknessError(
                f"no weakness is called {name!r}", f"use {', '.join(names_of(ALL))}, or all"
            )
    return found


def _names(text: str) -> Iterable[str]:
    return filter(None, (name.strip() for name in text.split(",")))


# What contexts do about a weakness, and what it costs, by kind; by name where there is no kind.
_ANSWERS: Final = {
    "buffers": "VERW before each return of an object, 1 instruction a call",
    "returns": "return thunks in objects, 2 instructions a return",
    "tsx_async_abort": "guests with contexts have no transactions",
    "gather_data_sampling": "the microcode's, for contexts too",
}


@dataclass(frozen=True)
class Answer:
    """Answer of contexts to a weakness of this processor.

    Attributes:
        text: what is done, and what it costs.
        holds: whether it isolates objects from guests.
        next_step: what to do where it does not.
    """

    text: str
    holds: bool
    next_step: str = ""


def answer_to(weakness: Weakness) -> Answer:
    """Return what contexts do about a weakness that the kernel reports."""
    kind = parse(weakness.kind)
    if kind and kind in accepted():
        trusted = "attach objects with secrets to guests that you trust only"
        return Answer("none, because it is accepted", False, f"{trusted}: {weakness.risk}")
    text = _ANSWERS.get(weakness.kind or weakness.name, "none without a VM exit")
    buffers = kind == Weak.BUFFERS
    if (weakness.lacks_microcode and kind != Weak.RETURNS) or (
        buffers and Weak.MICROCODE in present()
    ):
        update = install(["intel-microcode"], "update the processor's microcode")
        return Answer("none without newer microcode", False, f"{update}; then reboot")
    if kind == Weak.L1TF:
        return Answer(text, False, f"{weakness.risk}; where that does no harm, {_accept(kind)}")
    seen = weakness.siblings or Weak.SIBLINGS in present()
    if buffers and seen and Weak.SIBLINGS not in accepted():
        off = as_root("tee /sys/devices/system/cpu/smt/control")
        where = f"where another thread may look on, {_accept(Weak.SIBLINGS)}"
        return Answer(f"{text}, not between threads", False, f"echo off | {off}; or {where}")
    return Answer(text, True)


def _accept(weak: Weak) -> str:
    names = ",".join(names_of(accepted() | weak))
    return as_root(f"{program()} kernel load --accept {names}")
