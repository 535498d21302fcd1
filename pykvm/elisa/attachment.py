"""One vCPU's access to one shared object: a sub context, a gate context, a slot of its list."""

import errno
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from pykvm.closeable import Closeable
from pykvm.elisa import calls, crossing
from pykvm.elisa.calls import Context, RegisteredMemory
from pykvm.elisa.contexts import (
    ContextCost,
    ContextPlan,
    EptpPage,
    ListPage,
    UserPages,
    plan_gate,
    plan_sub,
)
from pykvm.errors import PykvmError
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, KvmError, Vcpu, VcpuRunningError
from pykvm.memory.limits import require_lockable
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE

__all__ = ["Attachment", "AttachmentCost", "InsideContextError", "SlotsFullError"]

FIRST_SLOT: Final[int] = uapi.lib.KVM_ELISA_SLOT_FIRST
SLOTS: Final[int] = uapi.lib.KVM_ELISA_SLOTS

_slots_in_use: "weakref.WeakKeyDictionary[Vcpu, set[int]]" = weakref.WeakKeyDictionary()


class SlotsFullError(PykvmError):
    """The vCPU's EPTP list has no free slot."""


class InsideContextError(PykvmError):
    """The vCPU stopped inside a context; only revoking takes that away from it now."""


@dataclass(frozen=True)
class AttachmentCost:
    """Pages of the two contexts, and of the memory made for this attachment alone.

    The object's memory is not among them: it is registered once, for all attachments.
    """

    gate: ContextCost
    sub: ContextCost
    own: int


def _take_slot(vcpu: Vcpu) -> int:
    used = _slots_in_use.setdefault(vcpu, set())
    for slot in range(FIRST_SLOT, SLOTS):
        if slot not in used:
            used.add(slot)
            return slot
    raise SlotsFullError(f"vcpu {vcpu.id} has {SLOTS - FIRST_SLOT} attachments", "detach one")


def _create(
    vcpu: Vcpu, plan: ContextPlan, sub: Context | None, memory: RegisteredMemory | None
) -> Context:
    """Hand a complete plan to the kernel."""
    pages: list[tuple[int, int, int]] = []
    for page in plan.pages:
        match page:
            case UserPages(address, count):
                stop = address + count * PAGE_SIZE
                kind = uapi.lib.KVM_ELISA_PAGE_USER
                pages.extend((at, kind, 0) for at in range(address, stop, PAGE_SIZE))
            case ListPage():
                pages.append((0, uapi.lib.KVM_ELISA_PAGE_LIST, vcpu.id))
            case EptpPage():
                assert sub is not None
                pages.append((0, uapi.lib.KVM_ELISA_PAGE_EPTP, sub.fileno()))
    parts = [] if memory is None else [(memory, part) for part in range(plan.parts)]
    return calls.create_context(
        vcpu.vm,
        plan.ept.tobytes(),
        pages,
        parts=parts,
        gva=plan.gva,
        size=plan.size,
        la57=plan.levels == 5,
    )


