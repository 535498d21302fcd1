"""An input is a file that is given as a kernel.

It is refused in one line, or it loads: inside of memory, above the machine's own tables, and with
its entry point in what was loaded. A packed kernel is unpacked, or refused in one line.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.machine.linux.boot import BootInfo, MemoryKind, MemoryRange
from pykvm.machine.linux.bzimage import BzImage
from pykvm.machine.linux.compression import compression_of, decompress_payload
from pykvm.machine.linux.elf_kernel import ElfKernel
from pykvm.machine.linux.kernel_file import KernelFile
from pykvm.machine.linux.multiboot import MultibootImage
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import MIB, PAGE_SIZE
from tests.rigs.messages import one_line

MEMORY = 4 * MIB
INFO = BootInfo(
    [MemoryRange(0, 640 << 10, MemoryKind.RAM), MemoryRange(MIB, 3 * MIB, MemoryKind.RAM)],
    command_line=0x2_0000,
    rsdp=0xE_0000,
    initrd=(3 * MIB, 99),
)
_BY_PROGRAMS = ("lz4", "zstd", "lzop")  # a process for each would take all the time


def try_input(data: bytes) -> None:
    descriptor = os.memfd_create("kernel", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        with KernelFile(Path(f"/proc/self/fd/{descriptor}")) as file:
            kernel = file.kernel
            assert 0 <= kernel.longest_line < 1 << 32
            assert kernel.end > 0
            if isinstance(kernel, BzImage):
                _check_bzimage(kernel, data)
            with MemoryFile("ram", MEMORY) as ram, GuestMemory() as memory:
                memory.add(Region(ram, 0, shareable=True))
                kernel.load(memory)
                _check_loaded(kernel, ram.fd)
                assert not any(memory.read(kernel.end, -kernel.end % PAGE_SIZE))
    except PykvmError as error:
        if "become shorter" in one_line(error):
            raise AssertionError("it was believed before it was read") from error
    finally:
        os.close(descriptor)


def _check_loaded(kernel: object, ram: int) -> None:
    assert isinstance(kernel, BzImage | ElfKernel | MultibootImage)
    assert MIB < kernel.end <= MEMORY
    if not isinstance(kernel, BzImage):
        assert MIB <= kernel.entry < kernel.end
    with contextlib.suppress(OSError):  # there is nothing but zeros
        assert os.lseek(ram, 0, os.SEEK_DATA) >= MIB
        hole = -(-kernel.end // PAGE_SIZE) * PAGE_SIZE
        if hole < MEMORY:
            found = os.lseek(ram, hole, os.SEEK_DATA)
            raise AssertionError(f"{found:#x} was written, behind the end at {kernel.end:#x}")


def _check_bzimage(kernel: BzImage, data: bytes) -> None:
    params = kernel._params(INFO)
    assert len(params) == PAGE_SIZE
    assert params[0x1E8] == len(INFO.ranges)
    assert params[:0x1F1].count(0) >= 0x1F1 - 32  # nothing of the file's boot sector
    payload = kernel.payload()
    assert len(payload) == int.from_bytes(data[0x24C:0x250], "little")
    if compression_of(payload) not in _BY_PROGRAMS:
        decompress_payload(payload, "kernel")
