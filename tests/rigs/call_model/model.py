"""Model of the patch's calls, from kernel-patches/README.md alone, for test_call_sequences.py.

The model keeps no reference counts. It computes anew each time what is alive: from the open files,
from the contents of slots, and from the references between contexts.
"""

import errno
import functools
import os
import struct
from collections import Counter
from dataclasses import dataclass, field

from pykvm.kernel import uapi
from tests.rigs.context_requests import EPTP, LARGE, LIST, PAGE, USER, WB, R, Request, W, X
from tests.rigs.tiny_guest import ARENA_PAGES, FLAGS, TABLES_LAST, Arena, Kind, RunArea

HIGHEST_VCPU_ID = 2**31 - 1


@dataclass(eq=False)
class OpenFile:
    """A file of the kernel, and what keeps it open.

    Attributes:
        name: for messages.
    """

    name: str
    fds: list[int] = field(default_factory=list)
    sent: int = 0
    """Number of times that it is in flight in a socket."""
    area: RunArea | None = None

    @property
    def open(self) -> bool:
        return bool(self.fds or self.sent or self.area)


@dataclass(eq=False)
class MemoryModel:
    """Registered memory: the arena of a VM, less than 2 MiB."""

    file: OpenFile
    pages: int = ARENA_PAGES
    tables: int = 2


@dataclass(eq=False)
class ContextModel:
    """A context.

    Attributes:
        kind: None if its code is unknown.
        list_of: the vCPUs whose list it maps.
        tables_free: True if its address range contains no descriptor table of a prepared vCPU.
    """

    file: OpenFile
    vm: "VmModel"
    kind: Kind | None
    tables: int
    user_pages: int
    la57: bool = False
    tables_free: bool = True
    target: "ContextModel | None" = None
    list_of: set[int] = field(default_factory=set)
    memories: list[MemoryModel] = field(default_factory=list)

    @property
    def lists(self) -> set[int]:
        return self.list_of | (self.target.list_of if self.target else set())

    def leads_to(self, place: "ContextModel") -> int | None:
        """Return the KVM_ELISA_AT_* value of a vCPU that reached `place` through this context."""
        if self is place:
            return int(uapi.lib.KVM_ELISA_AT_GATE)
        return int(uapi.lib.KVM_ELISA_AT_SUB) if self.target is place else None


@dataclass
class Inside:
    """Place outside its default context at which a vCPU stopped.

    Attributes:
        stuck: cause and VMX exit reason of the exit that it takes whenever it runs; None in a loop.
        home: offset of the HLT at which it arrives after leaving the context.
    """

    place: ContextModel
    stuck: tuple[int, int] | None = None
    home: int = 0


@dataclass(eq=False)
class VcpuModel:
    file: OpenFile
    vm: "VmModel"
    id: int
    slots: dict[int, ContextModel] = field(default_factory=dict)
    has_list: bool = False
    inside: Inside | None = None
    report: tuple[int, int] | None = None
    """Place and slot that the next KVM_RUN reports because they were revoked."""

    def find(self, place: ContextModel, slots: dict[int, ContextModel]) -> tuple[int, int] | None:
        """Return place (KVM_ELISA_AT_*) and slot of the first of `slots` that leads to `place`."""
        for slot in sorted(slots):
            at = slots[slot].leads_to(place)
            if at is not None:
                return at, slot
        return None

    @property
    def vmfunc_works(self) -> bool:
        """True if VMFUNC works on a prepared vCPU, which has no LA57 (I5, I8)."""
        reached = [c for gate in self.slots.values() for c in (gate, gate.target) if c]
        return self.has_list and all(c.tables_free and not c.la57 for c in reached)

    def set_slot_errors(self, slot: int, context: ContextModel | None, fd_error: int) -> set[int]:
        """Return the errors of which KVM_ELISA_SET_SLOT may return one; if empty, it must succeed.

        Args:
            fd_error: errno for a bad descriptor, 0 for a good one.
        """
        errors = {fd_error} - {0}
        if not self.vm.enabled or not 2 <= slot < 512:
            errors.add(errno.EINVAL)
        if self.inside:
            errors.add(errno.EBUSY)
        if context:
            others = [c for n, c in self.slots.items() if n != slot]
            if (
                context.vm is not self.vm
                or any(other.la57 != context.la57 for other in others)
                or (context.target and context.target.la57 != context.la57)
                or context.lists - {self.id}
            ):
                errors.add(errno.EINVAL)
        return errors

    def set_slot(self, slot: int, context: ContextModel | None) -> None:
        self.has_list = True
        self.slots.pop(slot, None)
        if context:
            self.slots[slot] = context

    def revoke(self, slot: int) -> bool:
        """Revoke a slot, or all of them for 0; return whether there was anything to revoke."""
        gone = {n: c for n, c in self.slots.items() if slot in (0, n)}
        for number in gone:
            del self.slots[number]
        if self.inside and not self.find(self.inside.place, self.slots):
            self.report = self.find(self.inside.place, gone)
            self.inside = None
        return bool(gone)


