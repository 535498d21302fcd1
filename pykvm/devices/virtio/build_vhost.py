"""Build of the cffi extension ``pykvm.devices.virtio._vhost``; setup.py names ``ffibuilder``.

Numbers and layouts are those of the kernel's headers; the declarations below only name them.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PLACE = "pykvm/devices/virtio"  # setuptools wants paths below setup.py

NUMBERS = """
    VHOST_GET_FEATURES VHOST_SET_FEATURES VHOST_SET_OWNER VHOST_SET_MEM_TABLE VHOST_SET_VRING_NUM
    VHOST_SET_VRING_ADDR VHOST_SET_VRING_BASE VHOST_GET_VRING_BASE VHOST_SET_VRING_KICK
    VHOST_SET_VRING_CALL VHOST_SET_VRING_ERR VHOST_NET_SET_BACKEND VHOST_VSOCK_SET_GUEST_CID
    VHOST_VSOCK_SET_RUNNING
"""

STRUCTS = """
    struct vhost_vring_state { unsigned int index, num; ...; };
    struct vhost_vring_file { unsigned int index; int fd; ...; };
    struct vhost_vring_addr {
        unsigned int index, flags;
        unsigned long long desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr; ...; };
    struct vhost_memory_region {
        unsigned long long guest_phys_addr, memory_size, userspace_addr, flags_padding; ...; };
    struct vhost_memory { unsigned int nregions; struct vhost_memory_region regions[]; ...; };
    struct virtio_vsock_config { unsigned long long guest_cid; ...; };
"""

INCLUDES = """
    #include <linux/vhost.h>
    #include <linux/virtio_vsock.h>
    #include "backend_spawn.h"
"""


def _declarations() -> str:
    """Return STRUCTS, NUMBERS, and the declarations of backend_spawn.h."""
    header = (HERE / "backend_spawn.h").read_text()
    numbers = re.compile(r"#define [A-Z_]+\s+\d+\n")
    lines = header.splitlines(keepends=True)
    kept = [one for one in lines if not one.startswith("#") or numbers.fullmatch(one)]
    return STRUCTS + "".join(f"#define {name} ...\n" for name in NUMBERS.split()) + "".join(kept)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.devices.virtio._vhost",
    INCLUDES,
    sources=[f"{PLACE}/backend_spawn.c"],
    depends=[f"{PLACE}/backend_spawn.h"],
    include_dirs=[PLACE],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)
