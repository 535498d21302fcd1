"""Initial RAM disks for Linux guests in tests."""

from collections.abc import Mapping
from pathlib import Path

from pykvm.toolchain import compiler

_LINUX = Path(__file__).with_name("linux")
_DIRECTORY, _FILE, _DEVICE = 0o040755, 0o100755, 0o020600


def init_program() -> bytes:
    """Return the program init.c, compiled or from the cache."""
    image = compiler.build("linux-init", [_LINUX / "init.c"], _LINUX / "init.ld")
    return image.read_bytes()


def initramfs(files: Mapping[str, bytes] | None = None) -> bytes:
    """Return an archive with `/init`, `/dev/console` and further files (cpio, newc).

    Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    entries = [_entry("dev", _DIRECTORY), _entry("dev/console", _DEVICE, device=(5, 1))]
    for name, content in {"init": init_program(), **(files or {})}.items():
        entries.append(_entry(name, _FILE, content))
    return b"".join([*entries, _entry("TRAILER!!!", 0)])


def _entry(
    name: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)
) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
