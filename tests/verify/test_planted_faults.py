"""Faults planted into the built pages: the verifier finds each, and names its kind.

Faults are planted into bytes, at instructions that the verifier itself found on the honest path, so
that no change of the sources can make one ineffective.
"""

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.object_code import VMFUNC
from pykvm.elisa.protections import ALL, NOTHING_EXTRA, Extra, Protection, Without
from pykvm.elisa.trusted_images import ImagePart, SubImage, build_object, crossing_images
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.verify.decode import Page
from pykvm.verify.explore import Finding, Symptom
from pykvm.verify.gate import prove_gate
from pykvm.verify.report import check_bytes, check_prefixes
from pykvm.verify.sub import prove_sub

pytestmark = pytest.mark.unit

GATE = crossing.GATE_OFFSET
NOP = b"\x90"


class Planter:
    """The gate page, and its instructions by the beginning of their text."""

    def __init__(self, page: bytes) -> None:
        self.page = page
        code = Page(GATE, page)
        self.honest = [code.at(offset) for offset in prove_gate(page).official().state.trace]
        store = next(at for at, one in enumerate(self.honest) if one.text.startswith("mov %r8"))
        self.load_data, self.store, self.load_slot, self.compare, self.branch = self.honest[
            store - 1 : store + 4
        ]
        assert self.compare.text.startswith("cmp")
        assert self.branch.text.startswith("jne")

    def put(self, offset: int, code: bytes) -> bytes:
        """Return the page with other bytes at an offset from the crossing base."""
        at = offset - GATE
        changed = self.page[:at] + code + self.page[at + len(code) :]
        assert len(changed) == PAGE_SIZE
        assert changed != self.page
        return changed

    def without(self, begins: str) -> bytes:
        """Return the page with NOPs in place of an instruction of the honest path."""
        (one,) = [one for one in self.honest if one.text.startswith(begins)]
        return self.put(one.offset, NOP * one.length)

    @property
    def mismatch(self) -> int:
        """Address to which a refused EPTP leads."""
        return self.branch.end + int.from_bytes(
            self.page[self.branch.end - 1 - GATE : self.branch.end - GATE], "little", signed=True
        )


@pytest.fixture(scope="module")
def gate() -> Planter:
    return Planter(crossing_images().gate_page)


def symptoms(findings: list[Finding]) -> set[Symptom]:
    return {finding.symptom for finding in findings}


def gate_symptoms(page: bytes) -> set[Symptom]:
    proof = prove_gate(page)
    assert not proof.holds
    return symptoms(proof.findings)


def test_the_built_gate_holds(gate: Planter) -> None:
    proof = prove_gate(gate.page)
    assert proof.findings == []
    assert len(proof.paths) == PAGE_SIZE
    assert len(proof.official().state.trace) == len(gate.honest)


def test_the_comparison_removed(gate: Planter) -> None:
    assert Symptom.FORGED in gate_symptoms(gate.without("cmp"))


def test_the_branch_removed(gate: Planter) -> None:
    assert Symptom.FORGED in gate_symptoms(gate.without("jne"))


def test_the_branch_reversed(gate: Planter) -> None:
    assert Symptom.FORGED in gate_symptoms(gate.put(gate.branch.offset, b"\x74"))


def test_a_build_without_the_check() -> None:
    page = crossing_images(frozenset({Protection.GATE_CHECK})).gate_page
    assert Symptom.FORGED in gate_symptoms(page)


@pytest.mark.parametrize("slot", [0, 2])
def test_the_wrong_slot_compared(gate: Planter, slot: int) -> None:
    """The comparison loads another slot: a guest's value in slot 1 passes."""
    wanted = crossing.GATE_LIST_OFFSET + 8 * slot - gate.load_slot.end
    code = gate.page[gate.load_slot.offset - GATE :][:3] + wanted.to_bytes(4, "little", signed=True)
    assert Symptom.FORGED in gate_symptoms(gate.put(gate.load_slot.offset, code))


def test_the_data_page_compared_with_itself(gate: Planter) -> None:
    wanted = crossing.GATE_DATA_OFFSET - gate.load_slot.end
    code = gate.page[gate.load_slot.offset - GATE :][:3] + wanted.to_bytes(4, "little", signed=True)
    assert Symptom.FORGED in gate_symptoms(gate.put(gate.load_slot.offset, code))


