"""Runs of vCPUs with tiny_guest.py, and the end of each that the model predicts."""

import errno

from pykvm.kernel import uapi
from pykvm.kvm import lib
from tests.rigs.call_model.model import ContextModel, Inside, VcpuModel, counted
from tests.rigs.tiny_guest import (
    BEHIND_OBJECT,
    BEHIND_SUB,
    CODE_GVA,
    INNER,
    LOOPS,
    End,
    Kind,
    run_into_loop,
    set_loop,
    set_registers,
)

VMX_HLT, VMX_VIOLATION, VMX_VMFUNC = 12, 48, 59  # SDM vol. 3D, appendix C


def run_vcpu(vcpu: VcpuModel, slot: int, loop: bool) -> None:
    """Let the guest try VMFUNC(0, slot), or continue if it is in a context.

    Args:
        loop: whether the guest stays in the context.
    """
    if not vcpu.file.area:
        return
    fd = vcpu.file.fds[0]
    if slot == 512:  # first with "immediate exit", which precedes everything else
        assert vcpu.file.area.run(fd, immediate=True).result == -errno.EINTR
    if vcpu.report:
        counted["run: revoked"] += 1
        end = vcpu.file.area.run(fd)
        assert elisa_exit(end)[:3] == (uapi.lib.KVM_ELISA_EXIT_REVOKED, *vcpu.report), end
        vcpu.report = None
        return
    where = vcpu.slots.get(slot)
    if vcpu.inside:
        go_on(vcpu, vcpu.inside, loop)
    elif where and vcpu.vmfunc_works and vcpu.vm.guest_runs:
        if None not in (where.kind, where.target.kind if where.target else "none"):
            enter(vcpu, slot, where, loop)
    else:
        assert set_registers(fd, slot=slot) == 0
        stays_home(vcpu, vcpu.file.area.run(fd), slot)


def stays_home(vcpu: VcpuModel, end: End, slot: int) -> None:
    """Check that the VMFUNC leaves the guest in its default context."""
    if not vcpu.vm.guest_runs:
        counted["run: without memory"] += 1
        return
    if not vcpu.vmfunc_works:
        counted["run: no vmfunc"] += 1
        assert (end.result, end.exit_reason) == (0, lib.KVM_EXIT_SHUTDOWN), end
    elif slot == 0:
        is_home(end, INNER)
    else:
        counted["run: empty slot"] += 1
        expected = (uapi.lib.KVM_ELISA_EXIT_VMFUNC, uapi.lib.KVM_ELISA_AT_DEFAULT, 0, VMX_VMFUNC)
        assert elisa_exit(end) == expected, end


def enter(vcpu: VcpuModel, slot: int, context: ContextModel, loop: bool) -> None:
    place, home = context, BEHIND_OBJECT
    returns = context.kind is Kind.OBJECT
    if context.target:
        place, home = context.target, BEHIND_SUB
        returns = place.kind is Kind.SUB
    inside = Inside(place, home=home)
    if not returns:
        violation = (uapi.lib.KVM_ELISA_EXIT_VIOLATION, VMX_VIOLATION)
        refused = (uapi.lib.KVM_ELISA_EXIT_REFUSED, VMX_HLT)
        inside.stuck = violation if place.kind is Kind.BARE else refused
    assert set_registers(vcpu.file.fds[0], slot=slot, loop=loop) == 0
    keep_running(vcpu, inside, loop)


def go_on(vcpu: VcpuModel, inside: Inside, loop: bool) -> None:
    assert set_registers(vcpu.file.fds[0], slot=2) == -errno.EBUSY
    set_loop(vcpu.file.fds[0], loop)
    keep_running(vcpu, inside, loop)


def keep_running(vcpu: VcpuModel, inside: Inside, loop: bool) -> None:
    """Run a vCPU that is in a context or enters one."""
    fd, area = vcpu.file.fds[0], vcpu.file.area
    assert area
    if inside.stuck:
        counted["run: stuck inside"] += 1
        cause, reason = inside.stuck
        found = vcpu.find(inside.place, vcpu.slots)
        assert found
        end = area.run(fd)
        assert elisa_exit(end) == (cause, *found, reason), end
        vcpu.inside = inside
    elif loop:
        counted["run: loop inside"] += 1
        end = run_into_loop(fd, area)
        assert end.result == -errno.EINTR, end
        assert end.rip in LOOPS, end
        vcpu.inside = inside
    else:
        end = area.run(fd)
        vcpu.inside = None
        if vcpu.vm.guest_runs:
            is_home(end, inside.home)


def is_home(end: End, offset: int) -> None:
    counted["run: home"] += 1
    assert (end.result, end.exit_reason) == (0, lib.KVM_EXIT_HLT), end
    assert end.rip == CODE_GVA + offset + 1, end


def elisa_exit(end: End) -> tuple[int, int, int, int]:
    assert (end.result, end.exit_reason) == (0, uapi.lib.KVM_EXIT_ELISA), end
    return end.elisa
