"""What a virtio device over PCI asks of KVM, recorded, and where its registers are."""

from collections.abc import Iterable

from pykvm.kvm import IoctlError, IrqchipRoute, MsiRoute

ECAM, WINDOW = 0xC000_0000, (0xC100_0000, 0x10_0000)
COMMON, ISR, CONFIG, NOTIFY = (WINDOW[0] + at for at in (0, 0x1000, 0x2000, 0x3000))
TABLE = WINDOW[0] + 0x4000


class Kvm:
    """Records what the transport asks of KVM."""

    def __init__(self) -> None:
        self.ioevents: dict[tuple[int, int], int] = {}
        self.irqfds: set[tuple[int, int]] = set()

    def require(self, name: str, what: str) -> int:
        return 64

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        pass

    def register_irqfd(self, eventfd: int, gsi: int) -> None:
        self.irqfds.add((eventfd, gsi))

    def unregister_irqfd(self, eventfd: int, gsi: int) -> None:
        self.irqfds.remove((eventfd, gsi))

    def register_ioevent(self, eventfd: int, address: int, size: int) -> None:
        if (address, size) in self.ioevents:
            raise IoctlError("KVM_IOEVENTFD", 17)
        self.ioevents[address, size] = eventfd

    def unregister_ioevent(self, eventfd: int, address: int, size: int) -> None:
        assert self.ioevents.pop((address, size)) == eventfd
