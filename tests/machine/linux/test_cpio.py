"""pykvm.machine.linux.cpio: archives, read by cpio itself."""

import subprocess
from pathlib import Path

import pytest

from pykvm.machine.linux import cpio

pytestmark = pytest.mark.unit


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    content = b"\x7fELF" + b"a" * 1001
    archive = cpio.archive(
        cpio.directory("modules"),
        cpio.file("modules/a.ko", content),
        cpio.file("init", b"#!/busybox sh\n", 0o755),
        cpio.file("empty", b"", 0o600),
    )
    subprocess.run(["cpio", "-i", "--quiet"], cwd=tmp_path, input=archive, check=True)
    assert (tmp_path / "modules/a.ko").read_bytes() == content
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "init", "modules"]


def test_a_device() -> None:
    entry = cpio.device("dev/console", 5, 1)
    assert entry[14:22] == b"00002180"
    assert entry[78:94] == b"0000000500000001"
    assert len(entry) % 4 == 0
