"""A machine with ELISA contexts is not saved: nobody could attach it to its objects again."""

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Kvm
from pykvm.snapshot.kvm_state import ContextsError, save_kvm
from tests.rigs.messages import one_line
from tests.rigs.probe import probe_guest

pytestmark = pytest.mark.elisa


def test_a_machine_with_contexts(kvm: Kvm, counter: ObjectInstance) -> None:
    with probe_guest(kvm) as guest:
        assert save_kvm(guest.vm, [guest.vcpu])["vcpus"]
        counter.attach(guest)
        with pytest.raises(ContextsError, match="elisa contexts") as caught:
            save_kvm(guest.vm, [guest.vcpu])
        one_line(caught.value)
