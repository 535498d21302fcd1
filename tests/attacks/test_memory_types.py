"""T26: memory types of the guest's choice for trusted memory."""

from collections.abc import Iterator

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import MemoryType
from tests.rigs.attacks.host_addresses import host_address
from tests.rigs.attacks.host_tables import (
    RECKLESS,
    HostMemory,
    HostTables,
    both_contexts,
    read_list,
)
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import Step, What, Wild, calls, give, probe_guest, results, run

pytestmark = pytest.mark.elisa

PAT = 0x277  # IA32_PAT
UNCACHED = 0  # UC for every type that PAT, PCD and PWT can select
RESET = 0x0007_0406_0007_0406
WRITE_THROUGH, CACHE_DISABLE = 1 << 3, 1 << 4  # bits of CR3
WORD = 0x1234_5678_9ABC_DEF0


@pytest.fixture
def prober(kvm: Kvm) -> Iterator[BareGuest]:
    with probe_guest(kvm) as guest:
        yield guest


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with HostMemory() as memory:
        yield memory


def tables(guest: BareGuest, instance: ObjectInstance, memory: HostMemory) -> list[HostTables]:
    """Return the tables of both contexts after calls with PAT and CR3 at uncached."""
    attachment = instance.attach(guest)
    slot = attachment.slot
    instance.shared[:8] = WORD.to_bytes(8, "little")
    cr3 = layout.PAGE_TABLES_GPA | WRITE_THROUGH | CACHE_DISABLE
    read = (Wild.READ, crossing.CROSSING_GVA + crossing.SHARED_OFFSET)
    give(
        guest,
        Step(What.WRITE_MSR, PAT, UNCACHED),
        Step(What.READ_MSR, PAT),
        Step(What.CALL_WITH_CR3, *read, slot=slot, cr3=cr3),
        Step(What.WRITE_MSR, PAT, RESET),
        calls(slot, *read_list(slot)),
    )
    assert run(guest) == []
    _, pat, read_back, _, gate_eptp = results(guest)
    assert (pat, read_back) == (UNCACHED, WORD)
    assert gate_eptp
    secret = host_address(instance.memory.host_address)
    assert memory.read(secret, 8) == WORD.to_bytes(8, "little")  # memory is that of the host
    found = both_contexts(memory, gate_eptp)
    assert found[1].page(crossing.SUB_MEMORY_GPA) == secret
    # Every table was found, those of the object's memory among them.
    gate, sub = attachment.cost.gate.ept_tables, attachment.cost.sub.ept_tables
    shared = instance.register(guest.vm).tables
    assert [len(each.levels) for each in found] == [gate, sub + shared]
    assert all(each.leaves for each in found)
    return list(found)


@pytest.mark.attack("T26")
def test_every_leaf_is_write_back_whatever_the_guest_says(
    prober: BareGuest, memory: HostMemory
) -> None:
    """The guest's PAT and CR3 say uncached, but the EPT decides."""
    with RECKLESS.open() as instance:
        for context in tables(prober, instance, memory):
            assert context.eptp.memory_type == MemoryType.WB
            assert not context.eptp.access_dirty
            for leaf in context.leaves:
                assert leaf.memory_type == MemoryType.WB
                assert leaf.ignore_pat


@pytest.mark.control("T26")
@pytest.mark.weakened
def test_leaves_that_leave_it_to_the_guest(prober: BareGuest, memory: HostMemory) -> None:
    """Without "ignore PAT" the guest's PAT is combined with write-back and decides."""
    with weakened(Weaken.IPAT), RECKLESS.open() as instance:
        for context in tables(prober, instance, memory):
            assert not any(leaf.ignore_pat for leaf in context.leaves)
