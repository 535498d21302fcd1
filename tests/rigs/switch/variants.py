"""The switch as built, and builds that lack one defence, to show that the attacks are real."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pykvm.resources import GUEST_SOURCES
from pykvm.switch import _native
from pykvm.switch._native import ffi
from pykvm.switch.build_native import COMPILE_ARGS
from tests.rigs.switch.native_rig import Rig

__all__ = ["AS_BUILT", "Build", "build_variant", "load_build"]


@dataclass(frozen=True)
class Build:
    """One compiled elisa_serve."""

    function: Callable[..., int]
    address: int

    def serve(self, a0: int, a1: int, a2: int, rig: Rig) -> int:
        """Call it as port 0 of `rig`."""
        env = int(ffi.cast("uintptr_t", rig.switch.native_env(0)))
        return self.function(a0, a1, a2, env)


def load_build(library: str) -> Build:
    """Load a shared library that has an elisa_serve."""
    serve = ctypes.CDLL(library).elisa_serve
    serve.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p]
    serve.restype = ctypes.c_uint64
    return Build(serve, ctypes.cast(serve, ctypes.c_void_p).value or 0)


# Not through cffi, whose own pointer to the function is that of a wrapper.
AS_BUILT = load_build(str(_native.__file__))


def build_variant(directory: Path, old: str, new: str) -> Build:
    """Build switch.c with `old`, which occurs once, replaced by `new`."""
    source = (GUEST_SOURCES / "switch/switch.c").read_text()
    assert source.count(old) == 1, f"switch.c no longer contains {old!r} once"
    changed, library = directory / "variant.c", directory / "variant.so"
    changed.write_text(source.replace(old, new))
    subprocess.run(
        ["cc", *COMPILE_ARGS, "-shared", f"-I{GUEST_SOURCES / 'include'}", "-o", library, changed],
        check=True,
    )
    return load_build(str(library))
