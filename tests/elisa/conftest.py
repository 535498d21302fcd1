"""What tests on the patched KVM share."""

from collections.abc import Iterator

import pytest

from pykvm.kvm import Kvm
from tests.elisa.context_requests import Machine, new_machine
from tests.elisa.host_state import quiet_kernel


@pytest.fixture(scope="module", autouse=True)
def _quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of a whole file on the patched KVM leaves trouble in the kernel's log."""
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
def machine(kvm: Kvm) -> Iterator[Machine]:
    with new_machine(kvm) as machine:
        yield machine
