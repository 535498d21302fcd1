"""Builds of bare-metal guests, and the errors of builds that fail."""

from pathlib import Path

import pytest

from pykvm.machine.bare import build, layout
from pykvm.machine.bare.build import build_guest
from pykvm.measure.programs import (
    BurstProgram,
    CrossingProgram,
    ExchangeProgram,
    Phase,
    SwitchPath,
    Way,
)
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain import compiler, elf
from tests.rigs.odd_names import ODD_NAMES
from tests.rigs.sources import GUESTS, OBJECTS

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

MAIN = '#include "runtime.h"\nuint32_t guest_main(void) { %s }\n'


@pytest.mark.parametrize(
    "program",
    [
        CrossingProgram(1, [Way.EMPTY]),
        ExchangeProgram(SwitchPath.DIRECT, 1),
        BurstProgram(SwitchPath.DIRECT, bytes(6), bytes(6), [Phase(64, 1, 1)]),
    ],
    ids=["crossing", "exchange", "burst"],
)
def test_every_program_builds(program: CrossingProgram | ExchangeProgram | BurstProgram) -> None:
    image = program.image()
    assert image.entry == layout.IMAGE_GPA
    for segment in image.segments:
        assert segment.address % 4096 == 0
        assert segment.address + segment.size <= layout.IMAGE_END_GPA
        assert not (segment.flags & elf.PF_W and segment.flags & elf.PF_X)


SOURCES = [
    source
    for directory in (GUEST_SOURCES, GUESTS, OBJECTS)
    for source in sorted(directory.rglob("*.[cS]"))
    if source.parent.name != "crossing"  # it needs the crossing's own offsets
    and source.parent != GUEST_SOURCES / "linux"  # programs with a C library
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_warnings(source: Path, tmp_path: Path) -> None:
    compiler.compile_source(
        source,
        tmp_path / "object.o",
        include=build.GUEST_INCLUDE,
        flags=["-Werror"],
        defines=build.GUEST_DEFINES,
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_places_with_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / name
    monkeypatch.setenv("PYKVM_CACHE", str(place / "cache"))
    (place / "include").mkdir(parents=True)
    (place / "include/value.h").write_text("#define VALUE 7\n")
    (place / "source.c").write_text('#include "value.h"\nint value(void) { return VALUE; }\n')
    (place / "script.ld").write_text(
        "SECTIONS { .text : { KEEP(*(.text*)) } /DISCARD/ : { *(*) } }"
    )
    image = compiler.build(
        "object", [place / "source.c"], place / "script.ld", include=(place / "include",)
    )
    assert image.is_relative_to(place)
    assert elf.ElfFile.parse(image.read_bytes()).address_of("value") == 0

    (place / "source.c").write_text("error")
    with pytest.raises(compiler.CompileError, match=r"gcc says:\n"):
        compiler.build("object", [place / "source.c"], place / "script.ld")


def test_compile_errors_show_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text(MAIN % "return nonsense;")
    with pytest.raises(compiler.CompileError) as caught:
        build_guest([source])
    assert str(caught.value).startswith("cannot compile broken.c; gcc says:\n")
    assert "broken.c:2:" in str(caught.value)
    assert "nonsense" in str(caught.value)


def test_link_errors_show_the_linkers_words(tmp_path: Path) -> None:
    source = tmp_path / "incomplete.c"
    source.write_text(
        "#include <stdint.h>\nuint32_t elsewhere(void);\n" + MAIN % "return elsewhere();"
    )
    with pytest.raises(compiler.LinkError, match="elsewhere"):
        build_guest([source])


def test_missing_source() -> None:
    with pytest.raises(compiler.SourceMissingError, match=r"absent\.c"):
        build_guest(["absent.c"])


def test_key_follows_nested_headers(tmp_path: Path) -> None:
    source, outer, inner = (tmp_path / name for name in ("source.c", "outer.h", "inner.h"))
    source.write_text('#include "outer.h"\n')
    outer.write_text('#  include "inner.h"\n')
    keys = set()
    for number in range(3):
        inner.write_text(f"#define NUMBER {number}\n")
        keys.add(compiler.content_key([source], outer, [], {}))
    assert len(keys) == 3
    inner.write_text("#define NUMBER 0\n")
    assert compiler.content_key([source], outer, [], {}) in keys
    assert compiler.content_key([source], outer, ["-O3"], {}) not in keys
    assert compiler.content_key([source], outer, [], {"MORE": 1}) not in keys


def test_headers_are_looked_up_where_the_caller_says(tmp_path: Path) -> None:
    source, header = tmp_path / "source.c", tmp_path / "headers" / "header.h"
    header.parent.mkdir()
    header.write_text("#define NUMBER 1\n")
    source.write_text('#include "header.h"\nint number = NUMBER;\n')
    with pytest.raises(compiler.CompileError, match=r"header\.h"):
        compiler.compile_source(source, tmp_path / "object.o")
    include = [header.parent]
    compiler.compile_source(source, tmp_path / "object.o", include=include)
    key = compiler.content_key([source], source, [], {}, include=include)
    header.write_text("#define NUMBER 2\n")
    assert compiler.content_key([source], source, [], {}, include=include) != key
