"""A guest's memory and a back end in Python, for the tests of the vhost-user front end."""

from collections.abc import Iterator

import pytest

from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import GIB, MIB
from tests.rigs.vhost_user_backend import VhostUserBackend


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Low and high memory of a guest, and two regions that are nobody else's."""
    with GuestMemory() as made:
        with MemoryFile("ram", 4 * MIB) as file:
            made.add(Region(file, 0, size=MIB, shareable=True))
            made.add(Region(file, 4 * GIB, offset=MIB, size=2 * MIB, shareable=True))
            made.add(Region(file, 8 * GIB, offset=3 * MIB, shareable=True, read_only=True))
        with MemoryFile("window", MIB) as file:
            made.add(Region(file, 16 * GIB))
        yield made


@pytest.fixture
def backend() -> Iterator[VhostUserBackend]:
    with VhostUserBackend() as made:
        yield made
