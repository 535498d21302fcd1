"""The C compiler's layout of the boot information page against Python's."""

import ctypes
import re
from pathlib import Path

import pytest

from pykvm.machine.bare import boot_info
from pykvm.machine.bare.build import GUEST_INCLUDE
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain import compiler

pytestmark = pytest.mark.unit

STRUCTS = {
    "boot_info": boot_info.BootInfo,
    "boot_attachment": boot_info.BootAttachment,
    "boot_failure": boot_info.BootFailure,
    "elisa_env": boot_info.ElisaEnv,
}
CONSTANTS = {
    "GUEST_CONSOLE_PORT": boot_info.CONSOLE_PORT,
    "GUEST_FINISH_PORT": boot_info.FINISH_PORT,
    "GUEST_FAILURE_PORT": boot_info.FAILURE_PORT,
    "GUEST_MARK_PORT": boot_info.MARK_PORT,
    "BOOT_INFO_MAGIC": boot_info.MAGIC,
    "BOOT_ATTACHMENTS": boot_info.ATTACHMENTS,
    "BOOT_PARAMS": boot_info.PARAMS,
    "BOOT_RESULTS": boot_info.RESULTS,
}


def checks() -> list[str]:
    """Return a static assertion for each constant, size and member."""
    lines = [f'_Static_assert({c} == {v}ull, "{c}");' for c, v in CONSTANTS.items()]
    for name, structure in STRUCTS.items():
        size = ctypes.sizeof(structure)
        lines.append(f'_Static_assert(sizeof(struct {name}) == {size}, "{name}");')
        for field in structure._fields_:
            place: int = getattr(structure, field[0]).offset
            length = ctypes.sizeof(field[1])
            what = f"struct {name}, {field[0]}"
            lines.append(f'_Static_assert(__builtin_offsetof({what}) == {place}, "{what}");')
            member = f"((struct {name} *)0)->{field[0]}"
            lines.append(f'_Static_assert(sizeof({member}) == {length}, "{what}");')
    return lines


def test_same_layout(tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    source.write_text('#include "boot_info.h"\n' + "\n".join(checks()) + "\n")
    compiler.compile_source(source, tmp_path / "layout.o", include=GUEST_INCLUDE)


def test_no_member_is_missing() -> None:
    header = (GUEST_SOURCES / "bare" / "boot_info.h").read_text()
    for name in ("boot_info", "boot_attachment", "boot_failure"):
        body = re.search(rf"struct {name} {{(.*?)\n}};", header, re.DOTALL)
        assert body
        code = re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL)
        members = re.findall(r"(\w+)(?:\[\w+\])?;", code)
        assert members == [field[0] for field in STRUCTS[name]._fields_]


def test_the_comparison_notices(tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    wrong = [line.replace("== 8,", "== 9,", 1) for line in checks()]
    source.write_text('#include "boot_info.h"\n' + "\n".join(wrong) + "\n")
    with pytest.raises(compiler.CompileError, match="static assertion failed"):
        compiler.compile_source(source, tmp_path / "layout.o", include=GUEST_INCLUDE)


def test_the_page_holds_it() -> None:
    assert ctypes.sizeof(boot_info.BootInfo) <= 4096
