"""Interface of guests of any kind, through which shared objects are attached to them."""

from collections.abc import Sequence
from typing import Protocol

from pykvm.elisa.attachment import Attachment
from pykvm.elisa.trusted_images import CrossingImages
from pykvm.kvm import Vcpu
from pykvm.memory.regions import Region

__all__ = ["Guest"]


class Guest(Protocol):
    """Guest to which objects can be attached, such as `pykvm.machine.bare.guest.BareGuest`."""

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """All vCPUs, in the order of their numbers. Each can call what is attached.

        A guest that adds a vCPU attaches it before it runs
        (`pykvm.elisa.attachment.attach_added_vcpu`).
        """

    @property
    def crossing_gva(self) -> int:
        """GVA at which the guest maps its entry page, see `pykvm.elisa.crossing`."""

    @property
    def paging_levels(self) -> int:
        """Levels of the guest's paging: 4, or 5 with CR4.LA57."""

    def next_window_gpa(self) -> int:
        """Return the GPA at which the next object's window begins."""

    def join(
        self, images: CrossingImages, attachment: Attachment, window: Region | None, *, user: bool
    ) -> None:
        """Map the guest's own pages of the crossing, show the window, announce the slot.

        Args:
            images: the pages.
            attachment: the attachment, which vCPUs that are added later join.
            window: the window, or None if the object has none; the guest closes it.
            user: whether the callers run in user mode.
        """
