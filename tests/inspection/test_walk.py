"""pykvm.inspection.walk: page walks as text, which agree with KVM's own translation."""

import pytest

from pykvm.inspection.address_space import AddressSpace, NoMemoryError
from pykvm.inspection.walk import WalkAddressError, describe_walk, parse_address
from pykvm.kvm import Kvm, Vcpu, Vm
from pykvm.memory.guest_memory import GuestMemory
from pykvm.paging.entries import Access, X86Entry
from pykvm.sizes import MIB
from tests.rigs.inspected.machine import HIGH, LEVEL1, LEVEL2, ROOT, InspectedMachine
from tests.rigs.messages import one_line

LAST = 0x200000 + (511 << 12)  # a page that is not mapped


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "address"),
    [("0x10", 16), ("16", 16), ("0xFFFFffff81000000", 0xFFFF_FFFF_8100_0000), ("0", 0)],
)
def test_addresses(text: str, address: int) -> None:
    assert parse_address(text) == address


@pytest.mark.unit
@pytest.mark.parametrize("text", ["", "x", "-1", "ffff", "0x1" + "0" * 16, "1.5", "0x"])
def test_text_that_is_no_address(text: str) -> None:
    with pytest.raises(WalkAddressError, match="is no address") as caught:
        parse_address(text)
    one_line(caught.value)


@pytest.fixture
def machine(kvm: Kvm) -> InspectedMachine:
    """A machine that does not run."""
    return InspectedMachine(kvm)


def walked(machine: InspectedMachine, address: int) -> list[str]:
    """Return the lines of a walk, which has to end where KVM's ends."""
    vcpu = machine.vcpus[0]
    lines = describe_walk(vcpu, machine.memory, address).splitlines()
    found = AddressSpace(vcpu, machine.memory).physical(address)
    if found is None:
        assert f"GVA {address:#x} -> nothing: " in lines[-1]
    else:
        assert lines[-1].startswith(f"GVA {address:#x} -> GPA {found:#x} [")
    if "not canonical" in lines[-1]:
        return lines  # KVM looks at the bits that the tables use, and at no others
    regs = vcpu.get_regs()
    regs.rflags |= (
        1 << 18
    )  # AC: KVM asks as the kernel does, which SMAP would keep from users' pages
    vcpu.set_regs(regs)
    by_kvm = vcpu.translate_gva(address)
    assert (by_kvm.physical if by_kvm else None) == found
    return lines


@pytest.mark.kvm
@pytest.mark.native
def test_a_walk_level_by_level(machine: InspectedMachine) -> None:
    assert walked(machine, HIGH + 0x200000 + 0x5123) == [
        "cr3 0x1000: 4 levels",
        "level 4 table 0x1000[0x100]: 0x2027 -> table 0x2000 [rwxu] accessed",
        "level 3 table 0x2000[0x0]: 0x3027 -> table 0x3000 [rwxu] accessed",
        "level 2 table 0x3000[0x1]: 0x4027 -> table 0x4000 [rwxu] accessed",
        "level 1 table 0x4000[0x5]: 0x5063 -> 0x5000 [rwxs 4K WB] accessed dirty",
        "GVA 0xffff800000205123 -> GPA 0x5123 [rwxs 4K WB]",
    ]
    assert walked(machine, 0x12345)[-1] == "GVA 0x12345 -> GPA 0x12345 [rwxs 2M WB]"


@pytest.mark.kvm
@pytest.mark.native
def test_walks_that_end_early(machine: InspectedMachine) -> None:
    assert walked(machine, LAST)[-2:] == [
        "level 1 table 0x4000[0x1ff]: 0x0 -> absent",
        f"GVA {LAST:#x} -> nothing: entry 0x1ff at level 1 is absent",
    ]
    assert "not canonical" in walked(machine, 1 << 47)[-1]
    machine.set_entry(LEVEL2, 2, 0x7000_0000 | 0x27)  # where there is no memory
    assert walked(machine, 0x400000)[-2:] == [
        "level 2 table 0x3000[0x2]: 0x70000027 -> table 0x70000000 [rwxu] accessed",
        "GVA 0x400000 -> nothing: no memory for the table at 0x70000000",
    ]
    machine.set_entry(ROOT, 1, 0x2000 | 0xA7)  # bit 7 is reserved there
    assert "-> invalid: bit 7 is reserved" in walked(machine, 1 << 39)[1]


