"""Huge pages for memory that is allocated in pages of 4 KiB.

Windows of an object are placed at any page, so its memory cannot come from a pool of huge pages
(hugetlbfs), which maps nothing smaller. Here the kernel is asked to back the memory with
transparent huge pages now, whatever is configured for the system. Where it cannot, because memory
is fragmented or the kernel is older than Linux 6.1, the pages stay small: everything works, and
takes more table pages.

Sources: madvise(2), MADV_COLLAPSE; Linux Documentation/admin-guide/mm/transhuge.rst.
"""

import ctypes
import mmap
from typing import Final

from pykvm.memory.regions import HUGE_2M, MemoryFile

__all__ = ["collapse"]

_MADV_POPULATE_READ: Final = 22  # linux/mman.h, since Linux 5.14
_MADV_COLLAPSE: Final = 25  # linux/mman.h, since Linux 6.1; not in the mmap module
_MAP_FIXED: Final = 0x10  # not in the mmap module before Python 3.13
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def collapse(file: MemoryFile) -> bool:
    """Back each whole 2 MiB of a file with a huge page, as far as the kernel can.

    Contents stay, and so do mappings. Pages that somebody has pinned are left as they are.

    Args:
        file: the file; one that has huge pages already stays as it is.

    Returns:
        Whether every whole 2 MiB has a huge page now.
    """
    size = file.size - file.size % HUGE_2M
    if not size or file.page_size != mmap.PAGESIZE:
        return True
    # The mapping must be aligned as the file's pages are, so it is placed within a larger one.
    room = size + HUGE_2M
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    start = _libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start == _FAILED:
        return False
    try:
        aligned = -(-start // HUGE_2M) * HUGE_2M
        mapped = _libc.mmap(aligned, size, protection, mmap.MAP_SHARED | _MAP_FIXED, file.fd, 0)
        if mapped == _FAILED:
            return False
        # A block without any page counts as truncated, and is not collapsed.
        for at in range(aligned, aligned + size, HUGE_2M):
            if _libc.madvise(at, mmap.PAGESIZE, _MADV_POPULATE_READ):
                return False
        return bool(_libc.madvise(aligned, size, _MADV_COLLAPSE) == 0)
    finally:
        _libc.munmap(start, room)
