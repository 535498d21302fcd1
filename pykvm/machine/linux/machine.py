"""A machine that boots a Linux kernel: memory, processors, tables and devices around them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from pykvm.closeable import Closeable
from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.msix import MsiRoutes
from pykvm.devices.pci.pvpanic import Pvpanic
from pykvm.devices.ports import PortBus
from pykvm.devices.serial import COM1_IRQ, Serial
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.pci import VirtioPci
from pykvm.errors import PykvmError
from pykvm.inspection.vcpu_gate import PauseError, VcpuGate
from pykvm.kvm import Exit, Io, Kvm, MmioRead, MmioWrite, Shutdown, Vcpu
from pykvm.machine.linux import layout
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.devices import HostNetwork, configured_devices
from pykvm.machine.linux.loading import load_system
from pykvm.machine.linux.multiboot import MultibootImage
from pykvm.machine.linux.system_ports import SystemPorts
from pykvm.machine.x86 import acpi, interrupt_pins, long_mode
from pykvm.machine.x86.vm_generation import renew_generation
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region

if TYPE_CHECKING:
    from pykvm.snapshot.disks import SavedDisk
    from pykvm.snapshot.machine_state import StatefulDevice

__all__ = ["End", "LinuxMachine", "MachineCrashedError"]

# What a kernel says, on every console, before it resets the machine or stops.
_PANIC: Final = b"Kernel panic - not syncing"

_ONES: Final = b"\xff" * 8


class End(Enum):
    """Why a machine has ended."""

    POWER_OFF = "power off"
    RESET = "reset"
    PANIC = "kernel panic"
    STOPPED = "stopped"
    EXIT = "exit with a status"


class MachineCrashedError(PykvmError):
    """A guest that ended with a triple fault.

    Attributes:
        report: the processor's registers, its last instructions and its last exits.
    """

    def __init__(self, report: str) -> None:
        super().__init__("the guest ended with a triple fault", "see its report")
        self.report = report


class LinuxMachine(Closeable):
    """A machine, ready to run.

    Attributes:
        tell: called, from any thread, with a line for the user when a device is in trouble.
        exit_status: the status with which the guest has ended it, if the end is `End.EXIT`.

    Args:
        kvm: an open ``/dev/kvm``.
        config: what it is made of.
        output: descriptor to which its first serial port writes; None drops the output.
        memory: memory of a snapshot, for `restore`; the machine owns it, and boots no kernel.
        networks: the host's sides of its networks (`configured_networks`), for this machine alone;
            the caller closes them after it.

    Raises:
        KernelError: the kernel, the initial RAM disk or the command line cannot be used.
        MemoryTooSmallError: the host has not so much memory.
        KvmError: KVM refuses a call.
    """

    def __init__(
        self,
        kvm: Kvm,
        config: MachineConfig,
        output: int | None = None,
        memory: GuestMemory | None = None,
        networks: Sequence[HostNetwork] = (),
    ) -> None:
        self.config = config
        self.memory = memory or GuestMemory()
        self.vm = kvm.create_vm()
        self.serial = Serial(output)
        self.vcpus: list[Vcpu] = []
        self.ports = PortBus()
        self.exit_status = 0
        window = (layout.PCI_WINDOW_GPA, layout.PCI_WINDOW_SIZE)
        self.pci = PciBus(layout.PCI_ECAM_GPA, window)
        self.pci.add(Pvpanic(lambda: self._finish(End.PANIC)))
        self._system_ports = SystemPorts(self.ports, config, self.pci, self._exit)
        self._owned: list[Closeable] = []
        self._end: End | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._kvm = kvm
        self.gate = VcpuGate()
        self._paused = False
        self.tell: Callable[[str], object] = lambda text: None
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            if memory is None:
                self._make_memory()
            for slot in self.memory.slots():
                self.vm.set_memory_slot(slot)
            self.vm.set_identity_map_address(layout.IDENTITY_MAP_GPA)
            self.vm.set_tss_address(layout.TSS_GPA)
            self.vm.create_irqchip()
            self.serial.attach(self.vm.handlers)
            self.vm.register_irqfd(self.serial.interrupt, COM1_IRQ)
            self.vm.register_irqfd(self._events, layout.EVENT_GSI)
            self._routes = MsiRoutes(self.vm, interrupt_pins.default_routes())
            for made in configured_devices(config, self.memory, networks):
                self.add_device(made)
            for number in range(config.cpus):
                self._add_vcpu(number)
            if memory is None:
                kernel, info = load_system(config, self.memory)
                if isinstance(kernel, MultibootImage):
                    self._system_ports.add()
                kernel.start(self.vcpus[0], self.memory, info)
        except BaseException:
            self.close()
            raise

    # ---- construction -----------------------------------------------------------------------

    def _make_memory(self) -> None:
        size = self.config.memory
        low = min(size, layout.RAM_HOLE)
        parts = [(0, low)] + ([(layout.HIGH_RAM, size - low)] if size > low else [])
        for gpa, part in parts:
            with MemoryFile("ram", part) as file:
                # Servers of virtio devices, in processes of their own, map it too.
                self.memory.add(Region(file, gpa, shareable=True))

    def _add_vcpu(self, number: int) -> None:
        vcpu = self.vm.create_vcpu(number)
        cpuid = long_mode.supported_features(self._kvm, contexts=False, irqchip=True)
        long_mode.set_hypervisor(cpuid)
        long_mode.set_apic_id(cpuid, number)
        vcpu.set_cpuid2(cpuid)
        self.vcpus.append(vcpu)

    def add_device(self, device: VirtioDevice) -> None:
        """Put a virtio device on the PCI bus, before `run`. The machine closes it.

        Raises:
            PciBusFullError: there is no room.
            VectorsExhaustedError: KVM routes no more interrupts.
        """
        self._owned.append(device)
        function = VirtioPci(device, self._routes, self.vm)
        function.tell = self._tell
        for news in ("on_link_lost", "on_error"):
            if hasattr(device, news):
                setattr(device, news, self._tell)
        self._owned[-1] = function
        self.pci.add(function)

    def _tell(self, text: str) -> None:
        self.tell(text)

    # ---- running ----------------------------------------------------------------------------

    def run(self) -> End:
        """Run the machine until it ends; return why.

        Raises:
            MachineCrashedError: the guest ended with a triple fault.
            UnexpectedExitError: a processor left with an exit that no machine has a use for.
            PykvmError: see `Vcpu.run`.
        """
        threads = [
            threading.Thread(target=self._run_vcpu, args=(vcpu,), name=f"vcpu {vcpu.id}")
            for vcpu in self.vcpus
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.stop()
            for thread in threads:
                thread.join()
            raise
        if self._failure is not None:
            raise self._failure
        assert self._end is not None
        if self._end is End.RESET and _PANIC in self.serial.tail():
            return End.PANIC  # before a driver for pvpanic was there
        return self._end

    def stop(self) -> None:
        """End the machine as it is. From any thread."""
        self._finish(End.STOPPED)

    def _exit(self, status: int) -> None:
        with self._lock:
            if self._end is None:
                self.exit_status = status
        self._finish(End.EXIT)

    def _finish(self, end: End, failure: BaseException | None = None) -> None:
        with self._lock:
            if self._end is None:
                self._end, self._failure = end, failure
        self.serial.stop()
        self.gate.close()

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        def serve(exit: Exit) -> None:
            if (end := self._serve(vcpu, exit)) is not None:
                self._finish(end)

        try:
            self.gate.run(vcpu, serve)
        except BaseException as error:
            self._finish(End.STOPPED, error)

    def _serve(self, vcpu: Vcpu, exit: Exit) -> End | None:
        """Serve an exit that no device has served; return whether it ends the machine."""
        match exit:
            case Io(port=layout.SLEEP_CONTROL_PORT, is_write=True) if (
                exit.data[0] == acpi.POWER_OFF
            ):
                return End.POWER_OFF
            case Io(port=layout.RESET_PORT, is_write=True) if exit.data[0] == layout.RESET_VALUE:
                return End.RESET
            case Io(is_write=False):
                vcpu.reply(self.ports.serve(exit))
            case MmioRead():
                vcpu.reply(self.pci.read(exit.address, exit.size) or _ONES[: exit.size])
            case MmioWrite():
                self.pci.write(exit.address, exit.data)
            case Io():
                self.ports.serve(exit)
            case Shutdown():
                raise MachineCrashedError(vcpu.unexpected(exit).report)
            case _:
                raise vcpu.unexpected(exit)
        return None

    # ---- pausing, snapshots -----------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """True between `pause` and `resume`."""
        return self._paused

    def pause(self) -> None:
        """Let no processor run until `resume`; return when none does. Harmless twice.

        From any thread but those of the processors.

        Raises:
            PauseError: the machine has ended; or a processor does not stop, because nobody reads
                what it writes.
        """
        if not self._paused:
            self._park()
            self._paused = True

    def resume(self) -> None:
        """Undo `pause`. Harmless twice."""
        if self._paused:
            self._paused = False
            self.gate.resume()

    def _park(self) -> None:
        if self.gate.closed:
            raise PauseError("the machine has ended", "start it again")
        self.gate.pause()

    def snapshot(self, path: Path) -> int:
        """Write a snapshot to a new folder; return the bytes of memory that it holds beside zeros.

        The machine is paused meanwhile, and stays paused if it was.

        Raises:
            PykvmError: see `pause` and `pykvm.snapshot.machine_state.save_machine`.
        """
        from pykvm.snapshot.machine_state import save_machine  # noqa: PLC0415  (few runs need it)

        with self._parked(), self._quiet():
            return save_machine(
                path,
                machine=self.config.to_values(),
                vm=self.vm,
                vcpus=self.vcpus,
                memory=self.memory,
                devices=self._stateful(),
                disks=self._disks(),
            )

    @contextmanager
    def _parked(self) -> Iterator[None]:
        self._park()
        try:
            yield
        finally:
            self.gate.resume()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Let no device of the bus access guest memory meanwhile."""
        functions = self.pci.functions
        try:
            for function in functions:
                function.pause()
            yield
        finally:
            for function in functions:
                function.resume()

    @classmethod
    def restore(
        cls,
        kvm: Kvm,
        path: Path,
        output: int | None = None,
        add_devices: Callable[[Self], None] = lambda machine: None,
        *,
        networks: Callable[[MachineConfig], Sequence[HostNetwork]] = lambda config: (),
        shareable: bool = False,
    ) -> Self:
        """Return the machine of a snapshot, ready to run on from there.

        Args:
            kvm: an open ``/dev/kvm``.
            path: the folder.
            output: see `LinuxMachine`.
            add_devices: adds the devices that the saved machine had beside those of its
                configuration (`add_device`), in their order.
            networks: returns the host's sides of its networks, see `LinuxMachine`.
            shareable: whether memory is copied now, so that other processes can map it, as
                vhost-user needs. Otherwise it is read from the folder while it is used, and the
                folder must stay as it is.

        Raises:
            MachineConfigError: it is of another kind of machine.
            PykvmError: see `Snapshot` and `restore_state`.
        """
        from pykvm.snapshot.folder_reader import Snapshot  # noqa: PLC0415
        from pykvm.snapshot.machine_state import (  # noqa: PLC0415
            require_disks,
            require_same_disks,
            restore_state,
        )

        with Snapshot(path) as snapshot:
            require_disks(snapshot)
            config = MachineConfig.from_values(snapshot.contents.machine)
            memory = snapshot.copy_memory() if shareable else snapshot.map_memory()
            machine = cls(kvm, config, output, memory, networks(config))
            try:
                add_devices(machine)
                require_same_disks(snapshot, machine._disks())
                restore_state(snapshot, machine.vm, machine.vcpus, machine._stateful())
                renew_generation(machine.memory, layout.GENERATION_GPA)
                os.eventfd_write(machine._events, 1)
            except BaseException:
                machine.close()
                raise
            return machine

    def _stateful(self) -> dict[str, StatefulDevice]:
        functions = enumerate(self.pci.functions)
        ports = self._system_ports
        return {
            "com1": self.serial,
            "ports": ports,
            **{f"pci{n}": function for n, function in functions},
        }

    def _disks(self) -> list[SavedDisk]:
        """Return the disks as they are now."""
        from pykvm.snapshot.disks import SavedDisk  # noqa: PLC0415

        return [
            SavedDisk.of(f"pci{number}", path)
            for number, function in enumerate(self.pci.functions)
            if isinstance(function, VirtioPci)
            for path in function.device.disk_files()
        ]

    def close(self) -> None:
        """End the machine and give everything back. Harmless twice."""
        while self._owned:
            self._owned.pop().close()
        self.vm.close()
        events, self._events = self._events, -1
        if events >= 0:
            os.close(events)
        self.serial.close()
        self.memory.close()
