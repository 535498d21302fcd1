"""What the attacks start from: a KVM, and a guest whose program leaps."""

from collections.abc import Iterator

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leaper
from tests.rigs.fixtures import counter, kvm, quiet

__all__ = ["counter", "guest", "kvm", "quiet"]


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with BareGuest(kvm, Leaper()) as guest:
        yield guest
