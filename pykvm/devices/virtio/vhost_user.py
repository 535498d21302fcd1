"""Virtio devices whose data plane is another process: a vhost-user front end for any back end.

The front end hands over guest memory and eventfds; from then on driver and back end meet in memory,
and no request passes through this process. `VhostUserConnection.connect` finds a back end that
somebody else has started.

Source: QEMU docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.device import NO_CALL, DeviceType, Feature, Ring, VirtioDevice
from pykvm.devices.virtio.ring_memory import check_rings
from pykvm.devices.virtio.vhost_user_connection import (
    BackendFailedError,
    BackendRefusedError,
    VhostUserConnection,
)
from pykvm.devices.virtio.vhost_user_memory import VhostUserMemory
from pykvm.devices.virtio.vhost_user_messages import ProtocolFeature, Request
from pykvm.devices.virtio.vhost_user_watch import VhostUserWatch
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["PASSED_ON", "VhostUserDevice"]

_PROTOCOL_FEATURES: Final = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, a bit that virtio leaves unused."""

_OF_THE_TYPE: Final = (1 << 24) - 1
"""Feature bits that a type of device defines (VIRTIO 1.2, 2.2)."""

PASSED_ON: Final = _OF_THE_TYPE | (
    Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED | Feature.IN_ORDER
)
"""Features of a back end that can be offered to a driver: no transport has to know of them."""