class Attachment(Closeable):
    """One vCPU's access to one object: what `ObjectInstance.attach` returns.

    slot: of the gate context in the vCPU's EPTP list, the last argument of `elisa_call`.
    crossing_gva: where the guest maps its entry page (and, 0x3000 further on, its return page).
    """

    def __init__(
        self, vcpu: Vcpu, slot: int, crossing_gva: int, cost: AttachmentCost, memory: Region
    ) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._contexts: list[Context] = []
        self.slot = slot
        self.crossing_gva = crossing_gva
        self.cost = cost
        self.attached = False

    @classmethod
    def make(
        cls,
        vcpu: Vcpu,
        *,
        name: str,
        image: Sequence[tuple[int, UserPages, Access]],
        gate_page: int,
        memory: RegisteredMemory,
        env: bytes,
        crossing_gva: int,
        user: bool,
        levels: int,
    ) -> Self:
        """Plan both contexts, create them, and put the gate into the vCPU's list."""
        gate = plan_gate(gate_page, crossing_gva, user=user, levels=levels)

        # How many guest tables the sub context needs does not depend on where its pages lie, so
        # a first plan with placeholders tells how much memory to make.
        def sub_plan(env_page: int, stack: int) -> ContextPlan:
            return plan_sub(
                image, env_page, stack, memory.size, crossing_gva, user=user, levels=levels
            )

        sub_bytes = sub_plan(0, 0).guest_table_bytes
        gate_bytes = gate.guest_table_bytes
        own = sub_bytes + gate_bytes + PAGE_SIZE + crossing.STACK_SIZE
        require_lockable(own)
        with MemoryFile(f"{name} contexts", own) as file:
            region = Region(file, 0, prefault=True)
        try:
            base = region.host_address
            env_at = sub_bytes + gate_bytes
            region.view(env_at, len(env))[:] = env
            sub = sub_plan(base + env_at, base + env_at + PAGE_SIZE)
            sub.place_guest_tables(region.view(0, sub_bytes), base)
            gate.place_guest_tables(region.view(sub_bytes, gate_bytes), base + sub_bytes)
            cost = AttachmentCost(gate.cost, sub.cost, own // PAGE_SIZE)
            attachment = cls(vcpu, _take_slot(vcpu), crossing_gva, cost, region)
        except BaseException:
            region.close()
            raise
        try:
            attachment._install(sub, gate, memory)
        except BaseException:
            _slots_in_use[vcpu].discard(attachment.slot)
            attachment.close()
            raise
        return attachment

    def _install(self, sub: ContextPlan, gate: ContextPlan, memory: RegisteredMemory) -> None:
        self._contexts.append(_create(self._vcpu, sub, None, memory))
        self._contexts.append(_create(self._vcpu, gate, self._contexts[0], None))
        calls.set_slot(self._vcpu, self.slot, self._contexts[1])
        self.attached = True

    def detach(self) -> None:
        """Take the object away from the vCPU, which must not be running. Harmless twice.

        Raises:
            InsideContextError: the vCPU stopped inside the object: run it until it is back, or
                `revoke`.
            VcpuRunningError: the vCPU runs.
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        self.require_own(f"detach() from vcpu {self._vcpu.id}")
        if self.attached:
            try:
                calls.set_slot(self._vcpu, self.slot, None)
            except KvmError as error:
                if error.errno == errno.EBUSY:
                    raise InsideContextError(
                        f"vcpu {self._vcpu.id} stopped inside the object",
                        "run it until it is back, or revoke() the attachment",
                    ) from error
                raise
            self.attached = False
            _slots_in_use[self._vcpu].discard(self.slot)
        self._release()

    def revoke(self) -> None:
        """Take the object away from the vCPU at once, running or not. Harmless twice.

        A vCPU that is inside the object stops there: its run() returns an `ElisaExit` with cause
        ``KVM_ELISA_EXIT_REVOKED``, and the caller decides what becomes of it. It is in its default
        context again, with cleared registers, and whatever the call was about to do to the object
        is not done. Others go on.

        Raises:
            IoctlError: it takes CAP_SYS_ADMIN (EPERM).
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        self.require_own(f"revoke() from vcpu {self._vcpu.id}")
        if self.attached:
            try:
                calls.revoke_slot(self._vcpu.vm, self._vcpu.id, self.slot)
            except IoctlError as error:
                if error.errno != errno.ENOENT:  # somebody has emptied the slot already
                    raise
            self.attached = False
            _slots_in_use[self._vcpu].discard(self.slot)
        self._release()

    def close(self) -> None:
        """Detach, or revoke if the vCPU is running or stopped inside. Harmless twice.

        Without CAP_SYS_ADMIN the kernel keeps what the vCPU still uses until the VM is closed. A
        forked process gives back its descriptors and mappings; the vCPU keeps the object.
        """
        try:
            if not self._vcpu.closed and not self.inherited:
                self.detach()
        except (InsideContextError, VcpuRunningError):
            with suppress(IoctlError):
                self.revoke()
        finally:
            self.attached = False
            self._release()

    def _release(self) -> None:
        while self._contexts:
            self._contexts.pop().close()
        self._memory.close()
