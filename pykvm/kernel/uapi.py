"""The patched KVM's interface to user space: numbers and struct layouts of ``kvm_elisa.h``.

They come from the C compiler. The calls themselves are in `pykvm.elisa.calls`.
"""

from pykvm.kernel._uapi import ffi, lib

__all__ = ["ffi", "lib"]
