"""Creating contexts and setting slots on the real kernel: a refusal leaves nothing behind."""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from pykvm.elisa import calls
from pykvm.elisa.objects import SharedObject
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, Kvm, Vm
from pykvm.memory.limits import LockLimitError
from pykvm.resources import GUEST_SOURCES
from tests.rigs.child import CAP_IPC_LOCK, CAP_SYS_ADMIN, in_child
from tests.rigs.context_requests import (
    EPTP,
    LARGE,
    LIST,
    PAGE,
    USER,
    WB,
    Machine,
    Memory,
    R,
    Request,
    W,
    X,
    branch,
    chain,
    good,
    leaf,
    revoke,
    set_slot,
    table,
)
from tests.rigs.host_state import (
    host_state,
    locked_kib,
    nothing_stays,
    pinned_pages,
)

pytestmark = pytest.mark.elisa


def test_a_good_context(machine: Machine) -> None:
    """The unchanged request succeeds; it pins and charges three pages, and charges four tables.

    The refusals below change one part of it each.
    """
    with nothing_stays() as before:
        fd = good(machine).send(machine.vm)
        assert fd > 0
        now = host_state()
        assert (now.locked - before.locked, now.pinned - before.pinned) == (28, 3)
        assert set_slot(machine.vcpu, 2, fd) == 0
        assert set_slot(machine.vcpu, 2, fd) == 0  # the same again
        assert set_slot(machine.vcpu, 511, fd) == 0
        os.close(fd)
        assert host_state().pinned == now.pinned
        assert set_slot(machine.vcpu, 2, -1) == 0
        assert host_state().pinned == now.pinned
        assert set_slot(machine.vcpu, 511, -1) == 0


BAD_LEAVES = {
    "write without read": leaf(0, W),
    "write and execute": leaf(0, W | X),
    "all access": leaf(0, R | W | X),
    "no access": leaf(0, 0),
    "uncached": leaf(0, R, 0),
    "write-combining": leaf(0, R, 1 << 3),
    "write-through": leaf(0, R, 4 << 3),
    "write-protected": leaf(0, R, 5 << 3),
    "reserved memory type": leaf(0, R, 7 << 3),
    "ignore pat": leaf(0, R) | 1 << 6,
    "bit 7": leaf(0, R) | LARGE,
    "accessed": leaf(0, R) | 1 << 8,
    "dirty": leaf(0, R | W) | 1 << 9,
    "user execute": leaf(0, R) | 1 << 10,
    "ignored bit 11": leaf(0, R) | 1 << 11,
    "bit 52": leaf(0, R) | 1 << 52,
    "shadow stack": leaf(0, R) | 1 << 60,
    "suppress #ve": leaf(0, R) | 1 << 63,
    "page out of range": leaf(4, R),
    "page far out of range": leaf((1 << 40) - 1, R),
    "list page executable": leaf(3, R | X),
    "list page execute-only": leaf(3, X),
}


@pytest.mark.attack("T25")
@pytest.mark.parametrize("name", BAD_LEAVES)
def test_bad_leaf(machine: Machine, name: str) -> None:
    with nothing_stays():
        assert good(machine, leaf(0), BAD_LEAVES[name]).send(machine.vm) == -errno.EINVAL


def one_wrong(level: int, entry: int) -> list[bytes]:
    tables = chain(leaf(0))
    tables[4 - level] = table(e0=branch(5 - level), e7=entry)
    return tables


BAD_TABLES = {
    **{
        f"{what} at level {level}": one_wrong(level, entry | (5 - level) << 12)
        for level in (4, 3, 2)
        for what, entry in (
            ("large page", R | W | LARGE | WB),
            ("memory type", R | WB),
            ("accessed", R | 1 << 8),
            ("bit 52", R | 1 << 52),
            ("write without read", W),
            ("no access", 0),
        )
    },
    "table out of range": one_wrong(2, branch(4)),
    "root as a lower table": one_wrong(2, branch(0)),
    "table at two levels": one_wrong(3, branch(3)),
    "table at its own level": one_wrong(3, branch(1)),
    "unreached table": [*chain(leaf(0)), table(e0=leaf(0))],
    "unreached empty table": [*chain(leaf(0)), table()],
}


@pytest.mark.attack("T25")
@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(machine: Machine, name: str) -> None:
    with nothing_stays():
        request = replace(good(machine), tables=BAD_TABLES[name])
        assert request.send(machine.vm) == -errno.EINVAL


def test_a_table_named_twice_at_one_level(machine: Machine) -> None:
    with nothing_stays():
        fd = replace(good(machine), tables=one_wrong(2, branch(3))).send(machine.vm)
        assert fd > 0
        os.close(fd)


