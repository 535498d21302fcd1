"""Connection of a bare-metal guest to a port of the switch, by one of the three paths."""

from typing import Final

from pykvm.elisa import calls
from pykvm.elisa.attachment import check_vcpus
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.programs import HC_USER, SwitchPath
from pykvm.switch.hosted import HostedSwitch

__all__ = ["SWITCH_SEED", "connect"]

SWITCH_SEED: Final = 0x9E37_79B9_7F4A_7C15
"""Fixed seed of measurements, so that counts repeat; a switch in use takes a random one."""


def connect(guest: BareGuest, hosted: HostedSwitch, port: int, path: SwitchPath) -> None:
    """Give a guest the window of a port and a path to the switch; enable the port.

    Args:
        guest: the guest, with one vCPU, to which none is added later: a lane has one writer.
        hosted: the switch.
        port: number of the port.
        path: path by which the guest calls the switch.

    Raises:
        PortStateError: the port is in use.
        TooManyVcpusError: the guest has several vCPUs.
        PykvmError: see `ObjectInstance.attach`.
    """
    instance = hosted.instance
    check_vcpus(len(guest.vcpus), instance.declaration.name, instance.declaration.vcpus)
    match path:
        case SwitchPath.VMFUNC:
            instance.attach(guest, port)
        case SwitchPath.VMCALL:
            calls.enable_user_hypercalls(guest.vm)
            environment = hosted.switch.native_env(port)
            guest.vm.handlers.add_hypercall(HC_USER, hosted.switch.hypercall, environment)
        case SwitchPath.DIRECT:
            memory = instance.direct_region(layout.DIRECT_GPA)
            guest.set_direct(memory, instance.declaration.env(memory.gpa, port))
    if path is not SwitchPath.VMFUNC:
        guest.announce(0, instance.window_region(port, guest.next_window_gpa()))
    hosted.switch.enable(port)
