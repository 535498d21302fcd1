"""State of a vCPU on x86, saved and restored in an order that keeps all of it.

Saving: KVM_GET_MP_STATE comes first, because it takes a pending INIT or SIPI and changes registers;
events come last, because other calls may change them.

Restoring:

- CPUID first: KVM checks registers and MSRs against it.
- Special registers, among them the base of the local APIC, come before the local APIC, whose
  registers they lay out; and general ones before events, because KVM_SET_REGS drops an exception.
- The local APIC and the time-stamp counter come before the MSR of the TSC-deadline timer, which
  is lost while the local APIC is in another mode.
- The state of the processor comes after KVM_SET_SREGS, which may change it.

Source: Documentation/virt/kvm/api.rst; Linux arch/x86/kvm/x86.c, lapic.c.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable
from typing import Any, Final

from pykvm.kvm import CpuidEntry, IoctlError, MpState, MsrError, Vcpu
from pykvm.snapshot.x86.clocks import MSR_TSC, save_tsc
from pykvm.snapshot.x86.features import HostFeatureError
from pykvm.snapshot.x86.structs import KvmStateError, field, from_values, hex_bytes, to_values

__all__ = [
    "restore_msrs_and_events",
    "restore_registers",
    "save_vcpu",
    "saved_cpuid",
]

_MSR_TSC_DEADLINE: Final = 0x6E0
_MSR_MCG_CAP: Final = 0x179

_CPUID_FIELDS: Final = {field.name for field in dataclasses.fields(CpuidEntry)}

_OF_HYPER_V: Final = range(0x4000_0000, 0x4000_0200)
"""MSRs of Hyper-V's interface, which KVM lists, and no machine of pykvm offers. KVM allocates the
interface's state when one is read."""

_MTRRS: Final = (0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))
"""Memory type ranges, which KVM keeps and does not list (SDM vol. 3A, 12.11)."""


def save_vcpu(vcpu: Vcpu, listed: Iterable[int]) -> dict[str, Any]:
    """Return the state of a vCPU that has completed its last exit, as values for JSON.

    Args:
        vcpu: the vCPU.
        listed: MSRs that make up a state, those of `Kvm.get_msr_index_list`.

    Raises:
        VcpuRunningError: it runs.
    """
    mp_state = int(vcpu.get_mp_state())
    names = sorted(_CPUID_FIELDS)
    has = vcpu.check_extension
    state: dict[str, Any] = {
        "id": vcpu.id,
        "mp_state": mp_state,
        "cpuid": [{name: getattr(entry, name) for name in names} for entry in vcpu.get_cpuid2()],
        "regs": to_values(vcpu.get_regs()),
    }
    if has("KVM_CAP_SREGS2"):
        state["sregs2"] = to_values(vcpu.get_sregs2())
    else:
        state["sregs"] = to_values(vcpu.get_sregs())
    if has("KVM_CAP_XSAVE"):
        state["xsave"] = vcpu.get_xsave().hex()
    else:
        state["fpu"] = to_values(vcpu.get_fpu())
    if has("KVM_CAP_XCRS"):
        state["xcrs"] = [[number, value] for number, value in vcpu.get_xcrs().items()]
    if has("KVM_CAP_DEBUGREGS"):
        state["debugregs"] = to_values(vcpu.get_debug_regs())
    lapic = if_there(vcpu.get_lapic, errno.EINVAL)
    state["lapic"] = lapic.hex() if lapic else None
    state["tsc"] = save_tsc(vcpu)
    msrs = vcpu.get_readable_msrs(_saved_msrs(vcpu, listed))
    state["msrs"] = [[index, value] for index, value in msrs.items()]
    state["events"] = to_values(vcpu.get_vcpu_events())
    return state


def if_there(get: Callable[[], Any], absent: int) -> Any:
    """Return what a call returns; None if it fails with the errno `absent`."""
    try:
        return get()
    except IoctlError as error:
        if error.errno != absent:
            raise
        return None


def _saved_msrs(vcpu: Vcpu, listed: Iterable[int]) -> list[int]:
    """Return MSRs in the order in which they are restored."""
    banks = vcpu.get_readable_msrs([_MSR_MCG_CAP]).get(_MSR_MCG_CAP, 0) & 0xFF
    machine_checks = range(0x400, 0x400 + 4 * banks)  # SDM vol. 3B, 16.3.2
    offered = (index for index in listed if index not in _OF_HYPER_V)
    wanted = dict.fromkeys([*offered, *_MTRRS, *machine_checks])
    wanted.pop(MSR_TSC, None)
    wanted.pop(_MSR_TSC_DEADLINE, None)
    return [*wanted, _MSR_TSC_DEADLINE]


