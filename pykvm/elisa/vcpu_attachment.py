"""One vCPU's access to one shared object: a sub context, a gate context, a slot of its list.

An `Attachment` has one for each vCPU of its guest. Each sub context has a stack and an environment
of its own, and maps the EPTP list page of its own vCPU: vCPUs that are in the object at the same
time share its memory and its image, and nothing else.
"""

import errno
import weakref
from collections.abc import Callable, Collection, Sequence
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

__all__ = [
    "AttachmentCost",
    "AttachmentParts",
    "InsideContextError",
    "SlotTakenError",
    "SlotsFullError",
    "VcpuAttachment",
    "free_slot",
]

FIRST_SLOT: Final[int] = uapi.lib.KVM_ELISA_SLOT_FIRST
SLOTS: Final[int] = uapi.lib.KVM_ELISA_SLOTS

_slots_in_use: "weakref.WeakKeyDictionary[Vcpu, set[int]]" = weakref.WeakKeyDictionary()


class SlotsFullError(PykvmError):
    """No slot is free in the EPTP lists of all vCPUs of a guest."""


class SlotTakenError(PykvmError):
    """The slot of an attachment holds another object on a vCPU that was added."""


class InsideContextError(PykvmError):
    """The vCPU stopped inside a context; only revoking takes that away from it now."""


@dataclass(frozen=True)
class AttachmentCost:
    """Pages of the two contexts of one vCPU, and of the memory made for it alone.

    The object's memory is not among them: it is registered once, for all attachments.
    """

    gate: ContextCost
    sub: ContextCost
    own: int


@dataclass(frozen=True)
class AttachmentParts:
    """Parts of the contexts of an attachment, which are the same for each vCPU of the guest.

    Attributes:
        name: name of the object and number of the guest, for the memory's name.
        image: offset, pages and access of each part of the object's image.
        gate_page: address of the gate page in this process.
        memory: shared memory and windows, registered.
        env: returns the ``struct elisa_env`` of the vCPU with this number in its guest.
        crossing_gva: crossing base.
        user: whether callers run in user mode.
        levels: levels of the guest's paging.
    """

    name: str
    image: Sequence[tuple[int, UserPages, Access]]
    gate_page: int
    memory: RegisteredMemory
    env: Callable[[int], bytes]
    crossing_gva: int
    user: bool
    levels: int

    def plan_gate(self) -> ContextPlan:
        return plan_gate(self.gate_page, self.crossing_gva, user=self.user, levels=self.levels)

    def plan_sub(self, env_page: int, stack: int) -> ContextPlan:
        return plan_sub(
            *(self.image, env_page, stack, self.memory.size, self.crossing_gva),
            user=self.user,
            levels=self.levels,
        )


def free_slot(vcpus: Collection[Vcpu]) -> int:
    """Return the lowest slot that is free in the lists of all these vCPUs.

    Raises:
        SlotsFullError: there is none.
    """
    used: set[int] = set().union(*(_slots_in_use.get(vcpu, set()) for vcpu in vcpus))
    for slot in range(FIRST_SLOT, SLOTS):
        if slot not in used:
            return slot
    ids = ", ".join(str(vcpu.id) for vcpu in vcpus)
    raise SlotsFullError(f"no slot is free on vcpu {ids}", "detach an object")


def _take_slot(vcpu: Vcpu, slot: int) -> None:
    used = _slots_in_use.setdefault(vcpu, set())
    if slot in used:
        raise SlotTakenError(
            f"slot {slot} of vcpu {vcpu.id} holds another object", "detach that object first"
        )
    used.add(slot)


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