@pytest.mark.kvm
@pytest.mark.native
def test_flags_and_the_guests_own_memory_types(machine: InspectedMachine) -> None:
    def last(entry: int) -> str:
        machine.set_entry(LEVEL1, 5, entry)
        return walked(machine, 0x205000)[-2].partition(" -> ")[2]

    assert last(0x5001) == "0x5000 [r-xs 4K WB]"
    assert last(0x5007 | 1 << 63) == "0x5000 [rw-u 4K WB]"
    assert last(0x5163) == "0x5000 [rwxs 4K WB] global accessed dirty"
    assert last(0x5063 | 9 << 59) == "0x5000 [rwxs 4K WB] accessed dirty key 9"
    assert last(0x5063 | 1 << 3) == "0x5000 [rwxs 4K WT] accessed dirty"
    assert last(0x5063 | 1 << 4) == "0x5000 [rwxs 4K UC-] accessed dirty"
    # As Linux sets it: WC for PWT, WP for PAT with PWT.
    machine.vcpus[0].set_msrs({0x277: 0x0407_0506_0007_0106})
    assert last(0x5063 | 1 << 3) == "0x5000 [rwxs 4K WC] accessed dirty"
    assert last(0x5063 | 1 << 7 | 1 << 3) == "0x5000 [rwxs 4K WP] accessed dirty"
    machine.set_entry(LEVEL2, 3, int(X86Entry.leaf(2, 0, Access.READ)) | 1 << 12 | 1 << 3)
    assert walked(machine, 0x600000)[-1].endswith("[r--s 2M WP]")


@pytest.mark.kvm
@pytest.mark.native
def test_without_paging(kvm: Kvm) -> None:
    with GuestMemory.create(1 * MIB) as memory, kvm.create_vm() as vm:
        vcpu = _vcpu(vm, memory)
        assert describe_walk(vcpu, memory, 0x1234) == "no paging\nGVA 0x1234 -> GPA 0x1234"


@pytest.mark.kvm
@pytest.mark.native
def test_32_bit_paging(kvm: Kvm) -> None:
    with GuestMemory.create(1 * MIB) as memory, kvm.create_vm() as vm:
        vcpu = _vcpu(vm, memory)
        memory.write(0x1000, (0x2000 | 7).to_bytes(4, "little"))
        memory.write(0x2000 + 4 * 3, (0x8000 | 7).to_bytes(4, "little"))
        sregs = vcpu.get_sregs()
        sregs.cr3, sregs.cr0 = 0x1000, sregs.cr0 | 1 << 31 | 1
        vcpu.set_sregs(sregs)
        if not vcpu.get_sregs().cr0 >> 31 & 1:
            pytest.skip("this kvm has no 32-bit paging")
        assert describe_walk(vcpu, memory, 0x3456).splitlines() == [
            "cr3 0x1000: 32-bit paging",
            "GVA 0x3456 -> GPA 0x8456",
        ]
        assert describe_walk(vcpu, memory, 0x4000).endswith("GVA 0x4000 -> nothing")


def _vcpu(vm: Vm, memory: GuestMemory) -> Vcpu:
    for slot in memory.slots():
        vm.set_memory_slot(slot)
    vm.set_tss_address(0xFFFBD000)
    return vm.create_vcpu(0)


@pytest.mark.kvm
@pytest.mark.native
def test_memory_at_virtual_addresses(machine: InspectedMachine) -> None:
    space = AddressSpace(machine.vcpus[0], machine.memory)
    machine.set_entry(LEVEL1, 7, int(X86Entry.leaf(1, 0x20000, Access.READ)))
    machine.set_entry(LEVEL1, 8, int(X86Entry.leaf(1, 0x50000, Access.READ)))
    space.write(0x208000 - 2, b"abcd")  # over two pages that lie apart, both read-only
    assert machine.memory.read(0x20FFE, 2) == b"ab"
    assert machine.memory.read(0x50000, 2) == b"cd"
    assert space.read(0x207FFE, 4) == b"abcd"
    machine.set_entry(LEVEL1, 7, int(X86Entry.leaf(1, 0x20000, Access.READ | Access.USER)))
    assert space.read(0x207FFE, 2) == b"ab"  # whatever SMAP says
    machine.set_entry(LEVEL1, 8, 0x7000_0003)  # mapped, to no memory
    assert space.read(0x207FFE, 4) == b"ab"
    with pytest.raises(NoMemoryError, match="GPA 0x70000000") as caught:
        space.write(0x207FFE, b"wxyz")
    one_line(caught.value)
    assert machine.memory.read(0x20FFE, 2) == b"ab"
    with pytest.raises(NoMemoryError, match="maps nothing") as caught:
        space.memory_at(LAST)
    one_line(caught.value)
    assert space.read(2**64 - 4, 100) == b""
