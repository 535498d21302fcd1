"""Fixtures: a guest that executes steps, and a VM for raw calls."""

from collections.abc import Iterator

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.context_requests import Machine, new_machine
from tests.rigs.probe import probe_guest


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Machine]:
    with new_machine(kvm) as machine:
        yield machine


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with probe_guest(kvm) as guest:
        yield guest
