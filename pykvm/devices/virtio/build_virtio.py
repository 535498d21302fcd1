"""Build of the cffi extension ``pykvm.devices.virtio._virtio``; setup.py names ``ffibuilder``."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
FOLDER = "pykvm/devices/virtio"

PARTS = ("chain", "queue", "loop", "entropy", "console", "block", "net", "balloon")
"""Names of the C sources and their headers; a header comes after those that it includes."""

SOURCES = (*PARTS, "net_receive", "block_request", "console_control", "console_output")

SYSTEM = "struct iovec { void *iov_base; size_t iov_len; };\n"
"""Declarations that the headers take from the system's."""


def _declarations() -> str:
    """Return the declarations of the headers, without those that cffi cannot parse."""
    kept = [SYSTEM]
    for part in PARTS:
        header = (HERE / f"{part}.h").read_text()
        header = re.sub(r"/\* not for cffi \{ \*/.*?/\* \} \*/", "", header, flags=re.DOTALL)
        lines = re.sub(r"[ \t]*/\*.*?\*/", "", header, flags=re.DOTALL).splitlines(keepends=True)
        numbers = re.compile(r"#define [A-Z_]+\s+\d+\n")
        kept += [one for one in lines if not one.startswith("#") or numbers.fullmatch(one)]
    return "".join(kept)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.devices.virtio._virtio",
    "#include <sys/uio.h>\n" + "".join(f'#include "{part}.h"\n' for part in PARTS),
    # setuptools requires paths relative to the directory of setup.py, where it runs.
    sources=[f"{FOLDER}/{name}.c" for name in SOURCES],
    depends=[f"{FOLDER}/{path.name}" for path in sorted(HERE.glob("*.h"))],
    include_dirs=[FOLDER],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)
