"""Invariant I3 by enumeration: everything that the processor can reach in a context, for any CR3.

The enumeration also shows that a gate context maps exactly the regions of the gate page's model,
and that no entry of a context's guest page table is global. A global translation would survive a
change of CR3 (SDM vol. 3A 4.10.2.4). With PCIDs, other translations could survive it as well; KVM
ensures CR4.PCIDE = 0.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final

from pykvm.elisa import crossing
from pykvm.elisa.contexts import (
    READ,
    READ_EXECUTE,
    READ_WRITE,
    ContextPlan,
    UserPages,
    plan_gate,
    plan_sub,
)
from pykvm.paging.entries import Access
from pykvm.paging.reach import Reach, reachable_from
from pykvm.sizes import PAGE_SIZE
from pykvm.verify.gate import GATE_REGIONS

__all__ = ["BASES", "RootsProof", "check_roots"]

BASES: Final = (crossing.CROSSING_GVA, crossing.CROSSING_MIN_GVA, 0xFFFF_C900_0020_0000)
"""Crossing bases to try, with four and with five levels of paging."""

_CODE: Final = 0x7000_0000
_TABLES: Final = 0x70_0000_0000
_GLOBAL: Final = 1 << 8
_MEMORY: Final = 1200 * PAGE_SIZE  # more than one 2 MiB page, and a remainder
# EPTPs have bit 0 clear (a memory type of 0 or 6), so to paging they are not present.
_EPTP: Final = 0x1234_501E


@dataclass
class RootsProof:
    """Result of the enumeration.

    Attributes:
        findings: what falls short; empty if I3 holds.
        walks: number of values of CR3 that were tried.
        pages: number of GPAs of sub contexts that were looked up in the gate.
    """

    findings: list[str] = field(default_factory=list)
    walks: int = 0
    pages: int = 0

    @property
    def holds(self) -> bool:
        return self.walks > 0 and self.pages > 0 and not self.findings


def check_roots(gate_page: bytes) -> RootsProof:
    """Enumerate what is reachable, for each crossing base, number of levels and privilege."""
    proof = RootsProof()
    for base in BASES:
        for levels in (4, 5):
            for user in (False, True):
                _check(proof, gate_page, base, levels, user)
    return proof


def _check(proof: RootsProof, gate_page: bytes, base: int, levels: int, user: bool) -> None:
    name = f"base {base:#x}, {levels} levels, {'user' if user else 'kernel'} mode"
    gate = plan_gate(_CODE, base, user=user, levels=levels)
    words = _placed(gate, gate_page)
    sub = plan_sub(
        [
            (crossing.SUB_ENTRY_OFFSET, UserPages(0x1000), READ_EXECUTE),
            (crossing.IMAGE_OFFSET, UserPages(0x2000, 3), READ_EXECUTE),
        ],
        0x8000,
        0x9000,
        _MEMORY,
        base,
        user=user,
        levels=levels,
    )
    _placed(sub, b"")

    def reach(cr3: int) -> list[Reach]:
        proof.walks += 1
        return reachable_from(cr3, gate.ept, words.__getitem__, levels=levels)

    # Walks from outside the private range, and from the root itself, reach only the regions of
    # the model.
    root = crossing.GATE_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET
    modelled = sorted(
        ((base + one.offset) % (1 << 64), one.size, _access(one.writable, one.executable))
        for one in GATE_REGIONS
    )
    for cr3 in (0, 0x1000, crossing.PRIVATE_GPA_FIRST - PAGE_SIZE, crossing.PRIVATE_GPA_END, root):
        found = sorted((one.gva, one.size, one.access) for one in reach(cr3))
        if found != modelled:
            proof.findings.append(f"{name}: CR3 {cr3:#x} reaches {found}")
    # Walks that read one of the gate's own pages as a root reach no code.
    private = gate.ept.spans(
        crossing.PRIVATE_GPA_FIRST, crossing.PRIVATE_GPA_END - crossing.PRIVATE_GPA_FIRST
    )
    for span in private:
        for cr3 in range(span.start, span.end, PAGE_SIZE):
            code = [one for one in reach(cr3) if one.access & Access.EXECUTE]
            if cr3 != root and code:
                proof.findings.append(f"{name}: CR3 {cr3:#x} reaches code: {code[0]}")
    _check_absent(proof, name, gate, sub)
    for plan in (gate, sub):
        for number in range(len(plan.guest)):
            if any(word & _GLOBAL and word & 1 for word in plan.guest.table(number)):
                proof.findings.append(f"{name}: guest table {number} has a global entry")


def _check_absent(proof: RootsProof, name: str, gate: ContextPlan, sub: ContextPlan) -> None:
    """Check that the gate maps nothing that the sub context maps to anything but its root."""
    root = sub.ept.walk(0).page
    for span in sub.ept.spans():
        alone = span.repeats or span.size == PAGE_SIZE
        if root is not None and span.target == root * PAGE_SIZE and alone:
            continue
        proof.pages += span.size // PAGE_SIZE
        for mapped in gate.ept.spans(span.start, span.size):
            proof.findings.append(f"{name}: the gate maps GPA {mapped.start:#x} of the sub context")


def _access(writable: bool, executable: bool) -> Access:
    return READ_EXECUTE if executable else READ_WRITE if writable else READ


def _placed(plan: ContextPlan, code: bytes) -> dict[int, array[int]]:
    """Complete a plan with an EPTP list in which every slot except the transient one is filled.

    Returns:
        The 512 words of each page, by page number times 4096.
    """
    tables = memoryview(bytearray(plan.guest_table_bytes))
    plan.place_guest_tables(tables, _TABLES)
    eptps = array("Q", [_EPTP] * 512)
    eptps[1] = 0
    words: dict[int, array[int]] = {}
    number = 0
    for page in plan.pages:
        for at in range(0, page.count * PAGE_SIZE, PAGE_SIZE):
            words[number * PAGE_SIZE] = eptps
            if isinstance(page, UserPages) and page.address == _TABLES:
                words[number * PAGE_SIZE] = array("Q", bytes(tables[at : at + PAGE_SIZE]))
            elif isinstance(page, UserPages) and page.address == _CODE:
                words[number * PAGE_SIZE] = array("Q", code)
            number += 1
    return words
