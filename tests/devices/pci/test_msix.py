"""Message-signalled interrupts: what is raised while masked is pending, and nothing is lost."""

from collections.abc import Iterable

import pytest

from pykvm.devices.pci.function import PciFunction
from pykvm.devices.pci.msix import MsiRoutes, Msix, VectorsExhaustedError
from pykvm.kvm import IoctlError, IrqchipRoute, MsiRoute

pytestmark = pytest.mark.unit

ENABLE, MASK_ALL = 0x8000, 0x4000
ADDRESS = 0xFEE0_1000


class Kvm:
    """Records the calls; KVM itself is in tests of machines."""

    def __init__(self, routes: int = 64) -> None:
        self.limit = routes
        self.routes: list[IrqchipRoute | MsiRoute] = []
        self.irqfds: set[tuple[int, int]] = set()
        self.refuses = False

    def require(self, name: str, what: str) -> int:
        return self.limit

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        if self.refuses:
            raise IoctlError("KVM_SET_GSI_ROUTING", 22)
        self.routes = list(routes)

    def register_irqfd(self, eventfd: int, gsi: int) -> None:
        assert (eventfd, gsi) not in self.irqfds
        self.irqfds.add((eventfd, gsi))

    def unregister_irqfd(self, eventfd: int, gsi: int) -> None:
        self.irqfds.remove((eventfd, gsi))


class Function(PciFunction):
    def __init__(self, kvm: Kvm, vectors: int = 3) -> None:
        super().__init__((1, 2, 3, 4), 0xFF0000)
        self.add_bar(0x1000)
        pins = [IrqchipRoute(gsi, 2, gsi) for gsi in range(24)]
        self.msix = Msix(self, 0, vectors, MsiRoutes(kvm, pins))

    def control(self, value: int) -> None:
        self.write_config(0x42, value.to_bytes(2, "little"))
        self.msix.config_written()

    def entry(self, vector: int, address: int, data: int, masked: bool) -> None:
        self.msix.write(16 * vector, address.to_bytes(8, "little"))
        self.msix.write(16 * vector + 8, data.to_bytes(4, "little"))
        self.msix.write(16 * vector + 12, int(masked).to_bytes(4, "little"))

    def pending(self) -> int:
        return int.from_bytes(self.msix.read(0x800, 8), "little")


def test_a_vector_lives_while_nothing_masks_it() -> None:
    kvm = Kvm()
    function = Function(kvm)
    wanted = {(function.msix.eventfd(1), 25)}
    function.entry(1, ADDRESS, 0x31, masked=False)
    assert not kvm.irqfds
    function.control(ENABLE | MASK_ALL)
    assert not kvm.irqfds
    function.control(ENABLE)
    assert kvm.irqfds == wanted
    assert kvm.routes[24:] == [MsiRoute(25, ADDRESS, 0x31)]
    assert len(kvm.routes) == 25
    function.entry(1, ADDRESS, 0x32, masked=True)
    assert not kvm.irqfds
    function.entry(1, ADDRESS, 0x33, masked=False)
    assert kvm.irqfds == wanted
    assert kvm.routes[24:] == [MsiRoute(25, ADDRESS, 0x33)]
    function.msix.close()
    assert not kvm.irqfds
    function.msix.close()


def test_what_is_raised_while_masked_is_pending() -> None:
    function = Function(Kvm())
    function.control(ENABLE)
    function.msix.raise_vector(2)
    assert function.pending() == 4
    function.msix.write(0x800, b"\xff" * 8)
    assert function.pending() == 4
    function.entry(2, ADDRESS, 1, masked=False)
    assert function.pending() == 0  # KVM reads the eventfd from now on
    function.msix.close()


def test_an_address_that_kvm_refuses() -> None:
    kvm = Kvm()
    function = Function(kvm)
    function.control(ENABLE)
    kvm.refuses = True
    function.entry(0, 0xDEAD_0000_0000, 1, masked=False)
    assert not kvm.irqfds
    kvm.refuses = False
    function.entry(0, ADDRESS, 1, masked=False)
    assert kvm.irqfds
    function.msix.close()


def test_accesses_beyond_the_table() -> None:
    function = Function(Kvm())
    function.msix.write(16 * 3, b"\xff" * 8)
    function.msix.write(16 * 3 - 4, b"\0" * 8)
    assert function.msix.read(16 * 3 - 4, 8) == bytes(8)
    assert function.msix.read(0x7FC, 4) == bytes(4)
    assert function.msix.read(0xFFC, 4) == bytes(4)
    function.msix.close()


def test_more_vectors_than_kvm_routes() -> None:
    with pytest.raises(VectorsExhaustedError, match="26 interrupt vectors"):
        Function(Kvm(routes=26))
