"""Calls in a child process, with fewer rights or lower limits than this one."""

import ctypes
import os
import resource
import struct
from collections.abc import Callable

CAP_IPC_LOCK, CAP_SYS_ADMIN = 14, 21


def in_child(body: Callable[[], int], *, without: int | None = None, memlock: int = 0) -> int:
    """Return the result of body() in a child process; no exception escapes from the child.

    Args:
        without: number of a capability that the child drops.
        memlock: RLIMIT_MEMLOCK of the child in bytes; 0 keeps this process's.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer = -1000
        try:
            if memlock:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            if without is not None:
                _drop(without)
            answer = body()
        finally:
            os.write(writer, struct.pack("<q", answer))
            os._exit(0)
    os.close(writer)
    try:
        (answer,) = struct.unpack("<q", os.read(reader, 8))
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    assert answer != -1000, "the child failed"
    return int(answer)


def _drop(capability: int) -> None:
    # capget(2): struct __user_cap_header_struct version 3, then two of __user_cap_data_struct.
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << capability)  # effective
    data[1] &= ~(1 << capability)  # permitted
    assert libc.capset(header, data) == 0
