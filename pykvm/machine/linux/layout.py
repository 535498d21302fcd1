"""Guest physical addresses and ports of a Linux machine.

RAM lies from 0 up to `RAM_HOLE`, and the rest of it from 4 GiB on. The hole holds the interrupt
controllers and what KVM keeps for itself.
"""

from typing import Final

from pykvm.sizes import GIB, KIB, MIB

__all__ = [
    "ACPI_GPA",
    "ACPI_SIZE",
    "BOOT_GDT_GPA",
    "BOOT_PARAMS_GPA",
    "BOOT_TABLES_GPA",
    "BOOT_TABLES_SIZE",
    "COMMAND_LINE_GPA",
    "COMMAND_LINE_SIZE",
    "EVENT_GSI",
    "FIRST_MEGABYTE",
    "GENERATION_GPA",
    "HIGH_RAM",
    "IDENTITY_MAP_GPA",
    "LOW_RAM_END",
    "MAX_CPUS",
    "MIN_MEMORY",
    "PCI_ECAM_GPA",
    "PCI_WINDOW_GPA",
    "PCI_WINDOW_SIZE",
    "RAM_HOLE",
    "RESET_PORT",
    "RESET_VALUE",
    "RESET_VECTOR_GPA",
    "SLEEP_CONTROL_PORT",
    "SLEEP_STATUS_PORT",
    "START_INFO_GPA",
    "TSS_GPA",
]

MAX_CPUS: Final = 64
MIN_MEMORY: Final = 64 * MIB

# ---- the first mebibyte ----
LOW_RAM_END: Final = 0x9_FC00
BOOT_GDT_GPA: Final = 0x5000
START_INFO_GPA: Final = 0x6000  # by the PVH protocol
BOOT_PARAMS_GPA: Final = 0x7000  # by the 64-bit protocol
BOOT_TABLES_GPA: Final = 0x8000
BOOT_TABLES_SIZE: Final = 0x8000
COMMAND_LINE_GPA: Final = 0x2_0000
COMMAND_LINE_SIZE: Final = 64 * KIB
ACPI_GPA: Final = 0xE_0000
ACPI_SIZE: Final = 128 * KIB  # with the reset vector at its end
GENERATION_GPA: Final = 0xF_E000  # a page near the end of what the tables may take
RESET_VECTOR_GPA: Final = 0xF_FFF0
FIRST_MEGABYTE: Final = 1 * MIB

# ---- above it ----
RAM_HOLE: Final = 3 * GIB
HIGH_RAM: Final = 4 * GIB
PCI_ECAM_GPA: Final = 0xC000_0000  # bus 0's configuration space
PCI_WINDOW_GPA: Final = 0xC100_0000  # base address registers
PCI_WINDOW_SIZE: Final = 16 * MIB
IDENTITY_MAP_GPA: Final = 0xFFFB_C000  # KVM's own, on Intel
TSS_GPA: Final = 0xFFFB_D000

# ---- ports ----
SLEEP_CONTROL_PORT: Final = 0x600
SLEEP_STATUS_PORT: Final = 0x601
RESET_PORT: Final = 0xCF9
RESET_VALUE: Final = 6

# ---- interrupts ----
EVENT_GSI: Final = 5  # of the event device; COM1 has 4
