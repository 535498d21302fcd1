"""Small files in the formats of kernels, for tests of loaders."""

import struct
from collections.abc import Sequence

ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM = struct.Struct("<IIQQQQQQ")


def note(name: bytes, kind: int, content: bytes) -> bytes:
    """Return an ELF note."""
    padded = [part.ljust(-(-len(part) // 4) * 4, b"\0") for part in (name, content)]
    return struct.pack("<III", len(name), len(content), kind) + b"".join(padded)


PVH_NOTE = note(b"Xen\0", 18, (0x100_0000).to_bytes(4, "little"))


def elf(
    loads: Sequence[tuple[int, bytes, int]],
    notes: bytes = PVH_NOTE,
    *,
    machine: int = 62,
    ident: bytes = b"\x7fELF\x02\x01\x01",
) -> bytes:
    """Return an ELF file.

    Args:
        loads: physical address, bytes in the file and bytes in memory of each segment.
        notes: content of its segment of notes; none if empty.
        machine: its machine.
        ident: first bytes.
    """
    count = len(loads) + bool(notes)
    at = ELF_HEADER.size + count * PROGRAM.size
    programs, content = [], b""
    for physical, data, size in loads:
        offset = at + len(content)
        programs.append(PROGRAM.pack(1, 7, offset, physical, physical, len(data), size, 4096))
        content += data
    if notes:
        offset = at + len(content)
        programs.append(PROGRAM.pack(4, 4, offset, 0, 0, len(notes), len(notes), 4))
        content += notes
    header = ELF_HEADER.pack(
        *(ident.ljust(16, b"\0"), 2, machine, 1, 0, ELF_HEADER.size, 0, 0),
        *(ELF_HEADER.size, PROGRAM.size, count, 0, 0, 0),
    )
    return header + b"".join(programs) + content


def bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    xloadflags: int = 1,
    preferred: int = 0x100_0000,
    init_size: int = 0x10_0000,
    longest_line: int = 2047,
) -> bytes:
    """Return a bzImage with two sectors of setup, and `payload` behind 0x400 bytes of code."""
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    setup[0x201] = 0x6A
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<H", setup, 0x236, xloadflags)
    struct.pack_into("<I", setup, 0x238, longest_line)
    struct.pack_into("<II", setup, 0x248, 0x400, len(payload))
    struct.pack_into("<QI", setup, 0x258, preferred, init_size)
    return bytes(setup) + b"\x90" * 0x400 + payload


ELF32_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
PROGRAM32 = struct.Struct("<8I")


def elf32(
    loads: Sequence[tuple[int, bytes, int]],
    entry: int,
    *,
    head: bytes = b"",
    machine: int = 3,
    virtual: int = 0,
) -> bytes:
    """Return a 32-bit ELF file.

    Args:
        loads: physical address, bytes in the file and bytes in memory of each segment.
        entry: its entry point.
        head: bytes between the headers and the segments, such as a Multiboot header.
        machine: its machine.
        virtual: how far behind its physical address each segment is linked.
    """
    at = ELF32_HEADER.size + len(loads) * PROGRAM32.size + len(head)
    programs, content = [], b""
    for physical, data, size in loads:
        offset = at + len(content)
        programs.append(
            PROGRAM32.pack(1, offset, physical + virtual, physical, len(data), size, 7, 4096)
        )
        content += data
    header = ELF32_HEADER.pack(
        *(b"\x7fELF\x01\x01\x01".ljust(16, b"\0"), 2, machine, 1, entry, ELF32_HEADER.size, 0, 0),
        *(ELF32_HEADER.size, PROGRAM32.size, len(loads), 0, 0, 0),
    )
    return header + b"".join(programs) + head + content


def multiboot_header(flags: int = 3, *addresses: int) -> bytes:
    """Return a Multiboot header, with its address fields if there are any."""
    magic = 0x1BADB002
    words = (magic, flags, -(magic + flags) & 0xFFFF_FFFF, *addresses)
    return struct.pack(f"<{len(words)}I", *words)
