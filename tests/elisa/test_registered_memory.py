"""KVM_ELISA_REGISTER_MEMORY: memory that is pinned and charged once, for any number of contexts."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from pykvm.elisa import ElisaExit, SharedObject, calls, crossing
from pykvm.elisa.calls import RegisteredMemory
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.huge_pages import collapse
from pykvm.memory.limits import LockLimitError
from pykvm.memory.regions import HUGE_2M, MemoryFile, Region
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from tests.rigs.child import CAP_IPC_LOCK, CAP_SYS_ADMIN, in_child
from tests.rigs.context_requests import (
    GOOD_PAGES,
    LARGE,
    PAGE,
    WB,
    Machine,
    Memory,
    R,
    W,
    X,
    branch,
    good,
    leaf,
    new_machine,
    part_leaf,
    register,
    set_slot,
    table,
    with_part,
)
from tests.rigs.host_state import host_state, locked_kib, nothing_stays, pinned_pages
from tests.rigs.probe import Probe, give, results, run
from tests.rigs.probe import calls as call_steps
from tests.rigs.registered_memory import run_memory, wild_guest

pytestmark = pytest.mark.elisa

COUNTER = GUEST_SOURCES / "objects" / "counter.c"


@contextmanager
def file_memory(size: int, *, large: bool) -> Iterator[int]:
    """Yield the address of memory from a file, in huge pages as far as there are some."""
    with MemoryFile("memory", size) as file, Region(file, 0) as region:
        if large:
            assert collapse(file)
        yield region.host_address


# ---- once ----------------------------------------------------------------------------------------


def test_pinned_and_charged_once(kvm: Kvm, machine: Machine) -> None:
    with nothing_stays() as before, Memory(5) as address:
        fd = register(kvm.fileno(), address, 5 * PAGE)
        # Five pages, the table of a GiB and that of 2 MiB.
        assert locked_kib() - before.locked == 7 * PAGE >> 10
        assert pinned_pages() - before.pinned == 5
        request = with_part(good(machine), fd)
        contexts = [request.send(machine.vm) for _ in range(10)]
        assert min(contexts) > 0
        assert locked_kib() - before.locked == (7 + 10 * GOOD_PAGES) * PAGE >> 10
        assert pinned_pages() - before.pinned == 5 + 10 * 3
        for context in contexts:
            os.close(context)
        os.close(fd)


@pytest.mark.attack("T36")
def test_contexts_keep_it(kvm: Kvm, machine: Machine) -> None:
    with nothing_stays(), Memory(2) as address:
        before = pinned_pages()
        fd = register(kvm.fileno(), address, 2 * PAGE)
        context = with_part(good(machine), fd).send(machine.vm)
        os.close(fd)
        assert pinned_pages() - before == 2 + 3
        assert set_slot(machine.vcpu, 2, context) == 0
        os.close(context)
        assert pinned_pages() - before == 2 + 3
        assert set_slot(machine.vcpu, 2, -1) == 0
        assert pinned_pages() == before


def test_two_vms_share_it(kvm: Kvm, machine: Machine) -> None:
    with nothing_stays(), new_machine(kvm) as other, Memory(2) as address:
        fd = register(kvm.fileno(), address, 2 * PAGE)
        before = pinned_pages()
        for one in (machine, other):
            os.close(with_part(good(one), fd).send(one.vm))
        assert pinned_pages() == before
        os.close(fd)


@pytest.mark.parametrize("large", [True, False])
def test_large_pages(kvm: Kvm, large: bool) -> None:
    """Whole 2 MiB that lie side by side take one entry; the rest takes pages of 4 KiB."""
    size = 2 * HUGE_2M + PAGE
    with (
        nothing_stays(),
        file_memory(size, large=large) as address,
        calls.register_memory(kvm, address, size) as memory,
    ):
        assert memory.size == size
        assert (memory.large_pages, memory.tables) == ((2, 2) if large else (0, 4))
        assert memory.contexts == 0


def test_pages_that_somebody_has_pinned_stay_small(kvm: Kvm) -> None:
    size = 2 * HUGE_2M
    with nothing_stays(), MemoryFile("memory", size) as file, Region(file, 0) as region:
        address = region.host_address
        with calls.register_memory(kvm, address, PAGE) as first:
            assert first.tables == 2
            collapse(file)
            with calls.register_memory(kvm, address, size) as memory:
                assert memory.large_pages <= 1
                assert memory.tables == 3 - memory.large_pages


# ---- what is refused -----------------------------------------------------------------------------

BAD_PARTS = {
    "executable": part_leaf(access=R | X),
    "write and execute": part_leaf(access=R | W | X),
    "execute-only": part_leaf(access=X),
    "write without read": part_leaf(access=W),
    "no access": part_leaf(access=0),
    "uncached": part_leaf(kind=0),
    "write-combining": part_leaf(kind=1 << 3),
    "ignore pat": part_leaf() | 1 << 6,
    "accessed": part_leaf() | 1 << 8,
    "dirty": part_leaf() | 1 << 9,
    "bit 12": part_leaf() | 1 << 12,
    "bit 29": part_leaf() | 1 << 29,
    "bit 52": part_leaf() | 1 << 52,
    "suppress #ve": part_leaf() | 1 << 63,
    "part 0 of none": R | W | WB | LARGE,
    "part out of range": part_leaf(1),
    "part far out of range": part_leaf((1 << 22) - 2),
}


@pytest.mark.attack("T36")
@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_part(kvm: Kvm, machine: Machine, name: str) -> None:
    with nothing_stays():
        fd = register(kvm.fileno(), machine.address, PAGE)
        before = host_state()
        request = with_part(good(machine), fd, entry=BAD_PARTS[name])
        assert request.send(machine.vm) == -errno.EINVAL
        assert host_state() == before
        os.close(fd)


@pytest.mark.attack("T36")
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_part_at_another_level(kvm: Kvm, machine: Machine, number: int) -> None:
    with nothing_stays():
        fd = register(kvm.fileno(), machine.address, PAGE)
        request = with_part(good(machine), fd)
        tables = [*request.tables]
        first = leaf() if number == 3 else branch(number + 1)
        tables[number] = table(e0=first, e7=part_leaf())
        assert replace(request, tables=tables).send(machine.vm) == -errno.EINVAL
        tables[number] = table(e0=first)
        os.close(replace(request, tables=tables).send(machine.vm))
        os.close(fd)


@pytest.mark.attack("T25")
def test_bad_registrations(kvm: Kvm, machine: Machine) -> None:
    most = uapi.lib.KVM_ELISA_MAX_MEMORY
    with nothing_stays(), Memory(4) as address:
        for at, size, reserved, code in (
            (address, 0, (), errno.EINVAL),
            (address + 8, PAGE, (), errno.EINVAL),
            (address, PAGE + 8, (), errno.EINVAL),
            (address, 2**64 - PAGE, (), errno.EINVAL),
            (address, PAGE, (1, 0), errno.EINVAL),
            (address, PAGE, (0, 1 << 63), errno.EINVAL),
            (address, most + PAGE, (), errno.E2BIG),
            (1 << 62, PAGE, (), errno.EFAULT),
            (0xFFFF_8880_0000_0000, PAGE, (), errno.EFAULT),
        ):
            assert register(kvm.fileno(), at, size, *reserved) == -code, (hex(at), hex(size))
        assert register(machine.vm.fileno(), address, PAGE) == -errno.ENOTTY
        assert register(machine.vcpu.fileno(), address, PAGE) == -errno.EINVAL  # as KVM answers


def test_memory_that_cannot_be_pinned(kvm: Kvm) -> None:
    """Nothing stays pinned of memory with a hole in it, or with a page that is read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Memory(4) as address:
        for protection in (mmap.PROT_READ, 0):
            page = ctypes.c_void_p(address + 2 * PAGE)
            assert libc.mprotect(page, ctypes.c_size_t(PAGE), protection) == 0
            with nothing_stays():
                assert register(kvm.fileno(), address, 4 * PAGE) == -errno.EFAULT
        assert libc.mprotect(page, ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
        with nothing_stays():
            os.close(register(kvm.fileno(), address, 4 * PAGE))


@pytest.mark.attack("T36")
def test_files_and_parts_that_are_none(kvm: Kvm, machine: Machine) -> None:
    with nothing_stays():
        fd = register(kvm.fileno(), machine.address, PAGE)
        context = good(machine).send(machine.vm)
        before = host_state()
        for file, index, code in (
            (-1, 0, errno.EBADF),
            (9999, 0, errno.EBADF),
            (machine.vm.fileno(), 0, errno.EINVAL),
            (context, 0, errno.EINVAL),
            (fd, 1, errno.EINVAL),
            (fd, 2**32 - 1, errno.EINVAL),
        ):
            request = with_part(good(machine), file, index=index)
            assert request.send(machine.vm) == -code, (file, index)
            assert host_state() == before
        # Memory is no context.
        assert set_slot(machine.vcpu, 2, fd) == -errno.EINVAL
        os.close(context)
        os.close(fd)
        assert with_part(good(machine), fd).send(machine.vm) == -errno.EBADF


@pytest.mark.attack("T36")
def test_without_sys_admin() -> None:
    def body() -> int:
        with Kvm() as kvm, Memory(1) as address:
            return register(kvm.fileno(), address, PAGE)

    with nothing_stays():
        assert in_child(body, without=CAP_SYS_ADMIN) == -errno.EPERM


@pytest.mark.attack("T21")
@pytest.mark.parametrize(("allowed", "expected"), [(3, -errno.ENOMEM), (4, -errno.ENOMEM), (5, 0)])
def test_locked_memory(allowed: int, expected: int) -> None:
    """Three pages and two tables count; the limit can be met before and after pinning."""

    def body() -> int:
        with Kvm() as kvm, Memory(3) as address:
            answer = register(kvm.fileno(), address, 3 * PAGE)
            assert locked_kib() == (5 * PAGE >> 10 if answer > 0 else 0)
            return min(answer, 0)

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=allowed * PAGE) == expected