@pytest.mark.attack("T25")
def test_bad_requests(machine: Machine) -> None:
    vm, plain = machine.vm, good(machine)
    user = plain.pages[0]
    cases: list[tuple[Request, int]] = [
        (replace(plain, fields={"flags": 2}), errno.EINVAL),
        (replace(plain, fields={"gva": 1}), errno.EINVAL),
        (replace(plain, fields={"size": 0}), errno.EINVAL),
        (replace(plain, fields={"size": PAGE + 8}), errno.EINVAL),
        (replace(plain, fields={"gva": 2**64 - PAGE, "size": 2 * PAGE}), errno.EINVAL),
        (replace(plain, fields={"reserved": 1}), errno.EINVAL),
        (replace(plain, fields={"parts": 1}), errno.EINVAL),
        (replace(plain, fields={"nr_parts": 1}), errno.EFAULT),
        (replace(plain, fields={"nr_parts": 1, "parts": 1 << 63}), errno.EFAULT),
        (replace(plain, fields={"nr_parts": uapi.lib.KVM_ELISA_MAX_PARTS + 1}), errno.E2BIG),
        (replace(plain, fields={"nr_tables": 0}), errno.EINVAL),
        (replace(plain, fields={"nr_pages": 0}), errno.EINVAL),
        (replace(plain, fields={"nr_tables": uapi.lib.KVM_ELISA_MAX_TABLES + 1}), errno.E2BIG),
        (replace(plain, fields={"nr_pages": uapi.lib.KVM_ELISA_MAX_PAGES + 1}), errno.E2BIG),
        (replace(plain, fields={"nr_tables": 2**32 - 1}), errno.E2BIG),
        (replace(plain, fields={"tables": 0}), errno.EFAULT),
        (replace(plain, fields={"tables": 1 << 63}), errno.EFAULT),
        (replace(plain, fields={"pages": 0}), errno.EFAULT),
        (replace(plain, fields={"pages": 1 << 63}), errno.EFAULT),
    ]
    bad_pages = [
        ((machine.address + 8, USER, 0), errno.EINVAL),
        ((machine.address, USER, 1), errno.EINVAL),
        ((0, USER, 0), errno.EFAULT),
        ((0xFFFF_8880_0000_0000, USER, 0), errno.EFAULT),
        ((1 << 62, USER, 0), errno.EFAULT),
        ((machine.address, LIST, 0), errno.EINVAL),
        ((0, LIST, -1), errno.EINVAL),
        ((0, LIST, 1), errno.ENOENT),
        ((machine.address, EPTP, 0), errno.EINVAL),
        ((0, EPTP, -1), errno.EBADF),
        ((0, EPTP, 9999), errno.EBADF),
        ((0, EPTP, vm.fileno()), errno.EINVAL),
        ((0, 3, 0), errno.EINVAL),
    ]
    # After a good page, so that some pages are already pinned when the call meets the bad one.
    cases += [
        (replace(plain, pages=[user, page, *plain.pages[2:]]), code) for page, code in bad_pages
    ]
    for request, code in cases:
        with nothing_stays():
            assert request.send(vm) == -code, request