@dataclass(eq=False)
class VmModel:
    file: OpenFile
    arena: Arena
    enabled: bool = False
    most_contexts: int = 0
    most_pages: int = 0
    has_memory: bool = False
    memory: str = "there"
    """State of the arena: "there", "read-only", or "gone"."""
    vcpus: dict[int, VcpuModel] = field(default_factory=dict)
    contexts: list[ContextModel] = field(default_factory=list)

    @property
    def files(self) -> list[OpenFile]:
        vcpus = (vcpu.file for vcpu in self.vcpus.values())
        contexts = (context.file for context in self.contexts)
        return [file for file in (self.file, *vcpus, *contexts) if file.open]

    @property
    def guest_runs(self) -> bool:
        """True if the guest can execute its program.

        Page walks of a vCPU count as writes (SDM vol. 3C, 29.3.5), so read-only pages are not
        enough.
        """
        return self.has_memory and self.memory == "there"

    def live_contexts(self) -> list[ContextModel]:
        """Return the contexts that the kernel must still hold, and no others."""
        if not self.files:
            return []  # vCPUs are freed with their VM
        held = {c for c in self.contexts if c.file.open}
        for vcpu in self.vcpus.values():
            held.update(vcpu.slots.values())
        held.update({c.target for c in held if c.target})
        return [c for c in self.contexts if c in held]

    def pages(self) -> int:
        """Return the number of tables and pinned pages."""
        return sum(c.tables + c.user_pages for c in self.live_contexts())

    def enable_errors(self, flags: int, limits: tuple[int, ...]) -> set[int]:
        if flags & ~3:
            return {errno.EINVAL}
        if flags & uapi.lib.KVM_ELISA_CONTEXTS and (self.vcpus or any(limits[2:])):
            return {errno.EINVAL}
        return set()

    def enable(self, flags: int, limits: tuple[int, ...]) -> None:
        if flags & uapi.lib.KVM_ELISA_CONTEXTS:
            self.enabled = True
            self.most_contexts = limits[0] or uapi.lib.KVM_ELISA_DEFAULT_CONTEXTS
            self.most_pages = limits[1] or uapi.lib.KVM_ELISA_DEFAULT_PAGES

    def revoke_errors(self, vcpu_id: int, slot: int) -> set[int]:
        if not self.enabled or vcpu_id > HIGHEST_VCPU_ID or slot == 1 or slot >= 512:
            return {errno.EINVAL}
        vcpu = self.vcpus.get(vcpu_id)
        nothing = not vcpu or not (vcpu.slots if slot == 0 else slot in vcpu.slots)
        return {errno.ENOENT} if nothing else set()


