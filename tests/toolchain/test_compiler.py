"""Building bare-metal guests, and what a builder says when it cannot."""

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
from pykvm.toolchain import compiler, elf

pytestmark = pytest.mark.unit

MAIN = '#include "runtime.h"\nuint32_t guest_main(void) { %s }\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))


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


SOURCES = sorted(
    str(path.relative_to(compiler.GUEST_SOURCES)) for path in compiler.GUEST_SOURCES.rglob("*.[cS]")
)


@pytest.mark.parametrize("source", [s for s in SOURCES if not s.startswith("crossing")])
def test_no_warnings(source: str, tmp_path: Path) -> None:
    compiler.compile_source(
        compiler.GUEST_SOURCES / source,
        tmp_path / "object.o",
        flags=["-Werror"],
        defines=build.GUEST_DEFINES,
    )


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
