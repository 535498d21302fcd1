"""Fixtures of the tests of networks."""

from collections.abc import Iterator

import pytest

from tests.rigs.network_namespace import NetworkNamespace


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A network namespace that the test is in; what the test made must be gone at its end."""
    made = NetworkNamespace()
    before = set(made.interfaces())
    with made.entered():
        yield made
    assert set(made.interfaces()) == before
    made.close()
