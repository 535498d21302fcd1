"""Kernels without a layer, or with an older one, and paths that do not exist."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from pykvm.sandbox import Applied, Confinement, SandboxError, enter, landlock
from pykvm.sandbox._sandbox import ffi, lib
from pykvm.sandbox.filter_program import assemble, packed
from pykvm.sandbox.landlock import landlock_abi, landlock_layer, make_ruleset
from tests.rigs.confined import in_child
from tests.rigs.system_call_filter import ALLOW

pytestmark = pytest.mark.unit

CREATE_RULESET, SECCOMP = 444, 317


def answer_by(number: int, error: int) -> None:
    """Let the kernel fail a system call from now on, as one that lacks it does."""
    code = packed(assemble({}, {number: lib.SECCOMP_RET_ERRNO | error}, ALLOW))
    assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    memory = ffi.from_buffer("char[]", code)
    assert lib.sandbox_seccomp_filter(memory, len(code) // 8) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errno.ENOSYS, "MISSING: this kernel has none (use Linux 5.13 or newer)"),
        (
            errno.EOPNOTSUPP,
            "MISSING: it is switched off in this kernel (boot with lsm=landlock,... first)",
        ),
    ],
)
def test_without_landlock(error: int, said: str, tmp_path: Path) -> None:
    """The rest is in force, and the result says what is not."""

    def body() -> tuple[Applied, list[str]]:
        answer_by(CREATE_RULESET, error)
        applied = enter(Confinement(directory=tmp_path / "not even there"))
        (tmp_path / "elsewhere").write_text("")
        for path in ("/etc/passwd", "/proc/self/status"):
            Path(path).read_bytes()
        try:
            os.fork()
        except PermissionError:
            return applied, applied.lines()
        raise AssertionError

    applied, lines = in_child(body)
    assert not applied.complete
    assert f"landlock      {said}" in lines
    assert "not confined  files: it reads what this user may read" in lines
    assert "not confined  files: it changes what this user may change, by their names" in lines
    assert (tmp_path / "elsewhere").exists()


def test_without_seccomp() -> None:
    def body() -> list[str]:
        answer_by(SECCOMP, errno.ENOSYS)
        applied = enter(Confinement())
        assert not applied.complete
        return applied.lines()

    assert (
        "seccomp       MISSING: this kernel has no filters (function not implemented) "
        "(set CONFIG_SECCOMP_FILTER)"
    ) in in_child(body)


@pytest.mark.parametrize("abi", range(1, 8))
def test_older_landlocks(abi: int, tmp_path: Path) -> None:
    """A kernel takes the rules of all versions before its own."""
    if landlock_abi() < abi:
        pytest.skip(f"this kernel has Landlock's ABI {landlock_abi()}")
    confinement = Confinement(directory=tmp_path, readable=(Path("/etc/passwd"),))
    os.close(make_ruleset(confinement, abi))
    text = str(landlock.described(confinement, abi))
    assert f"ABI {abi}: writes {tmp_path}; reads Python's own files, /etc/passwd" in text
    assert ("TCP is not seen" in text) == (abi < 4)
    assert landlock_layer(abi).in_force


@pytest.mark.parametrize("confinement", ["directory", "writable", "readable"])
def test_a_path_that_is_not_there(confinement: str, tmp_path: Path) -> None:
    """Nothing is in force then."""
    path = tmp_path / "none"
    given = path if confinement == "directory" else (path,)
    with pytest.raises(SandboxError, match="none cannot be allowed: no such file") as caught:
        enter(Confinement(**{confinement: given}))  # type: ignore[arg-type]
    assert caught.value.next_step == "check its name"
    assert Path("/etc/passwd").read_bytes()
