"""What the attacks start from: a KVM, and a guest whose program leaps."""

from collections.abc import Iterator

import pytest

from pykvm.boot.bare import BareGuest
from pykvm.kvm import Kvm
from tests.attacks.leap import Leaper
from tests.elisa.host_state import quiet_kernel


@pytest.fixture(scope="module", autouse=True)
def _quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """No attack leaves trouble in the kernel's log."""
    if request.node.get_closest_marker("elisa") is None:
        yield
        return
    with quiet_kernel():
        yield


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with BareGuest(kvm, Leaper()) as guest:
        yield guest
