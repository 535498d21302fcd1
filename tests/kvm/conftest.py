"""Fixtures: a VM, and a tiny real-mode guest in it."""

from collections.abc import Iterator

import pytest

from pykvm.kvm import Kvm, Vm
from tests.rigs.real_mode import RealModeGuest


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as handle:
        # Without "unrestricted guest" in the processor, real mode needs three pages for a TSS.
        handle.set_tss_address(0xFFFBD000)
        yield handle


@pytest.fixture
def guest(vm: Vm) -> RealModeGuest:
    return RealModeGuest(vm)