def test_memory_that_cannot_be_pinned(machine: Machine) -> None:
    """Holes in the middle of a run, and pages that this process may not write, are refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Memory(4) as address:
        pages = [(address + n * PAGE, USER, 0) for n in range(4)]
        request = Request(chain(leaf(0), leaf(3)), pages)
        for protection in (mmap.PROT_READ, 0):
            page = ctypes.c_void_p(address + 2 * PAGE)
            assert libc.mprotect(page, ctypes.c_size_t(PAGE), protection) == 0
            with nothing_stays():
                assert request.send(machine.vm) == -errno.EFAULT
        assert libc.mprotect(page, ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
        with nothing_stays():
            os.close(request.send(machine.vm))


@pytest.mark.attack("T25")
def test_contexts_that_name_contexts(kvm: Kvm, machine: Machine) -> None:
    def with_target(vm: Vm, fd: int, entry: int) -> int:
        return Request(chain(entry), [(0, EPTP, fd)]).send(vm)

    def no_new_pins(vm: Vm, fd: int, entry: int, code: int) -> None:
        before = host_state()
        assert with_target(vm, fd, entry) == -code
        assert host_state() == before

    with nothing_stays():
        target = good(machine).send(machine.vm)
        no_new_pins(machine.vm, target, leaf(0), errno.EINVAL)  # writable
        no_new_pins(machine.vm, target, leaf(0, R | X), errno.EINVAL)
        gate = with_target(machine.vm, target, leaf(0, R))
        assert gate > 0
        no_new_pins(machine.vm, gate, leaf(0, R), errno.ELOOP)
        with kvm.create_vm() as other:
            calls.enable_contexts(other)
            no_new_pins(other, target, leaf(0, R), errno.EINVAL)
            assert set_slot(other.create_vcpu(0), 2, target) == -errno.EINVAL
        many = [(0, EPTP, target)] * uapi.lib.KVM_ELISA_SLOTS
        os.close(Request(chain(leaf(0, R)), many).send(machine.vm))
        assert Request(chain(leaf(0, R)), [*many, many[0]]).send(machine.vm) == -errno.E2BIG
        pinned = pinned_pages()
        os.close(target)
        assert pinned_pages() == pinned  # the gate keeps it
        os.close(gate)
        assert pinned_pages() == pinned - 3


@pytest.mark.attack("T25")
def test_bad_slots(machine: Machine) -> None:
    with nothing_stays():
        fd = good(machine).send(machine.vm)
        for slot in (0, 1, 512, 513, 2**31, 2**32 - 1):
            assert set_slot(machine.vcpu, slot, fd) == -errno.EINVAL
            assert set_slot(machine.vcpu, slot, -1) == -errno.EINVAL
        for bad, code in (
            (-2, errno.EINVAL),
            (9999, errno.EBADF),
            (machine.vm.fileno(), errno.EINVAL),
            (machine.vcpu.fileno(), errno.EINVAL),
        ):
            assert set_slot(machine.vcpu, 2, bad) == -code
        assert set_slot(machine.vcpu, 2, -1) == 0  # the slot was empty
        os.close(fd)


@pytest.mark.attack("T28")
def test_lists_of_other_vcpus(machine: Machine) -> None:
    """A gate that wrote into another vCPU's list would open that vCPU's transient slot."""
    with nothing_stays():
        second = machine.vm.create_vcpu(1)
        plain = good(machine)
        both = replace(plain, pages=[*plain.pages[:2], (0, LIST, 0), (0, LIST, 1)])
        assert both.send(machine.vm) == -errno.EINVAL

        sub = replace(plain, pages=[*plain.pages[:3], (0, LIST, 1)]).send(machine.vm)
        gate = Request(chain(leaf(0, R)), [(0, EPTP, sub)]).send(machine.vm)
        own = plain.send(machine.vm)
        assert set_slot(machine.vcpu, 2, own) == 0
        for fd in (sub, gate):
            assert set_slot(machine.vcpu, 2, fd) == -errno.EINVAL
            assert set_slot(machine.vcpu, 3, fd) == -errno.EINVAL
            assert revoke(machine.vm, 0, 3) == -errno.ENOENT  # it stayed empty
            assert set_slot(second, 2, fd) == 0
        assert set_slot(second, 3, own) == -errno.EINVAL
        assert revoke(machine.vm, 0, 2) == 0  # the former context has stayed
        assert revoke(machine.vm, 1, 0) == 0
        for fd in (sub, gate, own):
            os.close(fd)
        second.close()


# ---- permissions and limits, in a child process --------------------------------------------------


def _own_machine(body: Callable[[Machine], int]) -> int:
    with Kvm() as kvm, Memory(3) as address, kvm.create_vm() as vm:
        with contextlib.suppress(IoctlError):  # a caller without CAP_SYS_ADMIN may not
            calls.enable_contexts(vm)
        return body(Machine(vm, vm.create_vcpu(0), address))


@pytest.mark.attack("T25")
def test_without_sys_admin() -> None:
    with nothing_stays():

        def create() -> int:
            return _own_machine(lambda m: good(m).send(m.vm))

        def empty_slot() -> int:
            return _own_machine(lambda m: set_slot(m.vcpu, 2, -1))

        for body in (create, empty_slot):
            assert in_child(body, without=CAP_SYS_ADMIN) == -errno.EPERM


@pytest.mark.attack("T21")
def test_lock_limit() -> None:
    def create(m: Machine) -> int:
        answer = good(m).send(m.vm)
        assert locked_kib() == (28 if answer > 0 else 0)
        return min(answer, 1)

    with nothing_stays():
        for memlock, expected in ((6 * PAGE, -errno.ENOMEM), (7 * PAGE, 1)):
            answer = in_child(lambda: _own_machine(create), without=CAP_IPC_LOCK, memlock=memlock)
            assert answer == expected
        # With the capability the limit does not apply.
        assert in_child(lambda: _own_machine(create), memlock=PAGE) == 1


def test_lock_limit_of_an_object() -> None:
    def body() -> int:
        counter = SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c")
        with counter.open() as instance, Kvm() as kvm, kvm.create_vm() as vm:
            calls.enable_contexts(vm)
            with pytest.raises(LockLimitError, match="ulimit -l"):
                instance.attach_vcpu(vm.create_vcpu(0), 0)
            return locked_kib()

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=PAGE) == 0


@pytest.mark.attack("T25")
def test_a_vm_of_another_process(machine: Machine) -> None:
    """A child inherits the descriptors; KVM serves them only in the process that made them."""
    with nothing_stays():
        fd = good(machine).send(machine.vm)
        assert in_child(lambda: good(machine).send(machine.vm)) == -errno.EIO
        assert in_child(lambda: set_slot(machine.vcpu, 2, fd)) == -errno.EIO
        os.close(fd)