# ---- creating a context --------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A request as the kernel should see it.

    Attributes:
        errors: errors of which the call may return one; if empty, it must succeed.
        tables: tables that it would cost.
        user_pages: user pages that it would cost.
    """

    errors: set[int]
    tables: int
    user_pages: int


def check_request(vm: VmModel, request: Request, files: dict[int, object]) -> Checked:
    """Predict the result of KVM_ELISA_CREATE_CONTEXT.

    Args:
        files: open files of this process by descriptor; a context is a ContextModel.
    """
    fields = request.fields
    if not vm.enabled:
        return Checked({errno.EINVAL}, 0, 0)
    nr_tables = fields.get("nr_tables", len(request.tables))
    nr_pages = fields.get("nr_pages", len(request.pages))
    nr_parts = fields.get("nr_parts", len(request.parts))
    tables, pages = request.tables[:nr_tables], request.pages[:nr_pages]
    errors = _field_errors(fields, nr_tables, nr_pages, nr_parts)
    for fd, index in request.parts:
        errors |= _part_errors(files.get(fd), index)
    user_pages = sum(kind == USER for _, kind, _ in pages)
    for page in pages:
        errors |= _page_errors(vm, page, files)
    lists = {ref for _, kind, ref in pages if kind == LIST}
    if len(lists) > 1 or not _tables_are_good(tables, pages, nr_parts):
        errors.add(errno.EINVAL)
    if (
        len(vm.live_contexts()) >= vm.most_contexts
        or vm.pages() + nr_tables + user_pages > vm.most_pages
    ):
        errors.add(errno.ENOSPC)
    return Checked(errors, nr_tables, user_pages)


def _field_errors(fields: dict[str, int], nr_tables: int, nr_pages: int, nr_parts: int) -> set[int]:
    errors = set()
    gva, size = fields.get("gva", 1 << 40), fields.get("size", PAGE)
    if (
        fields.get("flags", 0) & ~1
        or fields.get("reserved")
        or (fields.get("parts") and not nr_parts)
        or (gva | size) % PAGE
        or not size
        or gva + size > 1 << 64
        or not nr_tables
        or not nr_pages
    ):
        errors.add(errno.EINVAL)
    if (
        nr_tables > uapi.lib.KVM_ELISA_MAX_TABLES
        or nr_pages > uapi.lib.KVM_ELISA_MAX_PAGES
        or nr_parts > uapi.lib.KVM_ELISA_MAX_PARTS
    ):
        errors.add(errno.E2BIG)
    if {"tables", "pages", "parts"} & fields.keys():  # only these tests put bad pointers there
        errors.add(errno.EFAULT)
    return errors


def _part_errors(memory: object, index: int) -> set[int]:
    if memory is None:
        return {errno.EBADF}
    return set() if isinstance(memory, MemoryModel) and index == 0 else {errno.EINVAL}


def _page_errors(vm: VmModel, page: tuple[int, int, int], files: dict[int, object]) -> set[int]:
    address, kind, ref = page
    if kind == USER:
        errors = {errno.EINVAL} if ref or address % PAGE else set()
        inside = vm.arena.address <= address < vm.arena.address + ARENA_PAGES * PAGE
        if address != FLAGS and (not inside or vm.memory != "there"):
            errors.add(errno.EFAULT)
        return errors
    if kind not in (LIST, EPTP) or address:
        return {errno.EINVAL}
    return _list_errors(vm, ref) if kind == LIST else _target_errors(vm, files.get(ref))


def _list_errors(vm: VmModel, vcpu_id: int) -> set[int]:
    if vcpu_id < 0:
        return {errno.EINVAL}
    return set() if vcpu_id in vm.vcpus else {errno.ENOENT}


def _target_errors(vm: VmModel, target: object) -> set[int]:
    if target is None:
        return {errno.EBADF}
    if not isinstance(target, ContextModel) or target.vm is not vm:
        return {errno.EINVAL}
    return {errno.ELOOP} if target.target else set()


@functools.lru_cache(maxsize=64)
def _entries(table: bytes) -> tuple[int, ...]:
    """Return the entries that are not zero."""
    return tuple(word for word in struct.unpack("<512Q", table) if word)


def _tables_are_good(tables: list[bytes], pages: list[tuple[int, int, int]], nr_parts: int) -> bool:
    levels = {0: 4}
    queue = [0] if tables else []
    for number in queue:
        for entry in _entries(tables[number]):
            if levels[number] == 3 and entry & LARGE:
                if not _part_is_good(entry, nr_parts):
                    return False
                continue
            index = entry >> 12 & (1 << 40) - 1
            if not _entry_is_good(entry, levels[number], index, len(tables), pages):
                return False
            if levels[number] == 1:
                continue
            if levels.setdefault(index, levels[number] - 1) != levels[number] - 1:
                return False
            if index not in queue:
                queue.append(index)
    return len(queue) == len(tables)


def _entry_is_good(
    entry: int, level: int, index: int, nr_tables: int, pages: list[tuple[int, int, int]]
) -> bool:
    access = entry & (R | W | X)
    if entry >> 52 or not access or (access & W and not access & R):
        return False
    if level > 1:
        return not entry & 0xFF8 and index < nr_tables
    if entry & 0xFF8 & ~(7 << 3 | LARGE) or entry & LARGE or entry & 7 << 3 != WB:
        return False
    if index >= len(pages):
        return False
    kind = pages[index][1]
    if access & X and (access & W or kind != USER):
        return False
    return not (access & W and kind == EPTP)


def _part_is_good(entry: int, nr_parts: int) -> bool:
    part = (entry >> 30 & (1 << 22) - 1) - 1
    return (
        entry & ~(part + 1 << 30) in (R | WB | LARGE, R | W | WB | LARGE) and 0 <= part < nr_parts
    )


def free_of_tables(gva: int, size: int) -> bool:
    """Return whether the address range contains no descriptor table of a prepared vCPU."""
    return gva > TABLES_LAST and gva + size <= 1 << 64


# ---- comparison and counts -----------------------------------------------------------------------

counted: Counter[str] = Counter()
"""Number of calls by name and result, over all sequences of this process."""


def judge(name: str, result: int, errors: set[int]) -> bool:
    """Return whether the call succeeded; fail unless it did exactly when `errors` is empty."""
    counted[f"{name}: {os.strerror(-result) if result < 0 else 'done'}"] += 1
    if errors:
        assert -result in errors, f"{name} returned {result}, not one of {errors}"
        return False
    assert result >= 0, f"{name} returned {result}"
    return True
