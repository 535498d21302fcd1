"""The syzkaller description of the calls agrees with the header.

syzkaller is no Debian package, so its own compiler of descriptions is not run here. The tests
compare every constant of the const file with the C compiler's value, every constant that the
description uses with the const file, and size and offset of every field of every struct that both
have. They read the few types that the description uses; any other is an error.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pykvm.resources import KERNEL_PATCHES

pytestmark = pytest.mark.unit

HEADER = KERNEL_PATCHES / "files/include/uapi/linux/kvm_elisa.h"
DESCRIPTION = KERNEL_PATCHES / "syzkaller/dev_kvm_elisa.txt"
CONSTANTS = DESCRIPTION.with_suffix(".txt.const")

STRUCTS = (
    "kvm_elisa_create",
    "kvm_elisa_memory",
    "kvm_elisa_part",
    "kvm_elisa_slot",
    "kvm_elisa_revoke",
)
PAGES = ("kvm_elisa_page_user", "kvm_elisa_page_list", "kvm_elisa_page_eptp", "kvm_elisa_page_any")


def from_compiler(expressions: list[str], directory: Path) -> list[int]:
    """Return the values of C expressions, with linux/kvm.h and the patch's header."""
    lines = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({one}));' for one in expressions)
    source, program = directory / "values.c", directory / "values"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        f'#include "{HEADER}"\nint main(void)\n{{\n{lines}\n\treturn 0;\n}}\n'
    )
    subprocess.run(["cc", "-o", str(program), str(source)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def constants() -> dict[str, int]:
    lines = CONSTANTS.read_text().splitlines()
    assert lines[1] == "arches = amd64"
    return {name: int(value) for name, value in (line.split(" = ") for line in lines[2:])}


def structs() -> dict[str, list[tuple[str, str]]]:
    """Return the fields of every struct of the description as (name, type)."""
    found = {}
    for name, body in re.findall(r"^(\w+) \{\n(.*?)^\}", DESCRIPTION.read_text(), re.M | re.S):
        fields = (line.strip().split("\t", 1) for line in body.splitlines())
        found[name] = [(field, kind.strip()) for field, kind in fields]
    return found


def size_of(kind: str) -> int:
    """Return the size in bytes of a type of the description."""
    if match := re.fullmatch(r"array\[(.*), (\d+)\]", kind):
        return size_of(match[1]) * int(match[2])
    if match := re.fullmatch(r"(?:const|flags|len)\[\w+, int(\d+)\]", kind):
        return int(match[1]) // 8
    if match := re.fullmatch(r"int(\d+)(?:\[.*\])?", kind):
        return int(match[1]) // 8
    if kind.startswith(("ptr64[", "vma64[")):
        return 8
    if kind in ("fd_kvm_elisa", "fd_kvm_elisa_memory"):
        return 4  # resource fd is an int32
    raise AssertionError(f"size of {kind} is not known here")


def test_constants_are_the_headers(tmp_path: Path) -> None:
    known = constants()
    assert list(known.values()) == from_compiler(list(known), tmp_path)


def test_every_constant_that_is_used_is_there() -> None:
    text = re.sub(r"#.*", "", DESCRIPTION.read_text())
    used = set(re.findall(r"\bKVM_\w+", re.sub(r"ioctl\$\w+", "", text)))
    assert used == set(constants())


def test_every_call_and_flag_of_the_header_is_described() -> None:
    defined = set(re.findall(r"#define\s+(KVM_ELISA_\w+)\s+_IO", HEADER.read_text()))
    assert len(defined) >= 3
    text = DESCRIPTION.read_text()
    for name in defined:
        assert f"ioctl${name}(" in text
        assert f"const[{name}]" in text


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_laid_out_as_in_the_header(name: str, tmp_path: Path) -> None:
    compare(structs()[name], name, tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_all_kinds_of_pages(name: str, tmp_path: Path) -> None:
    compare(structs()[name], "kvm_elisa_page", tmp_path)


def compare(fields: list[tuple[str, str]], struct: str, directory: Path) -> None:
    at, ours = 0, []
    for _, kind in fields:
        ours.append(at)
        at += size_of(kind)
    places = [f"offsetof(struct {struct}, {field})" for field, _ in fields]
    values = from_compiler([*places, f"sizeof(struct {struct})"], directory)
    assert values == [*ours, at]


def test_the_capability(tmp_path: Path) -> None:
    fields = structs()["kvm_enable_cap_elisa"]
    (size,) = from_compiler(["sizeof(struct kvm_enable_cap)"], tmp_path)
    assert sum(size_of(kind) for _, kind in fields) == size


def test_a_table_is_one_page() -> None:
    found = structs()
    fields = [re.search(r"int64:(\d+)", kind) for _, kind in found["kvm_elisa_entry"]]
    assert sum(int(field[1]) if field else 0 for field in fields) == 64
    entries, rest = (kind for _, kind in found["kvm_elisa_table"])
    assert entries == "array[kvm_elisa_entry, 8]"
    assert 8 * 8 + size_of(rest) == 4096