# ---- objects -------------------------------------------------------------------------------------


def test_an_object_is_registered_by_the_first_attachment(kvm: Kvm) -> None:
    counter = SharedObject("counter", COUNTER, shared=3 * HUGE_2M, guests=8)
    with nothing_stays() as before, counter.open() as instance, kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        vcpu = vm.create_vcpu(0)
        memory = instance.register(kvm)
        registered = locked_kib()
        assert registered - before.locked == (instance.memory.size // PAGE_SIZE + 2) * 4
        each = []
        for number in range(8):
            here = locked_kib()
            instance.attach_vcpu(vcpu, number)
            each.append(locked_kib() - here)
        assert len(set(each)) == 1
        assert each[0] < 40 * 4
        assert instance.register(vcpu) is memory
        assert memory.contexts == 8
        assert memory.large_pages == 3


def test_an_object_outlives_the_kvm_that_it_was_registered_with() -> None:
    counter = SharedObject("counter", COUNTER, guests=2)
    with nothing_stays(), counter.open() as instance:
        seen: list[RegisteredMemory] = []
        counts: list[int | None] = []
        for _ in range(2):
            with Kvm() as kvm, BareGuest(kvm, Probe()) as guest:
                attachment = instance.attach(guest)
                seen.append(instance.register(kvm))
                give(guest, call_steps(attachment.slot, 5, 0, 0))
                assert run(guest) == []
                counts += results(guest)
                attachment.detach()
        assert seen[0] is not seen[1]
        assert counts == [5, 10]


@pytest.mark.attack("T36")
def test_behind_the_end_there_is_nothing(kvm: Kvm) -> None:
    """Guest paging maps whole large pages; the EPT ends where the memory ends."""
    with wild_guest(kvm) as (guest, instance, attachment):
        end = attachment.crossing_gva + crossing.SHARED_OFFSET + instance.memory.size
        instance.memory.view(instance.memory.size - 8)[:] = (7).to_bytes(8, "little")
        give(
            guest,
            call_steps(attachment.slot, 1, end - 8),
            call_steps(attachment.slot, 1, end),
        )
        (exit,) = run(guest)
        assert results(guest)[0] == 7
        assert isinstance(exit, ElisaExit)
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_VIOLATION
        assert exit.gpa == crossing.SUB_MEMORY_GPA + instance.memory.size


@pytest.mark.attack("T36")
def test_memory_is_never_executed(kvm: Kvm) -> None:
    with wild_guest(kvm) as (guest, instance, attachment):
        give(guest, *run_memory(instance, attachment))
        (exit,) = run(guest)
        assert isinstance(exit, ElisaExit)
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_VIOLATION
        assert exit.gpa == crossing.SUB_MEMORY_GPA


def test_a_limit_that_the_object_exceeds() -> None:
    def body() -> int:
        counter = SharedObject("counter", COUNTER, shared=HUGE_2M)
        with counter.open() as instance, Kvm() as kvm:
            with pytest.raises(LockLimitError, match="ulimit -l"):
                instance.register(kvm)
            return locked_kib()

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=PAGE) == 0


def test_messages(kvm: Kvm) -> None:
    with pytest.raises(IoctlError, match="give whole pages"):
        calls.register_memory(kvm, 8, PAGE)
    with pytest.raises(IoctlError, match="at most 64 GiB"):
        calls.register_memory(kvm, 0, 1 << 40)


def test_a_forked_process_shares_it(kvm: Kvm) -> None:
    """A child's guest maps the memory that its parent registered; nothing is pinned again."""
    counter = SharedObject("counter", COUNTER, shared=HUGE_2M, guests=1)

    def body() -> int:
        before = pinned_pages()
        with Kvm() as own, BareGuest(own, Probe()) as guest:
            attachment = instance.attach(guest)
            assert pinned_pages() - before < 40
            give(guest, call_steps(attachment.slot, 5))
            assert run(guest) == []
            return int(results(guest)[0] or 0)

    with nothing_stays(), counter.open() as instance:
        instance.register(kvm)
        assert in_child(body) == 5
        assert int.from_bytes(instance.shared[:8], "little") == 5
