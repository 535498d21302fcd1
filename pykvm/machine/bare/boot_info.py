"""Interface between the VMM and a bare-metal guest: one page, and four I/O ports.

It mirrors ``guest/bare/boot_info.h``; a test compares the two with the C compiler.
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
    """Environment of an object's function: ``struct elisa_env`` in ``elisa_object.h``.

    Attributes:
        shared: address of the object's shared memory.
        shared_size: bytes of it.
        windows: address of window 0.
        window_size: bytes of each window.
        id: number of the calling guest.
        guests: number of windows.
        vcpu: number of the calling vCPU in its guest.
        vcpus: most vCPUs of one guest that may be in the object at once.
    """

    shared: int
    shared_size: int
    windows: int
    window_size: int
    id: int
    guests: int
    vcpu: int
    vcpus: int

    _fields_ = (
        ("shared", ctypes.c_uint64),
        ("shared_size", ctypes.c_uint64),
        ("windows", ctypes.c_uint64),
        ("window_size", ctypes.c_uint64),
        ("id", ctypes.c_uint32),
        ("guests", ctypes.c_uint32),
        ("vcpu", ctypes.c_uint32),
        ("vcpus", ctypes.c_uint32),
    )


class BootAttachment(ctypes.LittleEndianStructure):
    """One attached object.

    Attributes:
        gate_slot: slot of its gate in the EPTP list; 0 if it is not attached with VMFUNC.
        window: address of the guest's window; 0 if it has none.
        window_size: bytes of the window.
    """

    gate_slot: int
    window: int
    window_size: int

    _fields_ = (
        ("gate_slot", ctypes.c_uint64),
        ("window", ctypes.c_uint64),
        ("window_size", ctypes.c_uint64),
    )


class BootFailure(ctypes.LittleEndianStructure):
    """A failed assertion, or an exception if `file` is 0.

    Attributes:
        file: address of the file's name in the guest.
        line: line in the file.
        expression: address of the asserted expression's text.
        left: left side of a comparison; an exception's vector.
        right: right side of a comparison; an exception's error code.
        rip: address of the instruction that caused an exception.
        cr2: CR2 at an exception.
    """

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
    """The page of information. The guest writes `result` and `failure`, the VMM everything else.

    Addresses are those of the guest (GVA), sizes are in bytes.

    Attributes:
        magic: `MAGIC`.
        vcpus: vCPUs of the guest.
        elisa_call: address of the entry page's function; 0 if nothing is attached.
        attachment: the attached objects.
        direct: environment for direct calls of an object that is linked into the guest.
        input: address of the program's input.
        input_size: its size.
        log: room for received frames.
        log_size: its size.
        samples: room for measurements.
        samples_size: its size.
        param: the program's parameters.
        result: the program's results.
        failure: why the program failed, on the vCPU that failed last.
    """

    magic: int
    vcpus: int
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
        ("vcpus", ctypes.c_uint64),
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
