"""Contexts and trusted pages that lack one rule, for the controls to attack."""

import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest import mock

from pykvm.elisa import calls, contexts, crossing, vcpu_attachment
from pykvm.elisa import trusted_images as toolchain
from pykvm.elisa.calls import Context
from pykvm.elisa.contexts import ContextPlan, UserPages, plan_gate, plan_sub
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.protections import ALL, Without
from pykvm.elisa.trusted_images import SubImage, build_object, crossing_images
from pykvm.kvm import Vcpu
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging.entries import Access
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain import compiler
from pykvm.toolchain.elf import ElfFile

CROSSING: Final = GUEST_SOURCES / "crossing"

Edit = tuple[str, str]
"""A regular expression, which must match exactly once, and its replacement."""


def edited(source: str, *edits: Edit) -> str:
    for pattern, replacement in edits:
        source, count = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        assert count == 1, f"{pattern} is there {count} times"
    return source


@contextmanager
def _crossing_sources(name: str, edits: Sequence[Edit]) -> Iterator[Path]:
    """Yield a copy of guest/crossing with one source edited; no cache key contains its path."""
    with tempfile.TemporaryDirectory(prefix="pykvm-weak-") as directory:
        for source in CROSSING.iterdir():
            text = source.read_text()
            target = Path(directory) / source.name
            target.write_text(edited(text, *edits) if source.name == name else text)
        yield Path(directory)


@functools.cache
def weak_gate(*edits: Edit) -> bytes:
    """Return the gate page built from an edited source."""
    with _crossing_sources("gate.S", edits) as directory:
        image = compiler.build(
            "crossing",
            [directory / name for name in ("entry.S", "gate.S", "return.S")],
            directory / "pages.ld",
            defines=toolchain._offsets(),
        )
    page = ElfFile.parse(image.read_bytes(), "weak gate").section(".elisa.gate").data
    assert len(page) == PAGE_SIZE
    return page


@functools.cache
def weak_sub_entry(source: Path, *edits: Edit) -> SubImage:
    """Build an object whose sub entry page comes from an edited source."""
    with (
        _crossing_sources("sub.S", edits) as directory,
        mock.patch.object(toolchain, "_CROSSING", directory),
    ):
        return build_object([source])


@functools.cache
def edited_object(source: Path, *edits: Edit, without: Without = ALL) -> SubImage:
    """Build an object from its own source, edited."""
    with tempfile.TemporaryDirectory(prefix="pykvm-weak-") as directory:
        target = Path(directory) / source.name
        target.write_text(edited(source.read_text(), *edits))
        return build_object([target], without=without)


class WeakAttachment:
    """Attachment of guest number 0 with replaceable parts.

    Args:
        gate_page: replaces the gate's code.
        change_gate: called with the gate's plan before the Anywhere Page Table fills its empty
            entries.
        change_sub: the same for the sub context's plan.
        extra: further parts of the sub context's image.
        tables: access that the sub context grants to its own guest page table.
        own_pages: whether to lay the guest's own pages of the crossing too.
        vcpu: vCPU whose list the contexts map; by default the guest's first.

    Attributes:
        gate: the gate context; no slot holds it yet.
        sub: the sub context; no slot holds it yet.
    """

    def __init__(
        self,
        guest: BareGuest,
        instance: ObjectInstance,
        *,
        gate_page: bytes | None = None,
        change_gate: Callable[[ContextPlan], object] = lambda plan: None,
        change_sub: Callable[[ContextPlan], object] = lambda plan: None,
        extra: Sequence[tuple[int, UserPages, Access]] = (),
        tables: Access = Access.READ,
        crossing_gva: int = crossing.CROSSING_GVA,
        own_pages: bool = True,
        vcpu: Vcpu | None = None,
    ) -> None:
        vcpu = vcpu or guest.vcpu
        if own_pages:
            guest.crossing_gva = crossing_gva
            guest.map_crossing(crossing_images())
        self._guest = guest
        declaration = instance.declaration
        env = declaration.env(crossing_gva + crossing.SHARED_OFFSET, 0)
        image = [*instance._image.parts(user=False), *extra]
        memory = instance.register(vcpu)

        with MemoryFile("weak contexts", 64 * PAGE_SIZE) as file:
            self._memory = Region(file, 0, prefault=True)
        self._used = 0
        gate_code = self._take(PAGE_SIZE)
        self._view(gate_code, PAGE_SIZE)[:] = (
            gate_page or crossing_images(frozenset(declaration.without)).gate_page
        )
        env_page, stack = self._take(PAGE_SIZE), self._take(crossing.STACK_SIZE)
        self._view(env_page, len(env))[:] = env

        sub = plan_sub(
            image, env_page, stack, memory.size, crossing_gva, levels=guest.paging_levels
        )
        gate = plan_gate(gate_code, crossing_gva, levels=guest.paging_levels)
        change_sub(sub)
        change_gate(gate)
        self._place(sub, tables)
        self._place(gate, Access.READ)
        self.sub: Context = vcpu_attachment._create(vcpu, sub, None, memory)
        self.gate: Context = vcpu_attachment._create(vcpu, gate, self.sub, None)
        self._vcpu, self._crossing_gva = vcpu, crossing_gva
        guest.announce(2, instance.window_region(0, guest.next_window_gpa()))

    def _take(self, size: int) -> int:
        address = self._memory.host_address + self._used
        self._used += size
        assert self._used <= self._memory.size
        return address

    def _view(self, address: int, size: int) -> memoryview:
        return self._memory.view(address - self._memory.host_address, size)

    def _place(self, plan: ContextPlan, access: Access) -> None:
        size = plan.guest_table_bytes
        address = self._take(size)
        with mock.patch.object(contexts, "READ", access):  # access used to map the tables
            plan.place_guest_tables(self._view(address, size), address)

    def second_gate(self) -> Context:
        """Return another gate to the same sub context; no slot holds it yet."""
        code = self._take(PAGE_SIZE)
        self._view(code, PAGE_SIZE)[:] = crossing_images().gate_page
        plan = plan_gate(code, self._crossing_gva, levels=self._guest.paging_levels)
        self._place(plan, Access.READ)
        return vcpu_attachment._create(self._vcpu, plan, self.sub, None)

    def enter_through_gate(self, slot: int = 2) -> int:
        """Put the gate into the vCPU's list, as the product does."""
        calls.set_slot(self._guest.vcpu, slot, self.gate)
        return slot

    def enter_without_gate(self, slot: int = 2) -> int:
        """Put the sub context itself into the vCPU's list."""
        calls.set_slot(self._guest.vcpu, slot, self.sub)
        return slot

    def close(self) -> None:
        """Free the memory; call it after closing the guest, when no vCPU can be inside.

        Closing twice is harmless.
        """
        self._memory.close()


@contextmanager
def crossing_anywhere() -> Iterator[None]:
    """Allow crossing areas at forbidden addresses, such as those below 4 GiB."""
    with mock.patch.object(contexts, "check_crossing_base"):
        yield


def also_map(plan: ContextPlan, gpa: int, pages: UserPages, access: Access) -> None:
    """Map pages at a further GPA of a context, without any check of the address."""
    plan.ept.map_pages(gpa, plan._number, pages.count, access)
    plan.pages.append(pages)
    plan._number += pages.count


def window_pages(instance: ObjectInstance, guest: int = 0) -> UserPages:
    declaration = instance.declaration
    offset = declaration.windows_offset + guest * declaration.window_size
    return UserPages(instance.memory.host_address + offset, declaration.window_size // PAGE_SIZE)
