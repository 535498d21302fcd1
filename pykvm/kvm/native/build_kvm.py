"""Builds the cffi extension ``pykvm.kvm.native._kvm``; setup.py names ``ffibuilder``.

Three inputs, each the only place of what it holds: ``kvm_cdef.h`` (fields of the kernel's
structs), ``ioctls.py`` (the calls), ``handlers.h`` and ``run_loop.h`` (our C). Constants are every
macro of ``<linux/kvm.h>`` whose name starts with one of `PREFIXES`; the C compiler lists them and
evaluates them, so that no number is typed into pykvm.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = "#include <linux/kvm.h>\n"

PREFIXES = (
    "KVM_API_VERSION",
    "KVM_CAP_",
    "KVM_CLOCK_",
    "KVM_CPUID_FLAG_",
    "KVM_CREATE_DEVICE_TEST",
    "KVM_DEV_TYPE_VFIO",
    "KVM_DIRTY_LOG_",
    "KVM_EXIT_",
    "KVM_GUESTDBG_",
    "KVM_INTERNAL_ERROR_",
    "KVM_IOEVENTFD_FLAG_",
    "KVM_IRQCHIP_",
    "KVM_IRQFD_FLAG_",
    "KVM_IRQ_ROUTING_",
    "KVM_MAX_XCRS",
    "KVM_MEM_",
    "KVM_MP_STATE_",
    "KVM_MSR_EXIT_REASON_",
    "KVM_MSR_FILTER_",
    "KVM_PIT_",
    "KVM_PMU_EVENT_",
    "KVM_SREGS2_FLAGS_",
    "KVM_STATS_",
    "KVM_SYSTEM_EVENT_",
    "KVM_VCPUEVENT_VALID_",
    "KVM_VCPU_TSC_",
    "KVM_X86_DISABLE_EXITS_",
    "KVM_X86_QUIRK_",
    "KVM_X86_XCOMP_GUEST_SUPP",
)


def constant_names() -> list[str]:
    """Names of the constants to export, sorted: those of `PREFIXES`, and the calls."""
    names = runpy.run_path(str(HERE / "macros.py"))["macro_names"](HEADERS, PREFIXES, HERE)
    return sorted({*names, *runpy.run_path(str(HERE.parent / "ioctls.py"))["IOCTLS"]})


def declarations() -> str:
    """Everything for `FFI.cdef`."""
    constants = "".join(f"#define {name} ...\n" for name in constant_names())
    own = "".join(_for_cffi((HERE / name).read_text()) for name in ("handlers.h", "run_loop.h"))
    return (HERE / "kvm_cdef.h").read_text() + constants + own


def _for_cffi(header: str) -> str:
    """A header without what cffi, which has no preprocessor, cannot parse."""
    header = re.sub(r"/\* not for cffi \{ \*/.*?/\* \} \*/", "", header, flags=re.DOTALL)
    return "".join(
        line
        for line in header.splitlines(True)
        if not line.startswith("#") or re.match(r"#define \w+\s+\d", line)
    )


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pykvm.kvm.native._kvm",
    HEADERS + '#include "run_loop.h"\n',
    # Relative: setuptools wants sources below the directory of setup.py, where it runs.
    sources=["pykvm/kvm/native/run_loop.c", "pykvm/kvm/native/handlers.c"],
    depends=[
        "pykvm/kvm/ioctls.py",
        *(f"pykvm/kvm/native/{name}" for name in ("handlers.h", "run_loop.h", "kvm_cdef.h")),
    ],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)
