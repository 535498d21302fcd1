"""Build of the cffi extension ``pykvm.devices._devices``; setup.py names ``ffibuilder``."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def _declarations() -> str:
    """Return the declarations of the device's header, without those that cffi cannot parse."""
    header = (HERE / "debug_console.h").read_text()
    header = re.sub(r"/\* not for cffi \{ \*/.*?/\* \} \*/", "", header, flags=re.DOTALL)
    plain = "".join(line for line in header.splitlines(True) if not line.startswith("#"))
    return "struct pykvm_access;\n" + plain


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.devices._devices",
    '#include "debug_console.h"\n',
    # setuptools requires paths relative to the directory of setup.py, where it runs.
    sources=["pykvm/devices/debug_console.c"],
    depends=["pykvm/devices/debug_console.h", "pykvm/kvm/native/handlers.h"],
    include_dirs=["pykvm/devices", "pykvm/kvm/native"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)
