"""Virtio over PCI: the registers by which a guest's driver sets up a device and its rings.

The registers are control path and served by Python. Notifications are not: a driver's are
ioeventfds, a device's are the eventfds of MSI-X vectors, and the data plane has both.

Source: VIRTIO 1.2, chapters 3 (status, features, set-up) and 4.1 (PCI).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from pykvm.closeable import Closeable
from pykvm.devices.pci.function import Bar, PciFunction, PciStateError
from pykvm.devices.pci.msix import MsiRoutes, Msix
from pykvm.devices.virtio.device import NO_CALL, DeviceType, Feature, Ring, VirtioDevice
from pykvm.devices.virtio.pci_state import (
    QUEUE_BITS,
    REGISTER_BITS,
    read_bases,
    read_flags,
    read_numbers,
)
from pykvm.errors import PykvmError
from pykvm.kvm.errors import KvmError

__all__ = ["Status", "VirtioPci"]

_VENDOR: Final = 0x1AF4
_FIRST_DEVICE: Final = 0x1040
_SUBSYSTEM: Final = 0x1100

_CLASSES: Final = {
    DeviceType.NET: 0x02_00_00,  # Ethernet controller
    DeviceType.BLOCK: 0x01_80_00,  # other mass storage controller
    DeviceType.CONSOLE: 0x07_80_00,  # other communication controller
    DeviceType.VSOCK: 0x07_80_00,
    DeviceType.FS: 0x01_80_00,
}
_OTHER_CLASS: Final = 0xFF_00_00

# ---- the structures in the first BAR (4.1.4), a page each ----
_BAR_SIZE: Final = 0x4000
_COMMON: Final = 0x0000
_ISR: Final = 0x1000
_DEVICE: Final = 0x2000
_NOTIFY: Final = 0x3000
_PAGE: Final = 0x1000
_NOTIFY_MULTIPLIER: Final = 4
_MSIX_BAR_SIZE: Final = 0x1000

_VENDOR_CAPABILITY: Final = 0x09
_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE, _CFG_PCI = 1, 2, 3, 4, 5

NO_VECTOR: Final = 0xFFFF


class Status:
    """Bits of the device status (2.1)."""

    ACKNOWLEDGE: Final = 1
    DRIVER: Final = 2
    DRIVER_OK: Final = 4
    FEATURES_OK: Final = 8
    NEEDS_RESET: Final = 64
    FAILED: Final = 128


class _Ioevents(Protocol):
    def register_ioevent(self, eventfd: int, address: int, size: int) -> None: ...
    def unregister_ioevent(self, eventfd: int, address: int, size: int) -> None: ...


@dataclass(slots=True)
class _Queue:
    """A queue as its driver is setting it up."""

    most: int
    kick: int
    size: int = 0
    vector: int = NO_VECTOR
    enabled: bool = False
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    ioevent_at: int | None = None  # GPA where `kick` is registered

    def reset(self) -> None:
        self.size, self.vector, self.enabled = self.most, NO_VECTOR, False
        self.descriptors = self.driver = self.device = 0


@dataclass(slots=True)
class _Registers:
    """Registers of the common structure that belong to no queue."""

    device_feature_select: int = 0
    driver_feature_select: int = 0
    driver_features: int = 0
    config_vector: int = NO_VECTOR
    status: int = 0
    generation: int = 0
    queue_select: int = 0
    bases: dict[int, int] = field(default_factory=dict)


# Registers of the common structure (4.1.4.3): offset, size, name. Those behind the selector are the
# selected queue's; an address may be written in halves or at once.
_COMMON_QUEUE_SELECT: Final = 0x16
_COMMON_REGISTERS: Final = {
    0x00: (4, "device_feature_select"),
    0x04: (4, "device_feature"),
    0x08: (4, "driver_feature_select"),
    0x0C: (4, "driver_feature"),
    0x10: (2, "config_vector"),
    0x12: (2, "num_queues"),
    0x14: (1, "status"),
    0x15: (1, "generation"),
    0x16: (2, "queue_select"),
    0x18: (2, "size"),
    0x1A: (2, "vector"),
    0x1C: (2, "enabled"),
    0x1E: (2, "notify_off"),
    0x20: (4, "descriptors low"),
    0x24: (4, "descriptors high"),
    0x28: (4, "driver low"),
    0x2C: (4, "driver high"),
    0x30: (4, "device low"),
    0x34: (4, "device high"),
}
_QUEUE_REGISTERS: Final = frozenset(
    name for offset, (_, name) in _COMMON_REGISTERS.items() if offset > _COMMON_QUEUE_SELECT
)


class VirtioPci(PciFunction, Closeable):
    """A device of a PCI bus. It owns the device and closes it.

    Attributes:
        device: the device.
        tell: called, from any thread, with a line for the user when the device has failed.

    Args:
        device: the device.
        routes: the VM's routes of interrupts.
        ioevents: the VM.

    Raises:
        VectorsExhaustedError: KVM routes no more interrupts.
    """

    def __init__(self, device: VirtioDevice, routes: MsiRoutes, ioevents: _Ioevents) -> None:
        ids = (_VENDOR, _FIRST_DEVICE + device.type, _VENDOR, _SUBSYSTEM)
        super().__init__(ids, _CLASSES.get(device.type, _OTHER_CLASS))
        self.device = device
        self.tell: Callable[[str], object] = lambda text: None
        self._vm = ioevents
        self._failed = False
        self._started = self._paused = False
        self._registers = _Registers()
        # A plain number: the complement of an IntFlag has only the bits that it names.
        self._offered = int(device.features | Feature.VERSION_1)
        bar, msix_bar = self.add_bar(_BAR_SIZE), self.add_bar(_MSIX_BAR_SIZE)
        count = len(device.queue_sizes) + 1
        self.msix = Msix(self, msix_bar.index, count, routes)
        self._queues = [
            _Queue(most, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            for most in device.queue_sizes
        ]
        for queue in self._queues:
            queue.reset()
        notify = struct.pack("<I", _NOTIFY_MULTIPLIER)
        for kind, at, more in (
            (_CFG_COMMON, _COMMON, b""),
            (_CFG_NOTIFY, _NOTIFY, notify),
            (_CFG_ISR, _ISR, b""),
            (_CFG_DEVICE, _DEVICE, b""),
        ):
            body = struct.pack("<BBB3xII", 16 + len(more), kind, bar.index, at, _PAGE)
            self.add_capability(_VENDOR_CAPABILITY, body + more)
        # A window to the BARs in configuration space, for firmware (4.1.4.9).
        body = struct.pack("<BBB3xII4x", 20, _CFG_PCI, bar.index, 0, 0)
        writable = bytes(2) + b"\xff" + bytes(3) + b"\xff" * 12
        self._window = self.add_capability(_VENDOR_CAPABILITY, body, writable)
        device.on_failure = self._fail
        device.on_config = self._config_changed

    # ---- what the device says, from any thread ----------------------------------------------

    def _fail(self, reason: str) -> None:
        self._failed = True
        self.tell(f"a {self.device.type.name.lower()} device has failed: {reason}")
        self._config_changed()

    def _config_changed(self) -> None:
        registers = self._registers
        registers.generation = (registers.generation + 1) & 0xFF
        vector = registers.config_vector
        if vector < self.msix.count and registers.status & Status.DRIVER_OK:
            self.msix.raise_vector(vector)

    # ---- BARs and configuration space -------------------------------------------------------

    def read_bar(self, bar: Bar, offset: int, size: int) -> bytes:
        """Return what a register holds; zeros where none is, or across two."""
        if bar.index:
            return self.msix.read(offset, size)
        page, offset = offset & -_PAGE, offset & _PAGE - 1
        if page == _COMMON:
            return b"".join(
                self._get(name).to_bytes(n, "little") for n, name in _covered(offset, size)
            ).ljust(size, b"\0")
        if page == _DEVICE:
            return self.device.config()[offset : offset + size].ljust(size, b"\0")
        return bytes(size)

    def write_bar(self, bar: Bar, offset: int, data: bytes) -> None:
        """Take a write to a register; nothing happens where none is, or across two."""
        if bar.index:
            self.msix.write(offset, data)
            return
        page, offset = offset & -_PAGE, offset & _PAGE - 1
        if page == _COMMON:
            for n, name in _covered(offset, len(data)):
                self._set(name, int.from_bytes(data[:n], "little"))
                data = data[n:]
        elif page == _DEVICE:
            self.device.write_config(offset, data)
        elif page == _NOTIFY and offset // _NOTIFY_MULTIPLIER < len(self._queues):
            # Only where the ioeventfd could not be registered.
            os.eventfd_write(self._queues[offset // _NOTIFY_MULTIPLIER].kick, 1)

    def bar_moved(self, bar: Bar) -> None:
        """Let KVM serve notifications where the guest has put them."""
        if bar.index:
            return
        for number, queue in enumerate(self._queues):
            if queue.ioevent_at is not None:
                self._vm.unregister_ioevent(queue.kick, queue.ioevent_at, 0)
                queue.ioevent_at = None
            if bar.gpa is None:
                continue
            at = bar.gpa + _NOTIFY + number * _NOTIFY_MULTIPLIER
            try:
                self._vm.register_ioevent(queue.kick, at, 0)
                queue.ioevent_at = at
            except KvmError:
                pass  # the guest has put two BARs there; whoever came first is notified

    def read_config(self, offset: int, size: int) -> bytes:
        """Return bytes of the configuration space."""
        data = self._window + 16
        if offset == data and (access := self._windowed()):
            bar, at, width = access
            return self.read_bar(bar, at, width)[:size].ljust(size, b"\0")
        return super().read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a guest's write to the configuration space."""
        super().write_config(offset, data)
        if offset == self._window + 16 and (access := self._windowed()):
            bar, at, width = access
            self.write_bar(bar, at, data[:width])
        self.msix.config_written()

    def _windowed(self) -> tuple[Bar, int, int] | None:
        """Return BAR, offset and size of an access by the window, if the guest has set it well."""
        bar, offset, size = struct.unpack_from("<B3xII", self._config, self._window + 4)
        if bar >= len(self.bars) or size not in (1, 2, 4) or offset % size:
            return None
        if offset + size > self.bars[bar].size:
            return None
        return self.bars[bar], offset, size

    # ---- registers of the common structure --------------------------------------------------

    @property
    def _queue(self) -> _Queue | None:
        number = self._registers.queue_select
        return self._queues[number] if number < len(self._queues) else None

    def _get(self, name: str) -> int:
        registers = self._registers
        match name:
            case "device_feature":
                return _half(self._offered, registers.device_feature_select)
            case "driver_feature":
                return _half(registers.driver_features, registers.driver_feature_select)
            case "num_queues":
                return len(self._queues)
            case "status":
                return registers.status | (Status.NEEDS_RESET if self._failed else 0)
            case _ if name in _QUEUE_REGISTERS:
                return self._get_queue(name)
        return int(getattr(registers, name))

    def _get_queue(self, name: str) -> int:
        queue = self._queue
        if queue is None:
            return NO_VECTOR if name == "vector" else 0
        match name:
            case "notify_off":
                return self._registers.queue_select
            case "size" | "vector" | "enabled":
                return int(getattr(queue, name))
        address, half = name.split()
        return _half(getattr(queue, address), int(half == "high"))

    def _set(self, name: str, value: int) -> None:
        registers = self._registers
        match name:
            case "status":
                self._set_status(value)
            case "driver_feature":
                if not registers.status & Status.FEATURES_OK:
                    registers.driver_features = _with_half(
                        registers.driver_features, registers.driver_feature_select, value
                    )
            case "config_vector":
                registers.config_vector = value if value < self.msix.count else NO_VECTOR
            case "device_feature_select" | "driver_feature_select" | "queue_select":
                setattr(registers, name, value)
            case _ if name in _QUEUE_REGISTERS:
                if self._queue is not None and not self._started:
                    self._set_queue(self._queue, name, value)

    def _set_queue(self, queue: _Queue, name: str, value: int) -> None:
        match name:
            case "size":
                if 1 <= value <= queue.most:
                    queue.size = value
            case "vector":
                queue.vector = value if value < self.msix.count else NO_VECTOR
            case "enabled":
                queue.enabled = queue.enabled or value == 1
            case "notify_off":
                pass
            case _:
                address, half = name.split()
                changed = _with_half(getattr(queue, address), int(half == "high"), value)
                setattr(queue, address, changed)

    def _set_status(self, value: int) -> None:
        registers = self._registers
        if value == 0:
            self.reset()
            return
        added = value & ~registers.status
        if added & Status.FEATURES_OK and not self._suits(registers.driver_features):
            value &= ~Status.FEATURES_OK
        registers.status = (registers.status | value) & ~Status.NEEDS_RESET
        if added & Status.DRIVER_OK and registers.status & Status.FEATURES_OK:
            self._start()

    def _suits(self, features: int) -> bool:
        """Return whether a driver may go on with these features."""
        return not features & ~self._offered and bool(features & Feature.VERSION_1)

    # ---- the data plane ---------------------------------------------------------------------

    def _start(self) -> None:
        self._started = True
        split = not self._registers.driver_features & Feature.RING_PACKED
        if split and any(queue.enabled and queue.size & queue.size - 1 for queue in self._queues):
            self._fail("a split ring whose size is no power of 2")
            return
        rings = [
            Ring(
                index=number,
                size=queue.size,
                descriptors=queue.descriptors,
                driver=queue.driver,
                device=queue.device,
                base=self._registers.bases.get(number, self._first_base),
                kick=queue.kick,
                call=NO_CALL if queue.vector == NO_VECTOR else self.msix.eventfd(queue.vector),
            )
            for number, queue in enumerate(self._queues)
            if queue.enabled
        ]
        try:
            self.device.start(self._registers.driver_features, rings)
        except PykvmError as error:
            self._fail(str(error))

    @property
    def _first_base(self) -> int:
        """Where a ring begins: of a packed one, both wrap counters are 1 (2.8.1)."""
        packed = self._registers.driver_features & Feature.RING_PACKED
        return 1 << 15 | 1 << 31 if packed else 0

    def reset(self) -> None:
        """Put the device into the state that it had when it was made."""
        self.device.stop()
        self._started = self._failed = False
        self._registers = _Registers(generation=self._registers.generation)
        for queue in self._queues:
            queue.reset()
            with suppress(BlockingIOError):
                os.eventfd_read(queue.kick)

    # ---- snapshots, while no vCPU runs --------------------------------------------------------

    def pause(self) -> None:
        """Stop the data plane when everything that it has taken is done."""
        if self._started and not self._paused:
            self._registers.bases = self.device.stop()
            self._paused = True

    def resume(self) -> None:
        """Let the data plane go on where it was."""
        if self._paused and not self._failed:
            self._start()
        self._paused = False

    def save(self) -> dict[str, Any]:
        """Return the state of a paused device, as values for JSON.

        Raises:
            DeviceStateError: a snapshot cannot hold it.
        """
        registers, queues = self._registers, self._queues
        return {
            **super().save(),
            "msix": self.msix.save(),
            "registers": {name: getattr(registers, name) for name in REGISTER_BITS},
            "bases": [list(pair) for pair in registers.bases.items()],
            "queues": [
                {**{name: getattr(queue, name) for name in QUEUE_BITS}, "enabled": queue.enabled}
                for queue in queues
            ],
            "started": self._started,
            "failed": self._failed,
            "device": self.device.save(),
        }

    def restore(self, state: Any) -> None:
        """Set the state of a new device, and start its data plane if it was started.

        Raises:
            PciStateError: it is of another device, or of one that offered more.
            DeviceStateError: the device refuses its own part.
        """
        super().restore(state)
        registers, started, failed = self._read_registers(state)
        saved = state.get("queues")
        if not isinstance(saved, list) or len(saved) != len(self._queues):
            raise PciStateError("queues")
        vectors = [registers.config_vector]
        for queue, values in zip(self._queues, saved, strict=True):
            for name, value in read_numbers(values, QUEUE_BITS).items():
                setattr(queue, name, value)
            (queue.enabled,) = read_flags(values, ("enabled",))
            if not 1 <= queue.size <= queue.most:
                raise PciStateError("size")
            vectors += [queue.vector] if queue.enabled else []
        for vector in (registers.config_vector, *(queue.vector for queue in self._queues)):
            if vector >= self.msix.count and vector != NO_VECTOR:
                raise PciStateError("vector")
        self._registers, self._failed, self._started = registers, failed, started
        self.device.restore(state.get("device"))
        self.msix.restore(state.get("msix"))
        if started and not failed:
            self._start()
        # What was under way between driver and device is in nobody's state: tell both once more.
        for queue in self._queues:
            if queue.enabled:
                os.eventfd_write(queue.kick, 1)
        for vector in vectors:
            if vector != NO_VECTOR and registers.status & Status.DRIVER_OK:
                self.msix.raise_vector(vector)

    def _read_registers(self, state: Any) -> tuple[_Registers, bool, bool]:
        """Return saved registers, and whether the device was started and has failed."""
        registers = _Registers()
        for name, value in read_numbers(state.get("registers"), REGISTER_BITS).items():
            setattr(registers, name, value)
        registers.bases = read_bases(state.get("bases"), len(self._queues))
        started, failed = read_flags(state, ("started", "failed"))
        agreed = registers.status & Status.FEATURES_OK
        if agreed and not self._suits(registers.driver_features):
            raise PciStateError("the driver uses features that this device has not")
        if started and not (agreed and registers.status & Status.DRIVER_OK):
            raise PciStateError("started")
        return registers, started, failed

    def close(self) -> None:
        """Stop and close the device, and give notifications and interrupts back."""
        self.device.close()
        for queue in self._queues:
            if queue.ioevent_at is not None and not self.inherited:
                self._vm.unregister_ioevent(queue.kick, queue.ioevent_at, 0)
            os.close(queue.kick)
        self._queues = []
        self.msix.close()


def _covered(offset: int, size: int) -> list[tuple[int, str]]:
    """Return the whole registers that an access covers; none if it covers a part of one."""
    found = []
    while size > 0 and (register := _COMMON_REGISTERS.get(offset)) and register[0] <= size:
        found.append(register)
        offset += register[0]
        size -= register[0]
    return found if not size else []


def _half(value: int, which: int) -> int:
    return value >> 32 * which & 0xFFFF_FFFF if which < 2 else 0


def _with_half(value: int, which: int, half: int) -> int:
    if which > 1:
        return value
    return value & ~(0xFFFF_FFFF << 32 * which) | half << 32 * which
