"""The boot disk: what its sectors say, read back independently; the initramfs, read by cpio."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pykvm.testbed import boot_disk
from pykvm.testbed.kernel_image import FlatKernel

pytestmark = pytest.mark.unit

_MEMORY = 512 << 20
_KERNEL = FlatKernel(0x100_0000, bytes(range(256)) * 40, 0x30_0000, 0x100_0850)


def test_every_image_is_where_the_table_says(tmp_path: Path) -> None:
    initramfs = b"initramfs" * 1000
    boot_disk.write(tmp_path / "disk", _KERNEL, initramfs, "quiet loglevel=6", _MEMORY)
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
    info_address, entry = struct.unpack_from("<II", disk, position)

    assert entry == _KERNEL.entry
    assert images[_KERNEL.address].startswith(_KERNEL.data)
    magic, version, _, modules, module_list, command_line, _, memory_map, entries = (
        struct.unpack_from("<IIIIQQQQI", images[info_address])
    )
    info = images[info_address]
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert info[command_line - info_address :].startswith(b"quiet loglevel=6\0")
    start, size = struct.unpack_from("<QQ", info, module_list - info_address)
    assert size == len(initramfs)
    assert images[start].startswith(initramfs)
    assert start >= _KERNEL.address + _KERNEL.memory
    ranges = [
        struct.unpack_from("<QQI", info, memory_map - info_address + 24 * i) for i in range(entries)
    ]
    ram = [(base, base + length) for base, length, kind in ranges if kind == 1]
    assert max(end for _, end in ram) <= _MEMORY
    for address, data in images.items():
        assert any(base <= address and address + len(data) <= end for base, end in ram)


def test_kernel_and_initramfs_must_fit() -> None:
    with pytest.raises(boot_disk.BootDiskError, match="do not fit"):
        boot_disk.write(Path("/nowhere"), _KERNEL, b"", "", 32 << 20)


def test_command_line_must_fit(tmp_path: Path) -> None:
    with pytest.raises(boot_disk.BootDiskError, match="too long"):
        boot_disk.write(tmp_path / "disk", _KERNEL, b"", "x" * 4000, _MEMORY)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio to read the archive with")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    files: list[tuple[str, bytes | None, int]] = [
        ("modules", None, 0o755),
        ("modules/a.ko", b"\x7fELF" + b"a" * 1001, 0o644),
        ("init", b"#!/busybox sh\n", 0o755),
        ("empty", b"", 0o600),
    ]
    archive = boot_disk.cpio(files)
    subprocess.run(["cpio", "-i", "--quiet"], cwd=tmp_path, input=archive, check=True)

    assert (tmp_path / "modules/a.ko").read_bytes() == files[1][1]
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "init", "modules"]