class VhostUserDevice(VirtioDevice):
    """A virtio device of a vhost-user back end.

    Args:
        type: what the driver is told that it is.
        connection: the back end; the device owns it from now on, and closes it if it fails.
        memory: the guest's. The back end is given its shareable, writable regions at each start.
        queue_sizes: the most descriptors of each queue.
        features: the part of `PASSED_ON` that may be offered.
        config_size: bytes of configuration that come from the back end; 0 for a device that
            overrides `config`.
        process: what has to be closed after the connection.

    Raises:
        BackendError: the back end is gone, hangs, or lacks what the device needs.
        MalformedMessageError: it answers rubbish.
    """

    def __init__(
        self,
        type: DeviceType,
        connection: VhostUserConnection,
        memory: GuestMemory,
        *,
        queue_sizes: Sequence[int],
        features: int = PASSED_ON,
        config_size: int = 0,
        process: Closeable | None = None,
    ) -> None:
        super().__init__()
        self.type = type
        self.queue_sizes = tuple(queue_sizes)
        self._connection = connection
        self._memory = memory
        self._process = process
        self._config = bytes(config_size)
        self._config_is_old = config_size > 0
        self._failure = ""
        self._closed = False
        self._lock = threading.Lock()
        self._started: tuple[Ring, ...] = ()
        self._was_started = False
        # Back ends write to the eventfd of a ring whose driver polls; some do not bear its absence.
        self._nobody = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch = VhostUserWatch(
            connection.fileno(), connection.name, self._gone, self._config_changed
        )
        try:
            offered = self._negotiate()
            self.features = offered & features & PASSED_ON
            self._shared = VhostUserMemory(
                connection, self._protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS != 0
            )
            self.config()
            self._raise_failure()
        except BaseException:
            self.close()
            raise
        self._watch.start()

    def _negotiate(self) -> int:
        """Agree on the protocol; return the back end's virtio features."""
        connection = self._connection
        connection.request(Request.SET_OWNER)
        offered = messages.parse_number(connection.ask(Request.GET_FEATURES))
        if not offered & Feature.VERSION_1:
            self._refuse("virtio 1.0")
        self._protocol = ProtocolFeature(0)
        self._has_protocol = bool(offered & _PROTOCOL_FEATURES)
        if self._has_protocol:
            known = messages.parse_number(connection.ask(Request.GET_PROTOCOL_FEATURES))
            self._protocol = ProtocolFeature(known & _WANTED)
            if not self._protocol & ProtocolFeature.CONFIG:
                self._protocol &= ~ProtocolFeature.BACKEND_REQ
            connection.request(Request.SET_PROTOCOL_FEATURES, messages.number(self._protocol))
            connection.acknowledges = ProtocolFeature.REPLY_ACK in self._protocol
        if self._config and ProtocolFeature.CONFIG not in self._protocol:
            self._refuse("a configuration (the protocol feature CONFIG)")
        if ProtocolFeature.MQ in self._protocol:
            queues = messages.parse_number(connection.ask(Request.GET_QUEUE_NUM))
            if queues < len(self.queue_sizes):
                self._refuse(f"{len(self.queue_sizes)} queues (it has {queues})")
        if ProtocolFeature.BACKEND_REQ in self._protocol:
            with self._watch.open_channel() as channel:
                connection.request(Request.SET_BACKEND_REQ_FD, fds=[channel.fileno()])
        return offered

    def _refuse(self, lacking: str) -> None:
        raise BackendRefusedError(
            f"{self._connection.name} does without {lacking}", "use another back end"
        )

    # ---- configuration ------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return the configuration: the back end's, or its last one if it has failed."""
        if self._config_is_old and not self._failure:
            self._config_is_old = False
            size = len(self._config)
            try:
                payload = self._connection.ask(Request.GET_CONFIG, messages.config(0, bytes(size)))
                self._config = messages.parse_config(payload, 0, size)
            except PykvmError as error:
                self.fail(str(error))
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand what the driver writes to the back end."""
        if self._failure or not data or not 0 <= offset <= len(self._config) - len(data):
            return
        try:
            self._connection.request(Request.SET_CONFIG, messages.config(offset, data))
        except BackendRefusedError:
            pass  # read-only: the driver's write has no effect
        except PykvmError as error:
            self.fail(str(error))
        self._config_is_old = True

    def _config_changed(self) -> None:
        self._config_is_old = True
        self.on_config()

    # ---- data plane ---------------------------------------------------------------------------

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Hand the rings to the back end.

        Raises:
            RingAddressError: a ring is not in memory that the back end can be given.
            BackendError: the back end is gone, hangs, or refuses something.
            MalformedMessageError: it answers rubbish.
            RegionError: no memory of the guest can be shared.
        """
        self.require_own(f"start of {self._connection.name}")
        self._raise_failure()
        regions = self._shared.regions_of(self._memory)
        check_rings(rings, features, self.queue_sizes, regions)
        connection = self._connection
        if self._was_started and not any(ring.base & 0x7FFF_7FFF for ring in rings):
            self._reset()
        self._was_started = True
        accepted = features & self.features | Feature.VERSION_1
        accepted |= _PROTOCOL_FEATURES if self._has_protocol else 0
        connection.request(Request.SET_FEATURES, messages.number(accepted))
        self._shared.share(regions)
        try:
            for ring in rings:
                self._started += (ring,)
                self._start_ring(ring)
            if not connection.acknowledges:
                connection.ask(Request.GET_FEATURES)  # after it all requests before are done
        except BaseException:
            self.stop()
            raise
        for ring in rings:
            os.eventfd_write(ring.kick, 1)  # what was made available before may not be kicked again

    def _start_ring(self, ring: Ring) -> None:
        connection = self._connection
        index = ring.index
        call = self._nobody if ring.call == NO_CALL else ring.call
        addresses = messages.ring_addresses(index, ring.descriptors, ring.device, ring.driver)
        file = messages.ring_file(index)
        connection.request(Request.SET_VRING_NUM, messages.ring_state(index, ring.size))
        connection.request(Request.SET_VRING_BASE, messages.ring_state(index, ring.base))
        connection.request(Request.SET_VRING_ADDR, addresses)
        connection.request(Request.SET_VRING_ERR, file, [self._watch.error])
        connection.request(Request.SET_VRING_CALL, file, [call])
        connection.request(Request.SET_VRING_KICK, file, [ring.kick])  # starts the ring
        if self._has_protocol:
            connection.request(Request.SET_VRING_ENABLE, messages.ring_state(index, 1))

    def _reset(self) -> None:
        """Reset a back end whose driver begins anew."""
        if ProtocolFeature.RESET_DEVICE in self._protocol:
            self._connection.request(Request.RESET_DEVICE)

    def stop(self) -> dict[int, int]:
        """Take the rings back; nothing comes from a back end that has failed."""
        rings, self._started = self._started, ()
        bases = {}
        try:
            for ring in rings:
                if self._failure:
                    return {}
                asked = messages.ring_state(ring.index, 0)
                reply = self._connection.ask(Request.GET_VRING_BASE, asked)
                bases[ring.index] = messages.parse_ring_state(reply, ring.index)
        except PykvmError as error:
            self.fail(str(error))
            return {}
        return bases

    # ---- its end ------------------------------------------------------------------------------

    def _gone(self, reason: str) -> None:
        self.fail(self._connection.explain() or reason)

    def fail(self, reason: str) -> None:
        """Take note that the back end cannot go on; tell it once. From any thread."""
        with self._lock:
            if self._failure or self._closed:
                return
            self._failure = reason
        self.on_failure(reason)

    def _raise_failure(self) -> None:
        if self._failure:
            raise BackendFailedError(self._failure, "start the machine again")

    def close(self) -> None:
        """Close the connection. Harmless twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._watch.close()
        self._connection.close()
        if self._process is not None:
            self._process.close()
        os.close(self._nobody)


_WANTED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
