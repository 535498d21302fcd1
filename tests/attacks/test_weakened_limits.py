"""T21, controls: without limits, one VMM takes as much memory as it likes."""

import os
import resource

import pytest

from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.child import CAP_IPC_LOCK, in_child
from tests.rigs.context_requests import (
    GOOD_PAGES,
    PAGE,
    Request,
    chain,
    close,
    good,
    leaf,
    new_machine,
    sends,
)
from tests.rigs.host_state import nothing_stays, pinned_pages

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]


@pytest.mark.control("T21")
def test_more_contexts_than_the_vm_may_have(kvm: Kvm) -> None:
    with weakened(Weaken.LIMITS), new_machine(kvm, contexts=2) as machine, nothing_stays():
        files = sends(machine, 20)
        assert min(files) > 0
        close(*files)


@pytest.mark.control("T21")
def test_more_pages_than_the_vm_may_have(kvm: Kvm) -> None:
    with (
        weakened(Weaken.LIMITS),
        new_machine(kvm, pages=GOOD_PAGES - 1) as machine,
        nothing_stays(),
    ):
        files = sends(machine, 20)
        assert min(files) > 0
        close(*files)


@pytest.mark.control("T21")
def test_a_storm_of_contexts(kvm: Kvm) -> None:
    """Contexts past the default limit, at which test_defaults stops, are accepted."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with weakened(Weaken.LIMITS), new_machine(kvm) as machine, nothing_stays():
        request = Request(chain(leaf(0)), [(machine.address, 0, 0)])
        files: list[int] = []
        try:
            while len(files) < uapi.lib.KVM_ELISA_DEFAULT_CONTEXTS + 100:
                file = request.send(machine.vm)
                assert file > 0
                files.append(file)
        finally:
            close(*files)


@pytest.mark.control("T21")
def test_memory_that_may_not_be_locked() -> None:
    """A caller without CAP_IPC_LOCK, with a limit of one page, pins many."""

    def body() -> int:
        with Kvm() as kvm, new_machine(kvm) as machine:
            before = pinned_pages()
            files = sends(machine, 10)
            pinned = pinned_pages() - before
            for file in files:
                os.close(file)
            return pinned if min(files) > 0 else min(files)

    with weakened(Weaken.LIMITS), nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=PAGE) == 10 * (GOOD_PAGES - 4)


def test_the_same_with_limits() -> None:
    """On these modules too, the bit alone lets them through."""

    def body() -> int:
        with Kvm() as kvm, new_machine(kvm) as machine:
            return good(machine).send(machine.vm)

    with weakened(Weaken(0)):
        assert in_child(body, without=CAP_IPC_LOCK, memlock=PAGE) < 0
