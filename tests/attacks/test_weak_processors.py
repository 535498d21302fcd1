"""T38: processors on which a guest could learn what runs in a context.

The emulated processor is one: by what it reports it has L1TF, buffers that leak, microcode whose
VERW clears nothing, and returns that can be trained.
"""

import errno
import subprocess
from dataclasses import replace

import pytest

from pykvm.elisa import SharedObject, UnansweredWeaknessError, calls
from pykvm.elisa.calls import WeakProcessorError
from pykvm.elisa.protections import FOR_WEAK_PROCESSORS, NOTHING_EXTRA, answers, needed
from pykvm.kernel import uapi, weaknesses
from pykvm.kernel.weaknesses import ALL, ANSWERABLE, NONE, PARAMETER, Weak
from pykvm.kvm import IoctlError, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.resources import GUEST_SOURCES
from tests.rigs.context_requests import good, new_machine
from tests.rigs.host_state import nothing_stays
from tests.rigs.messages import one_line
from tests.rigs.probe import Probe, give, results, run
from tests.rigs.probe import calls as call_steps
from tests.rigs.weaknesses import accepting

pytestmark = pytest.mark.elisa

EMULATED = Weak.L1TF | Weak.BUFFERS | Weak.RETURNS | Weak.MICROCODE
COUNTER = SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c", window=4096)
UNANSWERABLE = ALL & ~ANSWERABLE


@pytest.fixture(autouse=True)
def weak_processor() -> None:
    if weaknesses.present() != EMULATED:
        pytest.skip("this processor has other weaknesses than the emulated one")


def _allowed(kvm: Kvm, answered: Weak = NONE) -> bool:
    with kvm.create_vm() as vm:
        try:
            calls.enable_contexts(vm, answered=answered)
        except WeakProcessorError:
            return False
        vm.create_vcpu(0)
    return True


@pytest.mark.attack("T38")
def test_a_weakness_that_is_left(kvm: Kvm) -> None:
    """One weakness after the other is left; what is answered need not be accepted."""
    for left in EMULATED:
        with accepting(ALL & ~left):
            # Who accepts that buffers leak does not depend on the microcode.
            assert _allowed(kvm) == (left == Weak.MICROCODE)
            assert _allowed(kvm, ANSWERABLE) == (left in ANSWERABLE or left == Weak.MICROCODE)
    with accepting(ALL & ~Weak.BUFFERS & ~Weak.MICROCODE):
        assert not _allowed(kvm, ANSWERABLE)
    with accepting(NONE):
        assert not _allowed(kvm)
        assert not _allowed(kvm, ANSWERABLE)
    with accepting(UNANSWERABLE):
        assert not _allowed(kvm)
        assert not _allowed(kvm, Weak.BUFFERS)
        assert not _allowed(kvm, Weak.RETURNS)
        assert _allowed(kvm, ANSWERABLE)


@pytest.mark.attack("T38")
def test_the_kernel_and_pykvm_name_what_is_left(kvm: Kvm) -> None:
    with accepting(Weak.RETURNS), kvm.create_vm() as vm:
        with pytest.raises(WeakProcessorError) as caught:
            calls.enable_contexts(vm, answered=Weak.BUFFERS)
        message = one_line(caught.value)
        assert "l1tf, microcode" in message
        assert "kernel load --accept l1tf,returns,microcode" in message
        log = subprocess.run(["/bin/dmesg"], capture_output=True, text=True, check=True).stdout
        assert "on a processor with: l1tf,microcode (parameter elisa_accept)" in log
        vm.create_vcpu(0)  # the VM is an ordinary one


@pytest.mark.attack("T38")
def test_what_is_no_longer_accepted(kvm: Kvm) -> None:
    """No further context comes into being, and nothing is pinned."""
    with new_machine(kvm) as machine, nothing_stays(), accepting(NONE):
        assert good(machine).send(machine.vm) == -errno.EACCES


@pytest.mark.attack("T38")
def test_objects_with_all_answers(kvm: Kvm) -> None:
    """Where both can be answered, objects have both, and a call works."""
    with accepting(UNANSWERABLE):
        assert needed() == set(FOR_WEAK_PROCESSORS)
        assert answers(needed()) == ANSWERABLE
        with COUNTER.open() as instance, BareGuest(kvm, Probe()) as guest:
            assert instance.extra == needed()
            attachment = instance.attach(guest)
            # VERW with a RIP-relative operand, once, and not in what others get.
            assert instance.sub_entry_page.count(b"\x0f\x00\x2d") == 1
            give(guest, call_steps(attachment.slot, 5), call_steps(attachment.slot, 6))
            assert run(guest) == []
            assert results(guest)[:2] == [5, 11]
    with COUNTER.open() as instance:
        assert instance.extra == NOTHING_EXTRA
        assert instance.sub_entry_page.count(b"\x0f\x00\x2d") == 0


@pytest.mark.attack("T38")
def test_an_object_without_what_is_needed(kvm: Kvm) -> None:
    for lacks in FOR_WEAK_PROCESSORS:
        extra = frozenset(FOR_WEAK_PROCESSORS) - {lacks}
        bare = replace(COUNTER, extra=extra)
        with accepting(UNANSWERABLE), bare.open() as instance, BareGuest(kvm, Probe()) as guest:
            with nothing_stays(), pytest.raises(UnansweredWeaknessError) as caught:
                instance.attach(guest)
            assert lacks.name.lower() in one_line(caught.value)


def test_answers_that_are_none(kvm: Kvm) -> None:
    for answered in (Weak.L1TF, Weak.MICROCODE, Weak.SIBLINGS, 1 << 5, 1 << 63):
        with kvm.create_vm() as vm:
            with pytest.raises(IoctlError) as caught:
                vm.enable_cap(calls.ELISA, uapi.lib.KVM_ELISA_CONTEXTS, 0, 0, answered)
            assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("text", ["l1tf,nonsense", "L1TF", "l1tf buffers", "allx", "l" * 4000])
def test_names_that_are_none(text: str) -> None:
    before = PARAMETER.read_text()
    with pytest.raises(OSError, match="Invalid argument"):
        PARAMETER.write_text(text)
    assert PARAMETER.read_text() == before


def test_the_parameter() -> None:
    for text, reads in (("all", "all"), ("buffers,l1tf", "l1tf,buffers"), (" \n", ""), (",", "")):
        with accepting(NONE):
            PARAMETER.write_text(text)
            assert PARAMETER.read_text() == f"{reads}\n"
