"""Fixture for a guest that runs leap.c."""

from collections.abc import Iterator

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leaper


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with BareGuest(kvm, Leaper()) as guest:
        yield guest
