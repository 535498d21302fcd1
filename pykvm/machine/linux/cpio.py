"""Archives that Linux unpacks into its first root file system (cpio, "newc").

Each function but `archive` returns an entry. Several archives may follow one another.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

__all__ = ["archive", "device", "directory", "file"]

_DIRECTORY, _FILE, _DEVICE = 0o040000, 0o100000, 0o020000


def directory(name: str, mode: int = 0o755) -> bytes:
    """Return a directory; it comes before what is in it."""
    return _entry(name, _DIRECTORY | mode)


def file(name: str, content: bytes, mode: int = 0o644) -> bytes:
    """Return a regular file."""
    return _entry(name, _FILE | mode, content)


def device(name: str, major: int, minor: int, mode: int = 0o600) -> bytes:
    """Return a character device."""
    return _entry(name, _DEVICE | mode, numbers=(major, minor))


def archive(*entries: bytes) -> bytes:
    """Return an archive of entries."""
    return b"".join([*entries, _entry("TRAILER!!!", 0)])


def _entry(name: str, mode: int, content: bytes = b"", numbers: tuple[int, int] = (0, 0)) -> bytes:
    # One link each: no two entries are the same file, so that inode numbers do not matter.
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *numbers, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
