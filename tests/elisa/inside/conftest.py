"""Fixtures: a guest that records its interrupts, and an object that holds it until released."""

from collections.abc import Iterator

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.spinning import event_guest, spin_object


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with event_guest(kvm) as guest:
        yield guest


@pytest.fixture
def instance() -> Iterator[ObjectInstance]:
    with spin_object().open() as instance:
        yield instance