@pytest.mark.parametrize("kind", ["displacement", "padding"])
@pytest.mark.parametrize(
    ("gadget", "symptom"),
    [
        (b"\x00\x00", Symptom.STRAY),  # add %al,(%rax): zero bytes, as in a short displacement
        (b"\x48\x89\x07", Symptom.STRAY),  # mov %rax,(%rdi)
        (b"\x50", Symptom.STRAY),  # push %rax: RSP may point to the list
        (b"\xaa", Symptom.STRAY),  # stos
        (b"\xf3\xa4", Symptom.STRAY),  # rep movs
        (b"\xff\xd0", Symptom.STRAY),  # call *%rax
        (b"\x0f\x22\xd8", Symptom.UNKNOWN),  # mov %rax,%cr3
        (b"\x0f\x30", Symptom.UNKNOWN),  # wrmsr
        (b"\x0f\x01\x18", Symptom.UNKNOWN),  # lidt (%rax)
        (b"\xcb", Symptom.UNKNOWN),  # lret
        (b"\x48\xcf", Symptom.UNKNOWN),  # iretq
        (b"\x0f\x05", Symptom.UNKNOWN),  # syscall
        (b"\xee", Symptom.UNKNOWN),  # out %al,(%dx)
        (b"\x65\x88\x00", Symptom.STRAY),  # mov %al,%gs:(%rax)
    ],
)
def test_a_gadget(gate: Planter, kind: str, gadget: bytes, symptom: Symptom) -> None:
    """The gadget is in an immediate of the honest path, without effect there, or in the padding."""
    if kind == "padding":
        page = gate.put(GATE + 0x400, gadget)
    else:
        (constant,) = [one for one in gate.honest if one.text.startswith("add")]
        page = gate.put(constant.end - 2, (gadget * 2)[: max(2, len(gadget))])
    assert symptom in gate_symptoms(page)


def test_a_load_that_tells_a_guest_of_the_list(gate: Planter) -> None:
    """fcomps (%rdi), then back to the honest path: host addresses in the x87 status."""
    page = gate.put(GATE + 0x400, b"\xd8\x1f\x41\xff\xe0")
    assert gate_symptoms(page) == {Symptom.LEAK}


def test_a_load_into_a_register_that_a_guest_keeps(gate: Planter) -> None:
    page = gate.put(GATE + 0x400, b"\x48\x8b\x1f\x41\xff\xe0")  # mov (%rdi),%rbx; jmp *%r8
    assert gate_symptoms(page) == {Symptom.LEAK}


def test_a_mismatch_that_leaves_the_slot(gate: Planter) -> None:
    page = gate.put(gate.mismatch, b"\xcc" * 8)
    assert gate_symptoms(page) == {Symptom.FILLED}


def test_a_mismatch_that_jumps_on(gate: Planter) -> None:
    page = gate.put(gate.mismatch, b"\x41\xff\xe0")
    assert Symptom.REENTERED in gate_symptoms(page)


def test_an_extra_vmfunc(gate: Planter) -> None:
    page = gate.put(GATE + 0x400, VMFUNC)
    last = GATE + PAGE_SIZE - len(VMFUNC)
    assert check_bytes([(GATE, gate.page)], [last]) == []
    assert symptoms(check_bytes([(GATE, page)], [last])) == {Symptom.BYTES}


@pytest.mark.attack("T35")
def test_a_prefix_of_processors_to_come(gate: Planter) -> None:
    assert check_prefixes(gate.page) == []
    for byte in (0x62, 0x8F, 0xC4, 0xC5, 0xD5):
        page = gate.put(GATE + 0x403, bytes([byte]))
        (found,) = check_prefixes(page)
        assert (found.symptom, found.entry) == (Symptom.PREFIX, GATE + 0x403)


def test_an_extra_vmfunc_behind_the_store(gate: Planter) -> None:
    """The check is skipped, and the sub context is entered elsewhere."""
    code = VMFUNC + NOP * (gate.load_slot.length - len(VMFUNC))
    found = gate_symptoms(gate.put(gate.load_slot.offset, code))
    assert {Symptom.FORGED, Symptom.ELSEWHERE} <= found


def test_a_page_that_does_not_end_in_vmfunc(gate: Planter) -> None:
    end = GATE + PAGE_SIZE
    found = gate_symptoms(gate.put(end - 4, VMFUNC + b"\xcc"))
    assert Symptom.ELSEWHERE in found


def test_cld_removed(gate: Planter) -> None:
    assert Symptom.ENVIRONMENT in gate_symptoms(gate.without("cld"))


def test_the_barrier_is_told_apart_from_the_check(gate: Planter) -> None:
    """The fence belongs to T23, not to I2, which is about the effects of instructions."""
    assert gate_symptoms(gate.without("lfence")) == {Symptom.FENCE}


# ---- the sub entry page ----


CLEARS = frozenset({Protection.BUFFER_CLEARING})


def image(user: bool, without: Without = ALL, extra: Extra = NOTHING_EXTRA) -> SubImage:
    source = GUEST_SOURCES / "objects" / "nop.c"
    return build_object([source], user=user, without=without, extra=extra)


