"""T38, control: contexts on a processor whose weaknesses nobody has answered or accepted."""

import pytest

from pykvm.elisa import calls
from pykvm.kernel import weaknesses
from pykvm.kernel.weaknesses import NONE
from pykvm.kvm import Kvm
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.weaknesses import accepting

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]


@pytest.mark.control("T38")
def test_contexts_on_a_weak_processor(kvm: Kvm) -> None:
    assert weaknesses.present()
    with accepting(NONE), weakened(Weaken.PROCESSOR), kvm.create_vm() as vm:
        calls.enable_contexts(vm)
