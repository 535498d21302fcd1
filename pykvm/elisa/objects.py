"""Shared objects: memory that several guests share, and the trusted code that alone accesses it.

An object is declared once, opened once, and attached to any number of guests, each with all of its
vCPUs::

    counter = SharedObject("counter", "counter.c", shared=4096, window=4096, guests=2)
    with counter.open() as instance:
        attachment = instance.attach(guest)
        ...                      # the guest calls elisa_call(a0, a1, a2, attachment.slot)
        attachment.detach()
"""

import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Final, Self

from pykvm.closeable import Closeable
from pykvm.elisa import calls, crossing
from pykvm.elisa.attachment import Attachment
from pykvm.elisa.calls import RegisteredMemory
from pykvm.elisa.contexts import READ, READ_EXECUTE, READ_WRITE, UserPages
from pykvm.elisa.guest import Guest
from pykvm.elisa.protections import ALL, NOTHING_EXTRA, Extra, Protection, needed
from pykvm.elisa.trusted_images import ImagePart, SubImage, build_object, crossing_images
from pykvm.elisa.vcpu_attachment import AttachmentParts
from pykvm.errors import PykvmError
from pykvm.kvm import Handle, Vcpu
from pykvm.memory.huge_pages import collapse
from pykvm.memory.limits import require_lockable
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "GuestNumberError",
    "ObjectInstance",
    "ObjectSizeError",
    "SharedObject",
    "UnansweredWeaknessError",
]

# struct elisa_env in guest/include/elisa_object.h: shared, its size, windows, size of one,
# the calling guest's number, number of windows, the calling vCPU's number, most vCPUs of a guest.
ENV: Final = struct.Struct("<QQQQIIII")

MAX_GUESTS: Final = 64
MAX_VCPUS: Final = 64  # of one guest


class ObjectSizeError(PykvmError, ValueError):
    """A shared object with impossible sizes."""


class UnansweredWeaknessError(PykvmError):
    """An object without a protection that this processor needs."""


class GuestNumberError(PykvmError, ValueError):
    """A guest number that an object does not have, or that is attached already."""


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE)


@dataclass(frozen=True)
class SharedObject:
    """Declaration of a shared object.

    Attributes:
        name: name of the object, for messages.
        source: one C source file or several; they include "elisa_object.h" and define
            ``elisa_serve``.
        shared: bytes of memory that only the object's code can access, rounded up to whole pages.
        window: bytes of each guest's window, which that guest's default context maps too, rounded
            up to whole pages.
        guests: number of windows, 1 to 64.
        vcpus: most vCPUs of one guest that may be in the object at once, 1 to 64. The object's code
            has to allow for it: what it keeps for its caller, in shared memory or in the window,
            is then the vCPU's that the environment names, and not the guest's. A guest with more
            vCPUs is refused.
        without: protections to leave out, for measurements and controls only.
        extra: protections for weak processors; by default those that this one needs when the object
            is opened.

    Raises:
        ObjectSizeError: the sizes, the number of guests or that of vCPUs are not possible.
    """

    name: str
    source: str | PathLike[str] | Sequence[str | PathLike[str]]
    shared: int = PAGE_SIZE
    window: int = PAGE_SIZE
    guests: int = 2
    vcpus: int = 1
    without: Collection[Protection] = ALL
    extra: Collection[Protection] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.guests <= MAX_GUESTS:
            raise ObjectSizeError(f"{self.guests} guests for {self.name}", f"use 1 to {MAX_GUESTS}")
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ObjectSizeError(
                f"{self.vcpus} vcpus of a guest for {self.name}", f"use 1 to {MAX_VCPUS}"
            )
        if self.shared < 0 or self.window < 0:
            raise ObjectSizeError(f"negative memory for {self.name}", "use 0 or more bytes")
        if not self.memory_size:
            raise ObjectSizeError(f"no memory for {self.name}", "give it shared memory or windows")
        if self.memory_size > crossing.MAX_MEMORY:
            raise ObjectSizeError(
                f"{self.memory_size >> 20} MiB for {self.name}",
                f"use at most {crossing.MAX_MEMORY >> 30} GiB for shared memory and windows",
            )

    @property
    def sources(self) -> list[Path]:
        if isinstance(self.source, str | PathLike):
            return [Path(self.source)]
        return [Path(one) for one in self.source]

    @property
    def window_size(self) -> int:
        """Bytes of one window, in whole pages."""
        return _pages(self.window) * PAGE_SIZE

    @property
    def windows_offset(self) -> int:
        """Offset of window 0 in the object's memory."""
        return _pages(self.shared) * PAGE_SIZE

    @property
    def memory_size(self) -> int:
        """Bytes of the object's memory: shared memory, then all windows."""
        return self.windows_offset + self.guests * self.window_size

    def env(self, base: int, guest: int, vcpu: int = 0) -> bytes:
        """Return the ``struct elisa_env`` for one vCPU of a guest.

        Args:
            base: address of the object's memory where the object runs: in a sub context, in the
                VMM, or in a guest.
            guest: number of the guest.
            vcpu: number of the vCPU in the guest.
        """
        return ENV.pack(
            base,
            _pages(self.shared) * PAGE_SIZE,
            base + self.windows_offset,
            self.window_size,
            guest,
            self.guests,
            vcpu,
            self.vcpus,
        )

    def open(self) -> "ObjectInstance":
        """Compile the object, or take it from the cache, and allocate its memory.

        Raises:
            MemoryTooSmallError: there is not enough memory.
            PykvmError: see `pykvm.elisa.trusted_images.build_object`.
        """
        extra = needed() if self.extra is None else frozenset(self.extra)
        image = build_object(self.sources, without=frozenset(self.without), extra=extra)
        return ObjectInstance(self, image, extra)


