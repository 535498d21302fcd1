"""Build the cffi extension ``pykvm.network._tun``; setup.py names ``ffibuilder``.

It holds constants of ``<linux/if_tun.h>`` alone, which the C compiler evaluates.
"""

from __future__ import annotations

from cffi import FFI

CONSTANTS = (
    *("IFF_MULTI_QUEUE", "IFF_NO_PI", "IFF_TAP", "IFF_TUN_EXCL", "IFF_VNET_HDR"),
    *("TUNGETVNETHDRSZ", "TUNSETIFF", "TUNSETOFFLOAD", "TUNSETVNETHDRSZ", "TUNSETVNETLE"),
    *("TUN_F_CSUM", "TUN_F_TSO4", "TUN_F_TSO6", "TUN_F_TSO_ECN"),
)

ffibuilder = FFI()
ffibuilder.cdef("".join(f"#define {name} ...\n" for name in CONSTANTS))
ffibuilder.set_source("pykvm.network._tun", "#include <linux/if_tun.h>\n#include <sys/ioctl.h>\n")
