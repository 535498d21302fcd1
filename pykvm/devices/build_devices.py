"""Build of the cffi extension ``pykvm.devices._devices``; setup.py names ``ffibuilder``."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
DEVICES = ("debug_console", "serial")


def _declarations() -> str:
    """Return the declarations of the devices' headers, without those that cffi cannot parse."""
    kept = ["struct pykvm_access;\n"]
    for device in DEVICES:
        header = (HERE / f"{device}.h").read_text()
        header = re.sub(r"/\* not for cffi \{ \*/.*?/\* \} \*/", "", header, flags=re.DOTALL)
        lines = header.splitlines(keepends=True)
        numbers = re.compile(r"#define [A-Z_]+\s+\d+\n")
        kept += [one for one in lines if not one.startswith("#") or numbers.fullmatch(one)]
    return "".join(kept)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.devices._devices",
    "".join(f'#include "{device}.h"\n' for device in DEVICES),
    # setuptools requires paths relative to the directory of setup.py, where it runs.
    sources=[f"pykvm/devices/{device}.c" for device in DEVICES],
    depends=[
        *(f"pykvm/devices/{device}.h" for device in DEVICES),
        "pykvm/kvm/native/handlers.h",
    ],
    include_dirs=["pykvm/devices", "pykvm/kvm/native"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)