def with_page(built: SubImage, change: bytes, at: int) -> SubImage:
    """Return the image with other bytes at an offset of its sub entry page."""
    parts = []
    for part in built.parts:
        data = part.data
        if part.offset == crossing.SUB_ENTRY_OFFSET:
            data = data[:at] + change + data[at + len(change) :]
            assert data != part.data
            assert len(data) == len(part.data)
        parts.append(ImagePart(part.offset, data, part.writable, part.executable))
    return SubImage(tuple(parts), built.symbols)


def sub_symptoms(built: SubImage, user: bool) -> set[Symptom]:
    proof = prove_sub(built, user=user)
    assert not proof.holds
    return symptoms(proof.findings)


@pytest.mark.parametrize("user", [False, True])
def test_the_built_sub_entry_page_holds(user: bool) -> None:
    proof = prove_sub(image(user), user=user)
    assert proof.findings == []
    assert proof.holds


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize(
    ("protection", "symptom"),
    [
        (Protection.SLOT_CLEARING, Symptom.OPEN),
        (Protection.REGISTER_CLEARING, Symptom.LEAK),
    ],
)
def test_a_protection_left_out(user: bool, protection: Protection, symptom: Symptom) -> None:
    assert symptom in sub_symptoms(image(user, frozenset({protection})), user)


def test_flags_of_the_guest() -> None:
    for user, protection in ((False, Protection.WINDOW_ACCESS), (True, Protection.FLAG_CLEARING)):
        found = sub_symptoms(image(user, frozenset({protection})), user)
        assert found == {Symptom.ENVIRONMENT}


def test_something_before_the_slot_is_cleared() -> None:
    """The first two instructions are swapped: one stores RSP, the other clears the slot."""
    built = image(False)
    page = next(p.data for p in built.parts if p.offset == crossing.SUB_ENTRY_OFFSET)
    code = Page(crossing.SUB_ENTRY_OFFSET, page)
    first = code.at(crossing.SUB_ENTRY_OFFSET)
    second = code.at(first.end)
    moved = bytearray()
    for one, other in ((second, first), (first, second)):
        start = one.offset - crossing.SUB_ENTRY_OFFSET
        raw = bytearray(page[start : start + one.length])
        # RIP-relative operands keep their targets: the displacement moves with the instruction.
        at = one.length - (8 if one is first else 4)
        distance = other.length * (1 if one is second else -1)
        old = int.from_bytes(raw[at : at + 4], "little", signed=True)
        raw[at : at + 4] = (old + distance).to_bytes(4, "little", signed=True)
        moved += raw
    assert sub_symptoms(with_page(built, bytes(moved), 0), False) == {Symptom.LATE}


@pytest.mark.parametrize("user", [False, True])
def test_each_register_left_on_the_return(user: bool) -> None:
    """Every instruction between the call and the VMFUNC is needed."""
    built = image(user)
    page = next(p.data for p in built.parts if p.offset == crossing.SUB_ENTRY_OFFSET)
    code = Page(crossing.SUB_ENTRY_OFFSET, page)
    (back,) = prove_sub(built, user=user).returns
    tried = 0
    for offset in back.state.trace[:-1]:
        one = code.at(offset)
        if one.text.startswith("mov %rax"):
            continue  # without it only the result is lost
        changed = with_page(built, NOP * one.length, offset - crossing.SUB_ENTRY_OFFSET)
        assert sub_symptoms(changed, user), one.text
        tried += 1
    assert tried >= 9


@pytest.mark.attack("T38")
@pytest.mark.parametrize("user", [False, True])
def test_buffers_that_are_not_cleared(user: bool) -> None:
    """VERW is left out, comes before an access to memory, or takes a selector of the guest's."""
    assert not prove_sub(image(user), user=user, clears=True).holds
    built = image(user, extra=CLEARS)
    assert prove_sub(built, user=user, clears=True).holds

    page = next(p.data for p in built.parts if p.offset == crossing.SUB_ENTRY_OFFSET)
    at = page.index(b"\x0f\x00\x2d")
    length = 7
    left_out = with_page(built, NOP * length, at)
    other_memory = page[at : at + 3] + (crossing.ENV_OFFSET - crossing.SUB_ENTRY_OFFSET).to_bytes(
        4, "little"
    )
    elsewhere = with_page(built, other_memory, at)
    null = at + length + int.from_bytes(page[at + 3 : at + length], "little", signed=True)
    selector = with_page(built, b"\x08", null)
    # `mov (%rsp), %edx` in place of `mov %rax, %rdx`.
    late = with_page(built, b"\x8b\x14\x24", at + length)
    for wrong in (left_out, elsewhere, selector, late):
        proof = prove_sub(wrong, user=user, clears=True)
        assert Symptom.LEAK in symptoms(proof.findings)
