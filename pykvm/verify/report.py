"""Verification of all pages of the crossing, and its report."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.elisa import crossing
from pykvm.elisa.object_code import VMFUNC, find_vmfunc
from pykvm.elisa.protections import NOTHING_EXTRA, Protection
from pykvm.elisa.trusted_images import build_object, crossing_images
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.verify.crosscheck import Comparison, check_gate, check_sub
from pykvm.verify.explore import Finding, Symptom
from pykvm.verify.gate import GateProof, prove_gate
from pykvm.verify.roots import check_roots
from pykvm.verify.sub import prove_sub

__all__ = ["Section", "check_bytes", "check_prefixes", "class_table", "verify"]

# Invalid in 64-bit mode, or prefixes whose payload bits newer extensions take (SDM vol. 2A 2.3;
# Intel, Advanced Performance Extensions, Architecture Specification, 3.1).
_PREFIXES: Final = {
    0x62: "EVEX, which APX extends",
    0x8F: "XOP",
    0xC4: "VEX",
    0xC5: "VEX",
    0xD5: "REX2 of APX",
}

_OBJECTS = ("nop.c", "counter.c")
_EXTRA = (NOTHING_EXTRA, frozenset({Protection.BUFFER_CLEARING}))


@dataclass(frozen=True)
class Section:
    """One claim of the report.

    Attributes:
        claim: what is claimed.
        covered: what was covered to show it, line by line.
        findings: what falls short, line by line.
        holds: whether the claim was shown.
    """

    claim: str
    covered: Sequence[str]
    findings: Sequence[str]
    holds: bool

    def __str__(self) -> str:
        lines = [f"{'ok  ' if self.holds else 'FAIL'}  {self.claim}"]
        lines += [f"      {line}" for line in self.covered]
        lines += [f"      -> {finding}" for finding in self.findings[:20]]
        if len(self.findings) > 20:
            lines.append(f"      -> and {len(self.findings) - 20} more")
        return "\n".join(lines)


def check_bytes(parts: Iterable[tuple[int, bytes]], official: Sequence[int]) -> list[Finding]:
    """Find the bytes of VMFUNC that are not at an official offset, or missing at one.

    Args:
        parts: offsets from the crossing base, each with the code there.
        official: offsets at which the bytes have to be.
    """
    wrong = sorted(set(find_vmfunc(parts)) ^ set(official))
    return [Finding(Symptom.BYTES, at, f"offset {at:#x}") for at in wrong]


def check_prefixes(page: bytes) -> list[Finding]:
    """Find the bytes of the gate page that a newer processor may read as prefixes.

    A guest enters at any byte, so none of them may be there, not even within an instruction: what
    follows would be decoded otherwise than here.
    """
    return [
        Finding(Symptom.PREFIX, crossing.GATE_OFFSET + at, f"{byte:#x}: {_PREFIXES[byte]}")
        for at, byte in enumerate(page)
        if byte in _PREFIXES
    ]


def class_table(proof: GateProof) -> list[str]:
    """Return lines that tell how many entry offsets share each set of ends, most first."""
    classes = proof.classes().most_common()
    return [f"{count:5}  {' | '.join(ends)}" for ends, count in classes]


def verify(seed: int, states: int) -> list[Section]:
    """Verify the pages as the toolchain builds them.

    Args:
        seed: seed of the random states.
        states: number of random states to run from each byte of the gate that holds code, for each
            crossing base.
    """
    page = crossing_images().gate_page
    return [_gate(page), _roots(page), *_subs(seed), _emulated(page, seed, states)]


def _gate(page: bytes) -> Section:
    started = time.monotonic()
    proof = prove_gate(page)
    last = crossing.GATE_OFFSET + PAGE_SIZE - len(VMFUNC)
    foreign = check_bytes([(crossing.GATE_OFFSET, page)], [last]) + check_prefixes(page)
    paths = sum(len(found) for found in proof.paths.values())
    covered = [
        f"{len(proof.paths)} entry offsets, {paths} paths, {proof.steps} instructions, "
        f"{proof.questions} questions to z3, {time.monotonic() - started:.0f} s",
        "entering at so many offsets can end in:",
        *class_table(proof),
        f"an honest call: {len(proof.official().state.trace)} instructions" if proof.holds else "",
    ]
    findings = [str(one) for one in (*proof.findings, *foreign)]
    claim = "I2: the gate page is safe to enter at any byte, with any registers"
    return Section(claim, [line for line in covered if line], findings, not findings)


def _roots(page: bytes) -> Section:
    proof = check_roots(page)
    covered = [f"{proof.walks} values of CR3, {proof.pages} pages of sub contexts"]
    return Section("I3: walks start at trusted tables or end", covered, proof.findings, proof.holds)


def _subs(seed: int) -> list[Section]:
    sections = []
    for user in (False, True):
        findings: list[str] = []
        steps = questions = calls = instructions = 0
        for name, extra in itertools.product(_OBJECTS, _EXTRA):
            source = Path(GUEST_SOURCES / "objects" / name)
            image = build_object([source], user=user, extra=extra)
            proof = prove_sub(image, user=user, clears=bool(extra))
            emulated = check_sub(image, user=user, seed=seed)
            official = crossing.SUB_ENTRY_OFFSET + PAGE_SIZE - len(VMFUNC)
            code = [(part.offset, part.data) for part in image.parts if part.executable]
            found = [*proof.findings, *check_bytes(code, [official]), *emulated.disagreements]
            findings += [f"{name}: {one}" for one in found]
            if not proof.holds and not found:
                findings.append(f"{name}: nothing was covered")
            steps += proof.steps
            questions += proof.questions
            calls += emulated.states
            instructions += emulated.instructions
        kind = "user" if user else "kernel"
        covered = [
            f"{len(_OBJECTS)} objects, without and with VERW, {steps} instructions, "
            f"{questions} questions to z3",
            f"emulated: {calls} calls, {instructions} instructions",
        ]
        claim = f"I1: sub entry page for callers in {kind} mode, start and return"
        sections.append(Section(claim, covered, findings, not findings))
    return sections


def _emulated(page: bytes, seed: int, states: int) -> Section:
    compared: Comparison = check_gate(page, prove_gate(page), seed=seed, states=states)
    ends = ", ".join(f"{end} {count}" for end, count in sorted(compared.ends.items()))
    covered = [
        f"{compared.states} states from seed {seed}, {compared.instructions} instructions",
        f"ends: {ends}",
    ]
    claim = "an independent emulator ends where the paths say"
    return Section(claim, covered, compared.disagreements, compared.holds)
