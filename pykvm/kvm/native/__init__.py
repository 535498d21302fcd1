"""C behind the handles: ``<linux/kvm.h>`` as the compiler sees it, the run loop, and handlers.

- ``run_loop.c``: KVM_RUN without Python; ``handlers.h``: what a device in C includes.
- ``kvm_cdef.h``, `build_kvm`, `macros`: how the extension is made.
- `decoders`: from struct kvm_run to classes of `pykvm.kvm.exits`.
"""

from typing import Any

from pykvm.kvm.native._kvm import ffi, lib

__all__ = ["Struct", "ffi", "lib"]

Struct = Any
"""A cffi struct: its fields are attributes, named as in linux/kvm.h."""
