"""T36, control: where registered memory is executable, a guest's bytes run in the sub context."""

import pytest

from pykvm.kvm import Kvm
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import give, results, run
from tests.rigs.registered_memory import run_memory, wild_guest

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]


@pytest.mark.control("T36")
def test_executable_memory_runs(kvm: Kvm) -> None:
    with weakened(Weaken.PARTS), wild_guest(kvm) as (guest, instance, attachment):
        give(guest, *run_memory(instance, attachment))
        assert run(guest) == []
        assert results(guest)[1] == 77
