"""The page on which the VMM and a bare-metal guest tell each other things.

The same as guest/bare/boot_info.h: in tests/machine/bare/test_boot_info.py the C compiler compares.
"""

import ctypes
from typing import Final

__all__ = [
    "ATTACHMENTS",
    "CONSOLE_PORT",
    "FAILURE_PORT",
    "FINISH_PORT",
    "MAGIC",
    "MARK_PORT",
    "PARAMS",
    "RESULTS",
    "BootAttachment",
    "BootFailure",
    "BootInfo",
    "ElisaEnv",
]

CONSOLE_PORT: Final = 0xE9
FINISH_PORT: Final = 0xF0
FAILURE_PORT: Final = 0xF4
MARK_PORT: Final = 0xF8

MAGIC: Final = 0x304F464E49544F42  # "BOTINFO0"
ATTACHMENTS: Final = 4
PARAMS: Final = 16
RESULTS: Final = 16


class ElisaEnv(ctypes.LittleEndianStructure):
    """struct elisa_env of guest/include/elisa_object.h."""

    shared: int
    shared_size: int
    windows: int
    window_size: int
    id: int
    guests: int

    _fields_ = (
        ("shared", ctypes.c_uint64),
        ("shared_size", ctypes.c_uint64),
        ("windows", ctypes.c_uint64),
        ("window_size", ctypes.c_uint64),
        ("id", ctypes.c_uint32),
        ("guests", ctypes.c_uint32),
    )


class BootAttachment(ctypes.LittleEndianStructure):
    """One attached object: its gate's slot (0: none), the window's address and bytes."""

    gate_slot: int
    window: int
    window_size: int

    _fields_ = (
        ("gate_slot", ctypes.c_uint64),
        ("window", ctypes.c_uint64),
        ("window_size", ctypes.c_uint64),
    )


class BootFailure(ctypes.LittleEndianStructure):
    """A failed assertion, or an exception (file 0). Strings are addresses in the guest."""

    file: int
    line: int
    expression: int
    left: int
    right: int
    rip: int
    cr2: int

    _fields_ = (
        ("file", ctypes.c_uint64),
        ("line", ctypes.c_uint64),
        ("expression", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("right", ctypes.c_uint64),
        ("rip", ctypes.c_uint64),
        ("cr2", ctypes.c_uint64),
    )


class BootInfo(ctypes.LittleEndianStructure):
    """The whole page. The VMM writes all but `result` and `failure`, which the guest does.

    Addresses are the guest's, sizes are bytes. `param` and `result`: as the program says.
    """

    magic: int
    elisa_call: int
    attachment: ctypes.Array[BootAttachment]
    direct: ElisaEnv
    input: int
    input_size: int
    log: int
    log_size: int
    samples: int
    samples_size: int
    param: ctypes.Array[ctypes.c_uint64]
    result: ctypes.Array[ctypes.c_uint64]
    failure: BootFailure

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("elisa_call", ctypes.c_uint64),
        ("attachment", BootAttachment * ATTACHMENTS),
        ("direct", ElisaEnv),
        ("input", ctypes.c_uint64),
        ("input_size", ctypes.c_uint64),
        ("log", ctypes.c_uint64),
        ("log_size", ctypes.c_uint64),
        ("samples", ctypes.c_uint64),
        ("samples_size", ctypes.c_uint64),
        ("param", ctypes.c_uint64 * PARAMS),
        ("result", ctypes.c_uint64 * RESULTS),
        ("failure", BootFailure),
    )