def saved_cpuid(state: Any) -> list[CpuidEntry]:
    """Return the CPUID leaves of a saved vCPU.

    Raises:
        KvmStateError: they are none.
    """
    entries = field(state, "cpuid", list)
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != _CPUID_FIELDS:
            raise KvmStateError("cpuid")
        if not all(type(value) is int and 0 <= value < 1 << 32 for value in entry.values()):
            raise KvmStateError("cpuid")
    return [CpuidEntry(**entry) for entry in entries]


def restore_registers(vcpu: Vcpu, state: Any) -> None:
    """Set everything of a new vCPU up to its local APIC.

    Raises:
        KvmStateError: no vCPU has such a state.
        KvmError: this KVM refuses it.
    """
    vcpu.set_cpuid2(saved_cpuid(state))
    if "sregs2" in state:
        sregs = from_values("kvm_sregs2", state["sregs2"])
        vcpu.set_sregs2(sregs)
    else:
        sregs = from_values("kvm_sregs", field(state, "sregs", dict))
        vcpu.set_sregs(sregs)
    vcpu.kvm_run.cr8 = sregs.cr8  # without a local APIC in the kernel KVM_RUN takes it from there
    vcpu.set_regs(from_values("kvm_regs", field(state, "regs", dict)))
    if "xcrs" in state:
        vcpu.set_xcrs(_pairs(state, "xcrs", 1 << 32))
    if "xsave" in state:
        _set_xsave(vcpu, hex_bytes(state, "xsave"))
    else:
        vcpu.set_fpu(from_values("kvm_fpu", field(state, "fpu", dict)))
    if "debugregs" in state:
        vcpu.set_debug_regs(from_values("kvm_debugregs", state["debugregs"]))
    if state.get("lapic") is not None:
        vcpu.set_lapic(hex_bytes(state, "lapic"))


def _set_xsave(vcpu: Vcpu, area: bytes) -> None:
    """Set an area of the length that another host's features gave it."""
    size = len(vcpu.get_xsave())
    if any(area[size:]):
        raise HostFeatureError(
            f"the saved machine uses {len(area)} bytes of extended state, this host has {size}",
            "restore it on a host like that one",
        )
    vcpu.set_xsave(area[:size].ljust(size, b"\0"))


def restore_msrs_and_events(vcpu: Vcpu, state: Any) -> None:
    """Set the rest, after the time-stamp counter.

    Raises:
        KvmStateError: no vCPU has such a state.
        HostFeatureError: this KVM refuses an MSR.
    """
    _set_msrs(vcpu, _pairs(state, "msrs", 1 << 32))
    try:
        mp_state = MpState(field(state, "mp_state", int))
    except ValueError as error:
        raise KvmStateError("mp_state") from error
    vcpu.set_mp_state(mp_state)
    vcpu.set_vcpu_events(from_values("kvm_vcpu_events", field(state, "events", dict)))


def _pairs(state: Any, name: str, numbers: int) -> dict[int, int]:
    """Return a field that holds pairs of a number below `numbers` and a 64-bit value."""
    pairs = field(state, name, list)
    for pair in pairs:
        if not isinstance(pair, list) or [type(part) for part in pair] != [int, int]:
            raise KvmStateError(name)
        if not 0 <= pair[0] < numbers or not 0 <= pair[1] < 1 << 64:
            raise KvmStateError(name)
    return dict(pairs)


def _set_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    """Set MSRs; leave out a refused one that holds its value, or whose value is that of none."""
    while values:
        try:
            vcpu.set_msrs(values)
        except MsrError as error:
            refused = error.index
            if vcpu.get_readable_msrs([refused]).get(refused, 0) != values[refused]:
                raise HostFeatureError(
                    f"this host refuses {values[refused]:#x} for msr {refused:#x} of the saved "
                    "machine",
                    "restore it on a host like that one, with the same kernel or a newer one",
                ) from error
            order = list(values)
            values = {index: values[index] for index in order[order.index(refused) + 1 :]}
        else:
            return
