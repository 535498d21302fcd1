"""The compiled extension (see build_sandbox.py); `pykvm.kvm.native._kvm` says why all is Any."""

from typing import Any

ffi: Any
lib: Any
