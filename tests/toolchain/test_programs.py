"""pykvm.toolchain.programs: static programs for Linux guests."""

import subprocess
from pathlib import Path

import pytest

from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.compiler import CompileError, SourceMissingError
from pykvm.toolchain.programs import build_program

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "source", sorted((GUEST_SOURCES / "linux").glob("*.c")), ids=lambda path: path.stem
)
def test_ours_build_without_warnings(source: Path, own_cache: Path) -> None:
    program = build_program("test-program", source, ["-Werror"])
    assert program.read_bytes().startswith(b"\x7fELF")


def test_a_program_runs_and_is_cached(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "seven.c"
    source.write_text("int main(void) { return 7; }")
    program = build_program("test-program", source)
    assert subprocess.run([program], check=False).returncode == 7
    assert build_program("test-program", source) == program


def test_sources_that_are_wrong(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(SourceMissingError, match="no source file"):
        build_program("test-program", tmp_path / "none.c")
    (tmp_path / "bad.c").write_text("int main(void) { return x; }")
    with pytest.raises(CompileError, match=r"cannot compile bad\.c"):
        build_program("test-program", tmp_path / "bad.c")