@dataclass
class _Image:
    """Image of an object in memory, which all of its sub contexts map.

    There are both builds of the sub entry page, of which a context maps one.
    """

    region: Region
    common: list[tuple[int, UserPages, Access]] = field(default_factory=list)
    gate_page: int = 0
    entries: dict[bool, bytes] = field(default_factory=dict)
    entry_pages: dict[bool, UserPages] = field(default_factory=dict)
    rest: tuple[ImagePart, ...] = ()

    @classmethod
    def load(cls, name: str, image: SubImage, gate: bytes) -> Self:
        size = sum(len(part.data) for part in image.parts) + 2 * PAGE_SIZE
        with MemoryFile(f"{name} image", size) as file:
            region = Region(file, 0)
        loaded = cls(region, rest=image.parts[1:])
        address = region.host_address
        loaded.gate_page = address
        region.view(0, PAGE_SIZE)[:] = gate
        for number, user in enumerate((False, True), 1):
            loaded.entry_pages[user] = UserPages(address + number * PAGE_SIZE)
        loaded.add_entry(False, image)
        at = 3 * PAGE_SIZE
        for part in loaded.rest:
            region.view(at, len(part.data))[:] = part.data
            access = READ_WRITE if part.writable else READ_EXECUTE if part.executable else READ
            pages = UserPages(address + at, len(part.data) // PAGE_SIZE)
            loaded.common.append((part.offset, pages, access))
            at += len(part.data)
        return loaded

    def add_entry(self, user: bool, image: SubImage) -> None:
        entry = image.parts[0]
        if entry.offset != crossing.SUB_ENTRY_OFFSET or image.parts[1:] != self.rest:
            raise ValueError("images of one object differ in more than their sub entry page")
        at = self.entry_pages[user].address - self.region.host_address
        self.region.view(at, PAGE_SIZE)[:] = entry.data
        self.entries[user] = entry.data

    def parts(self, user: bool) -> list[tuple[int, UserPages, Access]]:
        entry = (crossing.SUB_ENTRY_OFFSET, self.entry_pages[user], READ_EXECUTE)
        return [entry, *self.common]


class ObjectInstance(Closeable):
    """An open shared object: its memory, its code, and the guests attached to it.

    Attributes:
        declaration: its declaration.
        extra: its protections for weak processors.
        memory: shared memory and windows, mapped in this process.
        symbols: offsets of the object's symbols from the crossing base.
    """

    def __init__(
        self, declaration: SharedObject, image: SubImage, extra: Extra = NOTHING_EXTRA
    ) -> None:
        self.declaration = declaration
        self.extra = extra
        self.symbols = image.symbols
        self._file = MemoryFile(declaration.name, declaration.memory_size)
        self._registered: RegisteredMemory | None = None
        self._attachments: dict[int, Attachment] = {}
        try:
            self.memory = Region(self._file, 0)
            gate = crossing_images(frozenset(declaration.without)).gate_page
            self._image = _Image.load(declaration.name, image, gate)
        except BaseException:
            self._file.close()
            raise

    @property
    def shared(self) -> memoryview:
        """The object's shared memory, live."""
        return self.memory.view(0, _pages(self.declaration.shared) * PAGE_SIZE)

    @property
    def sub_entry_page(self) -> bytes:
        """The page of trusted code at which every call from kernel mode begins."""
        return self._image.entries[False]

    def window(self, guest: int) -> memoryview:
        """Return a live view of a guest's window.

        Raises:
            GuestNumberError: there is no such guest.
            ObjectSizeError: the object has no windows.
        """
        self._check_window(guest)
        size = self.declaration.window_size
        return self.memory.view(self.declaration.windows_offset + guest * size, size)

    def window_region(self, guest: int, gpa: int) -> Region:
        """Return a guest's window as a region at `gpa`, for its default context.

        Raises:
            GuestNumberError: there is no such guest.
            ObjectSizeError: the object has no windows.
        """
        self._check_window(guest)
        size = self.declaration.window_size
        offset = self.declaration.windows_offset + guest * size
        return Region(self._file, gpa, offset=offset, size=size)

    def direct_region(self, gpa: int) -> Region:
        """Return all of the object's memory as a region at `gpa`.

        It is for the directly mapped baseline, which isolates nothing.
        """
        return Region(self._file, gpa)

    def register(self, system: Handle) -> RegisteredMemory:
        """Register the object's memory with the kernel, which pins and charges it once.

        The first attachment does it. Call it before to pay for it at another time, or so that
        processes that are forked afterwards share it, each with guests of its own. The memory
        consists of 2 MiB pages as far as the host has some (`pykvm.memory.huge_pages`).

        Args:
            system: the `Kvm`, or any handle that was made from it.

        Returns:
            The registered memory, the same at every call while its `Kvm` is open.

        Raises:
            LockLimitError: this process may not pin so much memory.
            KvmError: the kernel refuses the call.
        """
        if self._registered is None or self._registered.closed:
            require_lockable(self.memory.size)
            collapse(self._file)
            self._registered = calls.register_memory(
                system.system, self.memory.host_address, self.memory.size
            )
        return self._registered

    def attach(self, guest: Guest, number: int | None = None, *, user: bool = False) -> Attachment:
        """Attach a guest: its vCPUs gain the object, and it gets its window and its slot.

        If the call fails, nothing stays attached.

        Args:
            guest: the guest, no vCPU of which may be running.
            number: the guest's number in the object; by default the lowest that is free.
            user: whether callers run in user mode (CPL 3), instead of kernel mode.

        Raises:
            GuestNumberError: no number is free, or this one is not.
            TooManyVcpusError: the guest has more vCPUs than the object takes.
            UnansweredWeaknessError: this processor needs a protection that the object has not.
            PykvmError: see `attach_vcpu` and the guest's `Guest.join`.
        """
        if number is None:
            number = self._free_number()
        with self._nothing_stays_registered():
            attachment = self._attach(
                guest.vcpus,
                number,
                crossing_gva=guest.crossing_gva,
                user=user,
                levels=guest.paging_levels,
            )
            try:
                window = None
                if self.declaration.window:
                    window = self.window_region(number, guest.next_window_gpa())
                images = crossing_images(frozenset(self.declaration.without))
                guest.join(images, attachment, window, user=user)
            except BaseException:
                attachment.close()
                raise
        return attachment

    @contextmanager
    def _nothing_stays_registered(self) -> Iterator[None]:
        """Give registered memory back if what is done fails and was the first to need it."""
        before = self._registered
        try:
            yield
        except BaseException:
            if self._registered is not None and self._registered is not before:
                self._registered.close()
            raise

    def attach_vcpu(
        self,
        vcpu: Vcpu,
        number: int,
        *,
        crossing_gva: int = crossing.CROSSING_GVA,
        user: bool = False,
        levels: int = 4,
    ) -> Attachment:
        """Attach a guest of one vCPU; the guest itself is told nothing.

        If the call fails, nothing stays attached.

        Args:
            vcpu: the vCPU.
            number: the guest's number in the object.
            crossing_gva: GVA at which the guest maps its entry page.
            user: whether callers run in user mode (CPL 3), instead of kernel mode.
            levels: levels of the guest's paging, 5 with CR4.LA57.

        Raises:
            GuestNumberError: the object has no such guest, or it is attached already.
            UnansweredWeaknessError: this processor needs a protection that the object has not.
            CrossingBaseError: the crossing area cannot be there.
            SlotsFullError: the vCPU's EPTP list has no free slot.
            VcpuRunningError: the vCPU runs.
            LockLimitError: this process may not pin enough memory.
            KvmError: the kernel refuses a call.
            PykvmError: see `pykvm.elisa.trusted_images.build_object`, for callers in user mode.
        """
        with self._nothing_stays_registered():
            return self._attach([vcpu], number, crossing_gva=crossing_gva, user=user, levels=levels)

    def _attach(
        self, vcpus: Sequence[Vcpu], number: int, *, crossing_gva: int, user: bool, levels: int
    ) -> Attachment:
        self._check_guest(number)
        if self._is_attached(number):
            raise GuestNumberError(
                f"guest {number} of {self.declaration.name} is attached already", "detach it first"
            )
        if lacks := needed() - self.extra:
            raise UnansweredWeaknessError(
                f"{self.declaration.name} was built without what this processor needs: "
                f"{', '.join(sorted(one.name.lower() for one in lacks))}",
                "open it without extra= in its declaration, or accept these weaknesses as "
                "`pykvm doctor` says",
            )
        if user and user not in self._image.entries:
            left_out = frozenset(self.declaration.without)
            image = build_object(
                self.declaration.sources, user=True, without=left_out, extra=self.extra
            )
            self._image.add_entry(user, image)
        base = crossing_gva + crossing.SHARED_OFFSET
        parts = AttachmentParts(
            name=f"{self.declaration.name} {number}",
            image=self._image.parts(user),
            gate_page=self._image.gate_page,
            memory=self.register(vcpus[0]),
            env=lambda vcpu: self.declaration.env(base, number, vcpu),
            crossing_gva=crossing_gva,
            user=user,
            levels=levels,
        )
        attachment = Attachment.make(vcpus, parts, most=self.declaration.vcpus)
        self._attachments[number] = attachment
        return attachment

    def _is_attached(self, number: int) -> bool:
        return number in self._attachments and self._attachments[number].attached

    def _free_number(self) -> int:
        for number in range(self.declaration.guests):
            if not self._is_attached(number):
                return number
        raise GuestNumberError(
            f"{self.declaration.name} has {self.declaration.guests} guests already",
            "detach one, or declare more guests",
        )

    def _check_guest(self, guest: int) -> None:
        if not 0 <= guest < self.declaration.guests:
            raise GuestNumberError(
                f"{self.declaration.name} has no guest {guest}",
                f"use 0 to {self.declaration.guests - 1}, or declare more guests",
            )

    def _check_window(self, guest: int) -> None:
        self._check_guest(guest)
        if not self.declaration.window:
            raise ObjectSizeError(
                f"{self.declaration.name} has no windows",
                f"declare it with window={PAGE_SIZE} or more",
            )

    def close(self) -> None:
        """Detach all guests and release the memory.

        The object is revoked from vCPUs that run, or stopped inside it (`Attachment.revoke`). In a
        forked process no guest is detached (`Attachment.close`).
        """
        for attachment in self._attachments.values():
            attachment.close()
        self._attachments.clear()
        if self._registered is not None:
            self._registered.close()
        self.memory.close()
        self._image.region.close()
        self._file.close()
