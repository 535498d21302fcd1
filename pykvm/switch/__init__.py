"""The virtual switch from the host's side: geometry, ports, counters, packet captures.

The switch itself is ``guest/switch/switch.c`` and runs in a sub context, behind VMCALL, or inside
a guest; its memory is described in ``guest/include/switch.h``. What stands here prepares that
memory, adds and removes ports, lets time pass, and reads counters while frames flow.
"""

from pykvm.switch.capture import (
    Capture,
    CaptureError,
    Frame,
    Sides,
    read_capture,
    split_capture,
    write_capture,
)
from pykvm.switch.counters import (
    LaneCounters,
    PortCounters,
    SwitchCounters,
    read_counters,
)
from pykvm.switch.geometry import SwitchConfig, SwitchConfigError
from pykvm.switch.native_port import NativePort, SwitchCallError
from pykvm.switch.switch import PortBusyError, PortStateError, Switch, SwitchMemoryError

__all__ = [
    "Capture",
    "CaptureError",
    "Frame",
    "LaneCounters",
    "NativePort",
    "PortBusyError",
    "PortCounters",
    "PortStateError",
    "Sides",
    "Switch",
    "SwitchCallError",
    "SwitchConfig",
    "SwitchConfigError",
    "SwitchCounters",
    "SwitchMemoryError",
    "read_capture",
    "read_counters",
    "split_capture",
    "write_capture",
]
