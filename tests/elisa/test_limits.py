"""Limits of a VM on its contexts and their pages; a call at the limit changes nothing."""

import errno
import os
import resource

import pytest

from pykvm.elisa import calls
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, Kvm, ffi
from tests.rigs.child import CAP_IPC_LOCK, CAP_SYS_ADMIN, in_child
from tests.rigs.context_requests import (
    EPTP,
    GOOD_PAGES,
    PAGE,
    Machine,
    Memory,
    R,
    Request,
    call,
    chain,
    close,
    good,
    leaf,
    new_machine,
    sends,
    set_slot,
)
from tests.rigs.host_state import host_state, locked_kib, nothing_stays

pytestmark = pytest.mark.elisa


@pytest.mark.attack("T21")
def test_contexts(kvm: Kvm) -> None:
    with new_machine(kvm, contexts=2) as machine, nothing_stays():
        first, second, third = sends(machine, 3)
        assert third == -errno.ENOSPC
        full = host_state()
        assert good(machine).send(machine.vm) == -errno.ENOSPC
        assert host_state() == full
        # A context without a file still counts while a slot holds it.
        assert set_slot(machine.vcpu, 2, first) == 0
        close(first)
        assert good(machine).send(machine.vm) == -errno.ENOSPC
        assert set_slot(machine.vcpu, 2, -1) == 0
        third = good(machine).send(machine.vm)
        assert third > 0
        close(second, third)


@pytest.mark.attack("T21")
def test_pages(kvm: Kvm) -> None:
    """Table pages count like pinned pages."""
    with new_machine(kvm, pages=2 * GOOD_PAGES) as machine, nothing_stays():
        first, second, third = sends(machine, 3)
        assert min(first, second) > 0
        assert third == -errno.ENOSPC
        close(first)
        small = Request(chain(leaf(0)), [(machine.address, 0, 0)])  # 5 pages
        third = small.send(machine.vm)
        assert third > 0
        assert small.send(machine.vm) == -errno.ENOSPC
        close(second, third)
    with new_machine(kvm, pages=GOOD_PAGES - 1) as machine, nothing_stays():
        assert good(machine).send(machine.vm) == -errno.ENOSPC
    with new_machine(kvm, pages=GOOD_PAGES) as machine, nothing_stays():
        close(good(machine).send(machine.vm))


def test_a_target_counts_while_a_gate_names_it(kvm: Kvm) -> None:
    with new_machine(kvm, contexts=2) as machine, nothing_stays():
        target = good(machine).send(machine.vm)
        gate = Request(chain(leaf(0, R)), [(0, EPTP, target)]).send(machine.vm)
        assert gate > 0
        close(target)
        assert good(machine).send(machine.vm) == -errno.ENOSPC
        close(gate)
        close(*sends(machine, 2))


def test_limits_are_each_vms_own(kvm: Kvm) -> None:
    with (
        new_machine(kvm, contexts=1) as first,
        new_machine(kvm, contexts=1) as second,
        nothing_stays(),
    ):
        files = [*sends(first, 1), *sends(second, 1)]
        assert min(files) > 0
        assert [*sends(first, 1), *sends(second, 1)] == [-errno.ENOSPC] * 2
        close(*files)


def test_a_refused_request_counts_for_nothing(kvm: Kvm) -> None:
    with new_machine(kvm, contexts=1, pages=GOOD_PAGES) as machine, nothing_stays():
        for _ in range(20):
            bad = good(machine, leaf(0), leaf(9))
            assert bad.send(machine.vm) == -errno.EINVAL
            holes = Request(chain(leaf(0)), [(machine.address, 0, 0), (0, 0, 0)])
            assert holes.send(machine.vm) == -errno.EFAULT
        close(good(machine).send(machine.vm))


def test_defaults(kvm: Kvm) -> None:
    """0 selects the header's default, at which a storm of attachments ends."""
    assert uapi.lib.KVM_ELISA_DEFAULT_CONTEXTS == 1024
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with new_machine(kvm) as machine, nothing_stays():
        files = []
        request = Request(chain(leaf(0)), [(machine.address, 0, 0)])
        try:
            while (file := request.send(machine.vm)) > 0:
                files.append(file)
                assert len(files) <= uapi.lib.KVM_ELISA_DEFAULT_CONTEXTS
            assert file == -errno.ENOSPC
            assert len(files) == uapi.lib.KVM_ELISA_DEFAULT_CONTEXTS
        finally:
            close(*files)


# ---- opting in -----------------------------------------------------------------------------------


def enable(kvm: Kvm, flags: int, *arguments: int, vcpu_first: bool = False) -> int:
    """Return the result of KVM_ENABLE_CAP(KVM_CAP_ELISA) on a new VM."""
    with kvm.create_vm() as vm:
        if vcpu_first:
            vm.create_vcpu(0)
        request = ffi.new("struct kvm_enable_cap *", {"cap": uapi.lib.KVM_CAP_ELISA})
        request.args = (flags, *arguments)
        return call(vm, "KVM_ENABLE_CAP", request)


def test_enabling(kvm: Kvm) -> None:
    contexts, hypercalls = uapi.lib.KVM_ELISA_CONTEXTS, uapi.lib.KVM_ELISA_USER_HYPERCALLS
    assert enable(kvm, contexts) == 0
    assert enable(kvm, contexts | hypercalls, 1, 1) == 0
    assert enable(kvm, hypercalls, vcpu_first=True) == 0
    assert enable(kvm, contexts, vcpu_first=True) == -errno.EINVAL
    assert enable(kvm, contexts | hypercalls, vcpu_first=True) == -errno.EINVAL
    for bit in range(2, 64):
        assert enable(kvm, 1 << bit) == -errno.EINVAL
    assert enable(kvm, contexts, 0, 0, 1) == -errno.EINVAL


def test_enabling_without_sys_admin() -> None:
    def body() -> int:
        with Kvm() as kvm:
            return enable(kvm, uapi.lib.KVM_ELISA_CONTEXTS)

    assert in_child(body, without=CAP_SYS_ADMIN) == -errno.EPERM


def test_calls_of_a_vm_that_has_not_opted_in(kvm: Kvm) -> None:
    with Memory(3) as address, kvm.create_vm() as vm:
        machine = Machine(vm, vm.create_vcpu(0), address)
        before = host_state()
        assert good(machine).send(vm) == -errno.EINVAL
        assert set_slot(machine.vcpu, 2, -1) == -errno.EINVAL
        with pytest.raises(IoctlError, match="call enable_contexts"):
            calls.create_context(vm, bytes(PAGE), [(address, 0, 0)])
        assert host_state() == before


# ---- memory that may be locked -------------------------------------------------------------------


@pytest.mark.attack("T21")
@pytest.mark.parametrize(
    ("allowed", "expected"), [(GOOD_PAGES - 1, -errno.ENOMEM), (GOOD_PAGES, 1)]
)
def test_locked_memory(allowed: int, expected: int) -> None:
    """Pinned pages and table pages are charged unless the caller has CAP_IPC_LOCK."""

    def body() -> int:
        with Kvm() as kvm, new_machine(kvm) as machine:
            answer = good(machine).send(machine.vm)
            assert locked_kib() == (GOOD_PAGES * PAGE >> 10 if answer > 0 else 0)
            if answer > 0:
                os.close(answer)
                assert locked_kib() == 0
            return min(answer, 1)

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=allowed * PAGE) == expected
        assert in_child(body, memlock=PAGE) == 1
