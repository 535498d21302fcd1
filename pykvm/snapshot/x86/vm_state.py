"""State of a VM on x86 beside its vCPUs: interrupt controllers, timer, clock.

The routing of interrupts is the machine's, which sets it up anew.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import Any, Final

from pykvm.kvm import Vm, lib
from pykvm.snapshot.x86.structs import KvmStateError, field, from_values, hex_bytes, to_values
from pykvm.snapshot.x86.vcpu_state import if_there

__all__ = ["restore_chips", "save_chips"]

_CHIPS: Final = {
    "pic_master": lib.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}


def save_chips(vm: Vm) -> dict[str, Any]:
    """Return the state of PIC, IOAPIC and PIT, as far as the VM has them in the kernel."""
    state: dict[str, Any] = {}
    for name, chip in _CHIPS.items():
        found = if_there(partial(vm.get_irqchip, chip), errno.ENXIO)
        if found is not None:
            state[name] = found.hex()
    pit = if_there(vm.get_pit2, errno.ENXIO)
    if pit is not None:
        state["pit"] = to_values(pit)
    return state


def restore_chips(vm: Vm, state: Any) -> None:
    """Set what `save_chips` returned.

    The IOAPIC sends the interrupts that were pending there to local APICs, which must have been
    restored.

    Raises:
        KvmStateError: no chip has such a state.
        IoctlError: the VM has no such chip.
    """
    if not isinstance(state, dict) or state.keys() - {*_CHIPS, "pit"}:
        raise KvmStateError("interrupt controllers")
    for name in _CHIPS:
        if name in state:
            vm.set_irqchip(_CHIPS[name], hex_bytes(state, name))
    if "pit" in state:
        vm.set_pit2(from_values("kvm_pit_state2", field(state, "pit", dict)))