class VcpuAttachment(Closeable):
    """One vCPU's access to one object.

    Attributes:
        vcpu: the vCPU.
        slot: slot of the gate context in the vCPU's EPTP list.
        cost: pages that it takes.
        attached: whether the vCPU can enter the object.
    """

    def __init__(self, vcpu: Vcpu, slot: int, cost: AttachmentCost, memory: Region) -> None:
        self.vcpu = vcpu
        self._memory = memory
        self._contexts: list[Context] = []
        self.slot = slot
        self.cost = cost
        self.attached = False

    @classmethod
    def make(cls, vcpu: Vcpu, number: int, slot: int, parts: AttachmentParts) -> Self:
        """Plan both contexts, create them, and put the gate into the vCPU's list.

        Args:
            vcpu: the vCPU.
            number: number of the vCPU in its guest.
            slot: slot for the gate.
            parts: parts of the contexts.
        """
        gate = parts.plan_gate()
        # How many guest tables the sub context needs does not depend on where its pages lie, so
        # a first plan with placeholders tells how much memory to make.
        sub_bytes = parts.plan_sub(0, 0).guest_table_bytes
        gate_bytes = gate.guest_table_bytes
        own = sub_bytes + gate_bytes + PAGE_SIZE + crossing.STACK_SIZE
        require_lockable(own)
        with MemoryFile(f"{parts.name} contexts", own) as file:
            region = Region(file, 0, prefault=True)
        try:
            base = region.host_address
            env = parts.env(number)
            env_at = sub_bytes + gate_bytes
            region.view(env_at, len(env))[:] = env
            sub = parts.plan_sub(base + env_at, base + env_at + PAGE_SIZE)
            sub.place_guest_tables(region.view(0, sub_bytes), base)
            gate.place_guest_tables(region.view(sub_bytes, gate_bytes), base + sub_bytes)
            cost = AttachmentCost(gate.cost, sub.cost, own // PAGE_SIZE)
            _take_slot(vcpu, slot)
        except BaseException:
            region.close()
            raise
        attachment = cls(vcpu, slot, cost, region)
        try:
            attachment._install(sub, gate, parts.memory)
        except BaseException:
            _slots_in_use[vcpu].discard(slot)
            attachment.close()
            raise
        return attachment

    def _install(self, sub: ContextPlan, gate: ContextPlan, memory: RegisteredMemory) -> None:
        self._contexts.append(_create(self.vcpu, sub, None, memory))
        self._contexts.append(_create(self.vcpu, gate, self._contexts[0], None))
        calls.set_slot(self.vcpu, self.slot, self._contexts[1])
        self.attached = True

    def detach(self) -> None:
        """Take the object away from the vCPU, which must not be running. Harmless twice.

        Raises:
            InsideContextError: the vCPU stopped inside the object: run it until it is back, or
                `revoke`.
            VcpuRunningError: the vCPU runs.
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        self.require_own(f"detach() from vcpu {self.vcpu.id}")
        if self.attached:
            try:
                calls.set_slot(self.vcpu, self.slot, None)
            except KvmError as error:
                if error.errno == errno.EBUSY:
                    raise InsideContextError(
                        f"vcpu {self.vcpu.id} stopped inside the object",
                        "run it until it is back, or revoke() the attachment",
                    ) from error
                raise
            self.attached = False
            _slots_in_use[self.vcpu].discard(self.slot)
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
        self.require_own(f"revoke() from vcpu {self.vcpu.id}")
        if self.attached:
            try:
                calls.revoke_slot(self.vcpu.vm, self.vcpu.id, self.slot)
            except IoctlError as error:
                if error.errno != errno.ENOENT:  # somebody has emptied the slot already
                    raise
            self.attached = False
            _slots_in_use[self.vcpu].discard(self.slot)
        self._release()

    def close(self) -> None:
        """Detach, or revoke if the vCPU is running or stopped inside. Harmless twice.

        Without CAP_SYS_ADMIN the kernel keeps what the vCPU still uses until the VM is closed. A
        forked process gives back its descriptors and mappings; the vCPU keeps the object.
        """
        try:
            if not self.vcpu.closed and not self.inherited:
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
