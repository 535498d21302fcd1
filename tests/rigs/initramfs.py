"""Initial RAM disks for Linux guests in tests."""

import platform
from pathlib import Path

from pykvm.machine.linux import cpio
from pykvm.toolchain import compiler

KERNEL = Path("/boot") / f"vmlinuz-{platform.release()}"
LINE = "quiet cryptomgr.notests panic=-1"
"""Kernel of the emulated host, and a command line with which it boots fast."""

_LINUX = Path(__file__).with_name("linux")


def init_program() -> bytes:
    """Return the program init.c, compiled or from the cache."""
    image = compiler.build("linux-init", [_LINUX / "init.c"], _LINUX / "init.ld")
    return image.read_bytes()


def initramfs() -> bytes:
    """Return an archive with `/init` and `/dev/console`."""
    return cpio.archive(
        cpio.directory("dev"),
        cpio.device("dev/console", 5, 1),
        cpio.file("init", init_program(), 0o755),
    )
