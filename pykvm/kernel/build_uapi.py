"""Build the cffi extension ``pykvm.kernel._uapi``; setup.py names ``ffibuilder``.

Every macro of ``kvm_elisa.h`` is listed and evaluated by the C compiler, and the layouts of its
structs are the compiler's: the declarations below only name their fields.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
UAPI = "kernel-patches/files/include/uapi/linux"  # setuptools wants paths below setup.py
HEADERS = '#include <linux/kvm.h>\n#include "kvm_elisa.h"\n'
PREFIXES = ("KVM_CAP_ELISA", "KVM_ELISA_", "KVM_EXIT_ELISA", "KVM_HC_ELISA_")

STRUCTS = """
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef int __s32;
struct kvm_elisa_page { __u64 addr; __u32 kind; __s32 ref; ...; };
struct kvm_elisa_create {
    __u32 nr_tables, nr_pages; __u64 tables, pages; __u32 flags, nr_parts;
    __u64 gva, size, parts; ...; };
struct kvm_elisa_memory { __u64 addr, size; ...; };
struct kvm_elisa_part { __s32 fd; __u32 index; ...; };
struct kvm_elisa_slot { __u32 slot; __s32 fd; ...; };
struct kvm_elisa_revoke { __u32 vcpu, slot; ...; };
struct kvm_elisa_exit {
    __u32 cause, at, slot, vmx_exit_reason;
    __u64 qualification, gpa, gva, rip, function, index; ...; };
"""


def _declarations() -> str:
    macro_names = runpy.run_path(str(HERE.parent / "kvm/native/macros.py"))["macro_names"]
    names = macro_names(HEADERS, PREFIXES, Path(UAPI))
    return STRUCTS + "".join(f"#define {name} ...\n" for name in names)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.kernel._uapi",
    HEADERS,
    depends=[f"{UAPI}/kvm_elisa.h"],
    include_dirs=[UAPI],
)
