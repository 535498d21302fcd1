"""What a guest of any kind has to offer so that shared objects can be attached to it."""

from typing import Protocol

from pykvm.elisa.trusted_images import CrossingImages
from pykvm.kvm import Vcpu
from pykvm.memory.guest_memory import Region

__all__ = ["Guest"]


class Guest(Protocol):
    """A guest as `ObjectInstance.attach` sees it.

    `pykvm.machine.bare.guest.BareGuest` is one.
    """

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU that calls objects."""

    @property
    def crossing_gva(self) -> int:
        """Where the guest maps its entry page (see `pykvm.elisa.crossing`)."""

    @property
    def paging_levels(self) -> int:
        """Levels of the guest's paging: 4, or 5 with CR4.LA57."""

    def next_window_gpa(self) -> int:
        """Return where in the guest's memory the next object's window begins."""

    def join(self, images: CrossingImages, slot: int, window: Region | None, *, user: bool) -> None:
        """Map the guest's own pages of the crossing, show the window, announce the slot.

        The guest closes the window's region. user: the callers run in user mode.
        """
