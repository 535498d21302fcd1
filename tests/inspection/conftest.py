"""Fixtures: a running machine, and one with a stub."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pykvm.inspection.gdb.server import GdbServer
from pykvm.kvm import Kvm
from tests.rigs.gdb_client import GdbClient
from tests.rigs.inspected.machine import InspectedMachine, NewMachine


@pytest.fixture
def new_machine(kvm: Kvm) -> Iterator[NewMachine]:
    """Function that starts a machine, which ends with the test."""
    with ExitStack() as stack:

        def make(**options: object) -> InspectedMachine:
            made = stack.enter_context(InspectedMachine(kvm, **options))  # type: ignore[arg-type]
            made.start()
            return made

        yield make


@pytest.fixture
def machine(new_machine: NewMachine) -> InspectedMachine:
    """Two vCPUs that count."""
    return new_machine(cpus=2)


@pytest.fixture
def stub(machine: InspectedMachine, tmp_path: Path) -> Iterator[Path]:
    """The socket of a stub for the machine."""
    path = tmp_path / "gdb"
    with GdbServer.on_unix_socket(machine, path):
        yield path


@pytest.fixture
def client(stub: Path) -> Iterator[GdbClient]:
    with GdbClient(stub) as connected:
        yield connected
