"""Contents of a machine's memory when it starts: kernel, initial RAM disks, and ACPI tables."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from typing import Final

from pykvm.devices.pci.bus import ECAM_SIZE
from pykvm.devices.serial import COM1_IRQ, COM1_PORT
from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import (
    BootInfo,
    Kernel,
    KernelError,
    MemoryKind,
    MemoryRange,
    open_file,
    read_into,
)
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.kernel_file import KernelFile
from pykvm.machine.x86 import acpi, aml
from pykvm.machine.x86.event_device import event_device
from pykvm.machine.x86.vm_generation import generation_device, renew_generation
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import PAGE_SIZE

__all__ = ["load_system"]

# mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt. With reduced hardware Linux resets by
# EFI, and without that by a jump to the reset vector in real mode (arch/x86/kernel/reboot.c).
_RESET_CODE: Final = struct.pack(
    "<BHBBBB", 0xBA, layout.RESET_PORT, 0xB0, layout.RESET_VALUE, 0xEE, 0xF4
)


def load_system(config: MachineConfig, memory: GuestMemory) -> tuple[Kernel, BootInfo]:
    """Put the kernel and all that it is told about into memory that is zero.

    Args:
        config: the machine's configuration.
        memory: the machine's memory, as the configuration has it.

    Returns:
        The kernel, and the information with which it is started.

    Raises:
        KernelError: the kernel, an initial RAM disk or the command line cannot be used.
    """
    with KernelFile(config.kernel, unpack=config.unpack) as file:
        kernel = file.kernel
        kernel.load(memory)
    line = os.fsencode(config.command_line)
    longest = min(kernel.longest_line, layout.COMMAND_LINE_SIZE - 1)
    if len(line) > longest:
        raise KernelError(
            f"a command line of {len(line)} bytes, {config.kernel.name} takes {longest}",
            "give a shorter one",
        )
    memory.write(layout.COMMAND_LINE_GPA, line + b"\0")
    tables = acpi.build_tables(
        layout.ACPI_GPA, range(config.cpus), _ports(), _devices(), layout.PCI_ECAM_GPA
    )
    memory.write(layout.ACPI_GPA, tables.data)
    memory.write(layout.RESET_VECTOR_GPA, _RESET_CODE)
    renew_generation(memory, layout.GENERATION_GPA)
    return kernel, BootInfo(
        _ranges(config),
        command_line=layout.COMMAND_LINE_GPA,
        rsdp=tables.rsdp,
        initrd=_load_initrds(config, memory, kernel.end),
    )


def _load_initrds(
    config: MachineConfig, memory: GuestMemory, kernel_end: int
) -> tuple[int, int] | None:
    """Put the initial RAM disks to the end of low memory, where no kernel unpacks itself."""
    if not config.initrds:
        return None
    with ExitStack() as stack:
        files = []
        for path in config.initrds:
            descriptor = open_file(path)
            stack.callback(os.close, descriptor)
            files.append((descriptor, path.name, os.fstat(descriptor).st_size))
        # An archive begins at a multiple of 4 bytes.
        total = sum((size + 3) & ~3 for _, _, size in files)
        end = min(config.memory, layout.RAM_HOLE)
        gpa = (end - total) // PAGE_SIZE * PAGE_SIZE
        at = gpa
        for descriptor, name, size in files:
            if not size or gpa < kernel_end:
                raise KernelError(
                    f"{name} has {size} bytes, which do not fit behind the kernel",
                    "give the guest more memory" if size else "give another file",
                )
            read_into(descriptor, 0, memory.view(at, size), name)
            at += (size + 3) & ~3
    return gpa, total


def _ranges(config: MachineConfig) -> list[MemoryRange]:
    low = min(config.memory, layout.RAM_HOLE)
    ranges = [
        MemoryRange(0, layout.LOW_RAM_END, MemoryKind.RAM),
        MemoryRange(layout.ACPI_GPA, layout.ACPI_SIZE, MemoryKind.ACPI),
        MemoryRange(layout.FIRST_MEGABYTE, low - layout.FIRST_MEGABYTE, MemoryKind.RAM),
        MemoryRange(layout.PCI_ECAM_GPA, ECAM_SIZE, MemoryKind.RESERVED),
    ]
    if config.memory > low:
        ranges.append(MemoryRange(layout.HIGH_RAM, config.memory - low, MemoryKind.RAM))
    return ranges


def _ports() -> acpi.Ports:
    return acpi.Ports(
        sleep_control=layout.SLEEP_CONTROL_PORT,
        sleep_status=layout.SLEEP_STATUS_PORT,
        reset=layout.RESET_PORT,
        reset_value=layout.RESET_VALUE,
    )


def _devices() -> bytes:
    window = (layout.PCI_WINDOW_GPA, layout.PCI_WINDOW_SIZE)
    bus = acpi.pci_root(layout.PCI_ECAM_GPA, ECAM_SIZE, window)
    serial = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.ports(COM1_PORT, 8), aml.interrupt(COM1_IRQ))),
    )
    generation = generation_device(layout.GENERATION_GPA)
    return bus + serial + generation + event_device({layout.EVENT_GSI: "\\_SB.VGEN"})
