"""A full disk is reported as such, whatever else a failing tool prints.

The disk is a small tmpfs in a process's own namespaces, which the emulator needs too: hence the
tier.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.testbed

_FAILS = """\
import subprocess, sys
from pathlib import Path
from pykvm import cache
from pykvm.errors import PykvmError

def build(directory):
    {how}

try:
    cache.entry("kind", "key", build)
except PykvmError as error:
    print(type(error).__name__)
    print(error.problem)
    print(error.next_step)
"""

_UNPACKER = """\
import sys
from pathlib import Path
from pykvm.errors import PykvmError
from pykvm.kernel.packages import Source
from pykvm.kernel.source_tree import unpack

try:
    unpack(Source("6.1", Path(sys.argv[1]), ""), None)
except PykvmError as error:
    print(type(error).__name__)
    print(error.problem)
    print(error.next_step)
"""


def run_on_a_small_disk(
    directory: Path, script: str, *arguments: str, variable: str = "PYKVM_CACHE", options: str
) -> list[str]:
    """Return the output of a Python script whose cache is on a small disk.

    Args:
        variable: environment variable that names the disk, if not the cache's.
        options: mount options of the tmpfs.
    """
    disk = directory / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} none "$1" && shift && exec "$@"'
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        [
            *("unshare", "--mount", *user, "sh", "-c", mount, "sh", str(disk)),
            *(sys.executable, "-c", script, *arguments),
        ],
        env={**os.environ, "PYKVM_CACHE": str(directory / "cache"), variable: str(disk)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "how",
    [
        "(directory / 'file').write_bytes(bytes(1 << 23))",
        "subprocess.run(['cp', '/dev/zero', directory / 'file'], check=True)",
        "(directory / 'f').write_bytes(bytes(4000 << 10)); raise PykvmError('another cause')",
    ],
    ids=["written", "copied", "blamed on something else"],
)
def test_a_full_cache(how: str, tmp_path: Path) -> None:
    told = run_on_a_small_disk(tmp_path, _FAILS.format(how=how), options="size=4m")
    assert told == [
        "DiskFullError",
        f"no space left for the cache at {tmp_path / 'disk'}",
        "free some, or set PYKVM_CACHE to a directory that has some",
    ]


def test_a_cache_without_room_for_another_file(tmp_path: Path) -> None:
    told = run_on_a_small_disk(tmp_path, _FAILS.format(how="pass"), options="nr_inodes=2")
    assert told[:2] == ["DiskFullError", f"no space left for the cache at {tmp_path / 'disk'}"]


def test_full_temporary_files(tmp_path: Path) -> None:
    how = "subprocess.run(['sh', '-c', 'cat /dev/zero > $TMPDIR/file'], check=True)"
    told = run_on_a_small_disk(
        tmp_path, _FAILS.format(how=how), variable="TMPDIR", options="size=1m"
    )
    assert told == [
        "DiskFullError",
        "no space left for temporary files",
        "free some, or set TMPDIR to a directory that has some",
    ]


def test_an_error_with_room_stays_what_it_is(tmp_path: Path) -> None:
    how = "raise PykvmError('another cause', 'do that')"
    told = run_on_a_small_disk(tmp_path, _FAILS.format(how=how), options="size=4m")
    assert told == ["PykvmError", "another cause", "do that"]


def test_nobody_is_told_to_install_the_source_again(tmp_path: Path) -> None:
    tree = tmp_path / "linux-source-6.1"
    (tree / "arch/x86/kvm").mkdir(parents=True)
    (tree / "arch/x86/kvm/large").write_bytes(bytes(8 << 20))
    tarball = tmp_path / "linux-source-6.1.tar.xz"
    subprocess.run(["tar", "-cJf", tarball, "-C", tmp_path, tree.name], check=True)
    told = run_on_a_small_disk(tmp_path, _UNPACKER, str(tarball), options="size=4m")
    assert told[:2] == ["DiskFullError", f"no space left for the cache at {tmp_path / 'disk'}"]
