"""A guest's access to one shared object, by each of its vCPUs."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Self

from pykvm.closeable import Closeable
from pykvm.elisa.vcpu_attachment import AttachmentCost, AttachmentParts, VcpuAttachment, free_slot
from pykvm.errors import PykvmError
from pykvm.kvm import Vcpu

__all__ = ["Attachment", "TooManyVcpusError", "attach_added_vcpu", "check_vcpus"]


class TooManyVcpusError(PykvmError, ValueError):
    """A guest with more vCPUs than an object may be entered by at once."""


class Attachment(Closeable):
    """A guest's access to one object: what `ObjectInstance.attach` returns.

    Each vCPU of the guest has contexts of its own, behind the same slot of its own EPTP list. All
    of them are the same guest to the object, with one window.

    Attributes:
        slot: slot of the gate contexts in the EPTP lists, the last argument of ``elisa_call``.
        most: most vCPUs that it takes: `SharedObject.vcpus`.
    """

    def __init__(self, parts: AttachmentParts, slot: int, most: int) -> None:
        self._parts = parts
        self._vcpus: list[VcpuAttachment] = []
        self.slot = slot
        self.most = most

    @classmethod
    def make(cls, vcpus: Sequence[Vcpu], parts: AttachmentParts, *, most: int) -> Self:
        """Attach all vCPUs of a guest, or none.

        Args:
            vcpus: the vCPUs, none of which may be running, in the order of their numbers.
            parts: parts of the contexts.
            most: see the attribute.
        """
        check_vcpus(len(vcpus), parts.name, most)
        attachment = cls(parts, free_slot(vcpus), most)
        try:
            for vcpu in vcpus:
                attachment.add_vcpu(vcpu)
        except BaseException:
            attachment.close()
            raise
        return attachment

    @property
    def crossing_gva(self) -> int:
        """GVA at which the guest maps its entry page, and 0x3000 further on its return page."""
        return self._parts.crossing_gva

    @property
    def cost(self) -> AttachmentCost:
        """Pages that it takes for each vCPU."""
        return self._vcpus[0].cost

    @property
    def attached(self) -> bool:
        """True while any vCPU of the guest can enter the object."""
        return any(one.attached for one in self._vcpus)

    @property
    def complete(self) -> bool:
        """True while all vCPUs of the guest can enter the object; only then it takes another."""
        return all(one.attached for one in self._vcpus)

    @property
    def vcpus(self) -> tuple[VcpuAttachment, ...]:
        """Access of each vCPU, in the order of their numbers."""
        return tuple(self._vcpus)

    def check_another(self) -> None:
        """Check that the object takes one vCPU more of this guest.

        Raises:
            TooManyVcpusError: it does not.
        """
        check_vcpus(len(self._vcpus) + 1, self._parts.name, self.most)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """Attach one more vCPU of the guest, which must not be running, at the same slot.

        If the call fails, the vCPU does not have the object, and the others keep it.

        Raises:
            RuntimeError: the object was detached, be it from one vCPU.
            TooManyVcpusError: the object takes no more vCPUs of a guest.
            SlotTakenError: another object is at that slot of the vCPU.
            LockLimitError: this process may not pin enough memory.
            KvmError: the kernel refuses a call.
        """
        if not self.complete:
            raise RuntimeError("the object was detached: attach it again")
        self.check_another()
        number = len(self._vcpus)
        self._vcpus.append(VcpuAttachment.make(vcpu, number, self.slot, self._parts))

    def remove_vcpu(self, vcpu: Vcpu) -> None:
        """Take the object away from the vCPU that was added last, and from no other."""
        if self._vcpus[-1].vcpu is not vcpu:
            raise ValueError(f"vcpu {vcpu.id} was not the last to be added")
        self._vcpus.pop().close()

    def detach(self) -> None:
        """Take the object away from the guest, no vCPU of which may be running. Harmless twice.

        If one vCPU cannot give it up, the others lose it all the same: call again, or `revoke`.
        The guest's window and number stay taken until no vCPU has the object.

        Raises:
            InsideContextError: a vCPU stopped inside the object: run it until it is back, or
                `revoke`.
            VcpuRunningError: a vCPU runs.
            ForkedProcessError: the guest belongs to the parent process.
        """
        self._each(VcpuAttachment.detach)

    def revoke(self) -> None:
        """Take the object away from the guest at once, running or not. Harmless twice.

        A vCPU that is inside the object stops there: its run() returns an `ElisaExit` with cause
        ``KVM_ELISA_EXIT_REVOKED``, and the caller decides what becomes of it. It is in its default
        context again, with cleared registers, and whatever the call was about to do to the object
        is not done. Other guests go on. If a call fails for one vCPU, the others lose the object
        all the same.

        Raises:
            IoctlError: it takes CAP_SYS_ADMIN (EPERM).
            ForkedProcessError: the guest belongs to the parent process.
        """
        self._each(VcpuAttachment.revoke)

    def close(self) -> None:
        """Detach each vCPU, or revoke where it is running or stopped inside. Harmless twice.

        Without CAP_SYS_ADMIN the kernel keeps what a vCPU still uses until the VM is closed. A
        forked process gives back its descriptors and mappings; the guest keeps the object.
        """
        self._each(VcpuAttachment.close)

    def _each(self, act: Callable[[VcpuAttachment], None]) -> None:
        """Do something for each vCPU; raise the first error at the end."""
        errors: list[Exception] = []
        for one in self._vcpus:
            try:
                act(one)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def attach_added_vcpu(attachments: Iterable[Attachment], vcpu: Vcpu) -> None:
    """Attach a vCPU that was added to a guest to all objects that the guest has, or to none.

    Args:
        attachments: attachments of the guest; those that are not complete do not count.
        vcpu: the vCPU, which must not be running.

    Raises:
        PykvmError: see `Attachment.add_vcpu`.
    """
    with ExitStack() as undo:
        for attachment in attachments:
            if attachment.complete:
                attachment.add_vcpu(vcpu)
                undo.callback(attachment.remove_vcpu, vcpu)
        undo.pop_all()


def check_vcpus(vcpus: int, name: str, most: int) -> None:
    """Check that so many vCPUs of a guest may be in an object at once.

    Args:
        vcpus: number of vCPUs.
        name: name of the object, for the message.
        most: `SharedObject.vcpus`.

    Raises:
        TooManyVcpusError: they may not.
    """
    if vcpus > most:
        raise TooManyVcpusError(
            f"{vcpus} vcpus of a guest for {name}, whose code may be entered by {most}",
            f"give the guest {most}, or declare the object with vcpus={vcpus} if its code allows",
        )
