"""Guest memory as a vhost-user back end is given it: one table, or region by region.

Source: QEMU docs/interop/vhost-user.rst.
"""

from __future__ import annotations

from collections.abc import Sequence

from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.vhost_user_connection import BackendRefusedError, VhostUserConnection
from pykvm.devices.virtio.vhost_user_messages import CLASSIC_REGIONS, Request, SharedRegion
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import Region, RegionError

__all__ = ["VhostUserMemory"]


class VhostUserMemory:
    """Memory that a back end has mapped.

    Args:
        connection: the back end.
        slots: whether it takes single regions (CONFIGURE_MEM_SLOTS).

    Raises:
        BackendError: the back end is gone or hangs.
        MalformedMessageError: it answers rubbish.
    """

    def __init__(self, connection: VhostUserConnection, slots: bool) -> None:
        self._connection = connection
        self._slots = slots
        self._most = CLASSIC_REGIONS
        self._shared: dict[Region, SharedRegion] = {}
        if slots:
            self._most = messages.parse_number(connection.ask(Request.GET_MAX_MEM_SLOTS))

    def regions_of(self, memory: GuestMemory) -> list[Region]:
        """Return the regions that a back end can be given.

        Raises:
            RegionError: there is none.
            BackendRefusedError: there are more than the back end takes.
        """
        regions = [one for one in memory.regions if one.shareable and not one.read_only]
        if not regions:
            raise RegionError(
                f"no memory of the guest can be shared with {self._connection.name}",
                "make its regions with shareable=True",
            )
        if len(regions) > self._most:
            raise BackendRefusedError(
                f"{self._connection.name} takes {self._most} regions of memory, and the guest has "
                f"{len(regions)}",
                "give the guest less memory, or use another back end",
            )
        return regions

    def share(self, regions: Sequence[Region]) -> None:
        """Let the back end map `regions` and no others, while no ring is started.

        Raises:
            BackendError: the back end is gone, hangs, or refuses.
            MalformedMessageError: it answers rubbish.
        """
        wanted = {one: SharedRegion(one.gpa, one.size, one.offset, one.fd) for one in regions}
        if not self._slots:
            table = messages.memory_table(list(wanted.values()))
            self._connection.request(
                Request.SET_MEM_TABLE, table, [one.fd for one in wanted.values()]
            )
            return
        for region in [one for one in self._shared if one not in wanted]:
            gone = self._shared.pop(region)
            self._connection.request(Request.REM_MEM_REG, messages.memory_region(gone))
        for region, shared in wanted.items():
            if region not in self._shared:
                payload = messages.memory_region(shared)
                self._connection.request(Request.ADD_MEM_REG, payload, [shared.fd])
                self._shared[region] = shared
