"""Clocks of a VM: kvmclock, and the time-stamp counters of its vCPUs.

A restored guest finds that the time has passed for which it was away: its wall clock is right, and
its timers are due. Both clocks advance by the time that the host's CLOCK_REALTIME has advanced,
and stay where they were if that was set back.

The counters keep their distances from one another exactly, by their offsets.

Source: Linux Documentation/virt/kvm/devices/vcpu.rst, 4.1, and arch/x86/kvm/x86.c,
kvm_synchronize_tsc().
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.kvm import CapabilityMissingError, IoctlError, Vcpu, Vm, lib
from pykvm.snapshot.x86.structs import KvmStateError, field

__all__ = [
    "MSR_TSC",
    "TscFrequencyError",
    "restore_kvmclock",
    "restore_tscs",
    "save_kvmclock",
    "save_tsc",
]

MSR_TSC: Final = 0x10

_TOLERANCE: Final = 250
"""Parts per million by which a guest's frequency may differ from the host's without scaling: KVM's
own default (tsc_tolerance_ppm)."""


class TscFrequencyError(PykvmError):
    """A host whose time-stamp counter runs at another frequency, which it cannot scale."""


def save_kvmclock(vm: Vm) -> dict[str, int]:
    """Return kvmclock, and the CLOCK_REALTIME at which it had that value, both in ns."""
    clock = vm.get_clock()
    known = clock.flags & lib.KVM_CLOCK_REALTIME
    return {"clock": clock.clock, "realtime": clock.realtime if known else time.time_ns()}


def restore_kvmclock(vm: Vm, state: Any) -> None:
    """Set kvmclock; before the MSR by which a guest asks for the wall clock at its boot."""
    clock, realtime = field(state, "clock", int), field(state, "realtime", int)
    if not 0 <= clock < 1 << 63 or not 0 <= realtime < 1 << 63:
        raise KvmStateError("clock")
    if vm.check_extension("KVM_CAP_ADJUST_CLOCK") & lib.KVM_CLOCK_REALTIME:
        vm.set_clock(clock, realtime=realtime)
    else:
        vm.set_clock(clock + _away(realtime))


def save_tsc(vcpu: Vcpu) -> dict[str, int | None]:
    """Return a time-stamp counter: value, when it had it (ns), kHz, and its offset if known."""
    before = time.time_ns()
    (value,) = vcpu.get_msrs([MSR_TSC]).values()
    realtime = (before + time.time_ns()) // 2
    offset = vcpu.get_tsc_offset() if vcpu.has_tsc_offset() else None
    return {"value": value, "realtime": realtime, "khz": vcpu.get_tsc_khz(), "offset": offset}


def restore_tscs(vcpus: Sequence[Vcpu], states: Sequence[Any]) -> None:
    """Set the time-stamp counters of all vCPUs; before their TSC-deadline timers.

    Raises:
        TscFrequencyError: this host cannot give them their frequency.
    """
    for vcpu, state in zip(vcpus, states, strict=True):
        _set_frequency(vcpu, field(state, "khz", int))
    offsets = [state.get("offset") for state in states]
    if all(isinstance(offset, int) for offset in offsets) and vcpus[0].has_tsc_offset():
        # A write of the MSR would not do: KVM takes a value that is within a second of what it
        # expects for an attempt to synchronise counters, and does not set it.
        wanted = _now(states[0])
        (current,) = vcpus[0].get_msrs([MSR_TSC]).values()
        change = vcpus[0].get_tsc_offset() + wanted - current - offsets[0]
        for vcpu, offset in zip(vcpus, offsets, strict=True):
            vcpu.set_tsc_offset(offset + change)
    else:
        for vcpu, state in zip(vcpus, states, strict=True):
            vcpu.set_msrs({MSR_TSC: _now(state)})


def _now(state: Any) -> int:
    """Return what a counter has reached by now."""
    khz: int = field(state, "khz", int)
    passed = _away(field(state, "realtime", int)) * khz // 1_000_000
    value: int = field(state, "value", int)
    return (value + passed) % 2**64


def _away(since: int) -> int:
    return max(0, time.time_ns() - since)


def _set_frequency(vcpu: Vcpu, khz: int) -> None:
    own = vcpu.get_tsc_khz()
    if khz == own:
        return
    try:
        vcpu.set_tsc_khz(khz)
    except (CapabilityMissingError, IoctlError) as error:
        if abs(khz - own) * 1_000_000 > own * _TOLERANCE:
            raise TscFrequencyError(
                f"the saved machine's tsc runs at {khz} khz, and this host's at {own} khz",
                "restore it on a host whose tsc has that frequency, or can be scaled",
            ) from error
