"""The boot disk's sectors, read back independently."""

import struct
from pathlib import Path

import pytest

from pykvm.paging.entries import Access, X86Entry
from pykvm.paging.walk import walk
from pykvm.testbed import boot_disk
from pykvm.testbed.kernel_image import FlatKernel

pytestmark = pytest.mark.unit

_MEMORY = 512 << 20
OWN = Access.READ | Access.WRITE | Access.EXECUTE
_KERNEL = FlatKernel(0x100_0000, bytes(range(256)) * 40, 0x30_0000, 0x100_0850)


@pytest.mark.parametrize("levels", [4, 5])
def test_every_image_is_where_the_table_says(tmp_path: Path, levels: int) -> None:
    initramfs = b"initramfs" * 1000
    line = "quiet loglevel=6"
    boot_disk.write(tmp_path / "disk", _KERNEL, initramfs, line, _MEMORY, levels=levels)
    disk = (tmp_path / "disk").read_bytes()

    assert len(disk) % (16 * 63 * 512) == 0
    assert disk[510:512] == b"\x55\xaa"
    images = {}
    position = 0x180
    while True:
        address, sector, sectors = struct.unpack_from("<III", disk, position)
        position += 12
        if not address:
            break
        images[address] = disk[sector * 512 : (sector + sectors) * 512]
    parameters_at, entry, cr3, cr4 = struct.unpack_from("<IIII", disk, position)

    assert entry == _KERNEL.entry
    assert images[_KERNEL.address].startswith(_KERNEL.data)
    assert bool(cr4 & 1 << 12) == (levels == 5)  # CR4.LA57
    # struct boot_params (Linux arch/x86/include/uapi/asm/bootparam.h).
    parameters = images[parameters_at]
    assert parameters[0x202:0x206] == b"HdrS"
    start, size = struct.unpack_from("<II", parameters, 0x218)
    (command_line,) = struct.unpack_from("<I", parameters, 0x228)
    assert parameters[command_line - parameters_at :].startswith(b"quiet loglevel=6\0")
    assert size == len(initramfs)
    assert images[start].startswith(initramfs)
    assert start >= _KERNEL.address + _KERNEL.memory
    ranges = [
        struct.unpack_from("<QQI", parameters, 0x2D0 + 20 * i) for i in range(parameters[0x1E8])
    ]
    ram = [(base, base + length) for base, length, kind in ranges if kind == 1]
    assert max(end for _, end in ram) <= _MEMORY
    taken = [range(address, address + len(data)) for address, data in images.items()]
    for each in taken:
        assert any(base <= each.start and each.stop <= end for base, end in ram)
        others = (other for other in taken if other is not each)
        assert all(other.stop <= each.start or each.stop <= other.start for other in others)

    def read(gpa: int) -> tuple[int, ...]:
        (at,) = (address for address in images if 0 <= gpa - address < len(images[address]))
        return struct.unpack_from("<512Q", images[at], gpa - at)

    for address in (_KERNEL.entry, parameters_at, start):
        found = walk(cr3, address, X86Entry, read, levels=levels)
        assert found.target == address
        assert found.access & OWN == OWN


def test_kernel_and_initramfs_must_fit() -> None:
    with pytest.raises(boot_disk.BootDiskError, match="do not fit"):
        boot_disk.write(Path("/nowhere"), _KERNEL, b"", "", 32 << 20)


def test_command_line_must_fit(tmp_path: Path) -> None:
    with pytest.raises(boot_disk.BootDiskError, match="too long"):
        boot_disk.write(tmp_path / "disk", _KERNEL, b"", "x" * 4000, _MEMORY)
