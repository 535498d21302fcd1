"""Fixtures for all tests, as a pytest plugin; folders add their own in conftest.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.kvm import Kvm
from pykvm.resources import GUEST_SOURCES
from tests.rigs.host_state import quiet_kernel

# hypothesis otherwise allows 200 ms for each example, which a busy host may exceed.
settings.register_profile("pykvm", deadline=None)
settings.load_profile("pykvm")


@pytest.fixture(scope="module", autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that the tests of a file on the patched KVM leave no trouble in the kernel's log."""
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
def counter() -> Iterator[ObjectInstance]:
    source = GUEST_SOURCES / "objects" / "counter.c"
    with SharedObject("counter", source, guests=4).open() as instance:
        yield instance


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache instead of the user's; its directory does not exist yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("PYKVM_CACHE", str(directory))
    return directory
