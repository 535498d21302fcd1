"""Random sequences of calls to the patched KVM: each answers as documented, and nothing leaks.

A state machine creates VMs, vCPUs and contexts, good and bad ones. It fills slots, runs guests,
revokes, copies and sends descriptors, unmaps memory, and closes everything in any order.
tests/rigs/call_model predicts the result of each call, and what may be pinned and charged after
each step. After each sequence nothing may be left, the kernel's log has to be quiet, and a crossing
has to work.

The test repeats the same sequences. PYKVM_SEQUENCE_SECONDS=600 creates new ones for that long.
"""

import contextlib
import errno
import os
import random
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from tests.rigs.call_model.choices import (
    NOWHERE,
    bad_calls,
    enables,
    entry_mutations,
    field_mutations,
    indices,
    kinds,
    mutated,
    page_mutations,
    registrations,
    setups,
    slots,
    vcpu_ids,
)
from tests.rigs.call_model.model import (
    ContextModel,
    MemoryModel,
    OpenFile,
    VcpuModel,
    VmModel,
    check_request,
    counted,
    free_of_tables,
    judge,
)
from tests.rigs.call_model.runs import run_vcpu
from tests.rigs.context_requests import EPTP, LIST, PAGE, raw, register, with_part
from tests.rigs.host_state import (
    VmStatistics,
    host_state,
    locked_kib,
    pinned_pages,
    quiet_kernel,
)
from tests.rigs.tiny_guest import (
    ARENA_PAGES,
    Arena,
    Kind,
    RunArea,
    context_request,
    create_context,
    crossings_work,
    enable,
    prepare,
    revoke,
    set_memory,
    set_slot,
)

pytestmark = pytest.mark.elisa

CONTEXTS = uapi.lib.KVM_ELISA_CONTEXTS


@dataclass(frozen=True)
class Host:
    """Objects that outlive the sequences."""

    kvm: Kvm
    statistics: VmStatistics


host: Host


class Calls(RuleBasedStateMachine):
    """One sequence; `counted` has the numbers of calls by result."""

    def __init__(self) -> None:
        super().__init__()
        counted["sequences"] += 1
        self.vms: list[VmModel] = []
        self.memories: list[MemoryModel] = []
        self.order = random.Random(0)
        self.log = contextlib.ExitStack()
        self.log.enter_context(quiet_kernel())
        self.before = host_state()
        # A sent descriptor stays open until it is received, or until the socket is closed.
        self.outbox, self.inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.under_way: list[OpenFile] = []

    @initialize(seed=st.integers(0, 1000), how=setups)
    def begin(self, seed: int, how: str) -> None:
        self.order.seed(seed)
        self._make_vm(how)
        if how == "ready":  # an object in slot 2, a gate in slot 3, with registered memory
            self.register_memory(0, "good")
            self.make_context(0, Kind.OBJECT, 0, 0, 2)
            self._make_context(self.vms[0], Kind.SUB, 0, {}, None)
            self.make_context(0, Kind.GATE, 0, 0, 3)
            self.make_context(0, Kind.BARE, 0, 0, 511)
            vcpu = self.vms[0].vcpus[0]
            for slot in (7, 2, 3):
                run_vcpu(vcpu, slot, loop=False)

    # ---- existing objects ------------------------------------------------------------------------

    def open_vms(self) -> list[VmModel]:
        return [vm for vm in self.vms if vm.file.fds]

    def open_vcpus(self) -> list[VcpuModel]:
        return [vcpu for vm in self.vms for vcpu in vm.vcpus.values() if vcpu.file.fds]

    def open_contexts(self) -> list[ContextModel]:
        return [context for vm in self.vms for context in vm.contexts if context.file.fds]

    def open_memories(self) -> list[MemoryModel]:
        return [memory for memory in self.memories if memory.file.fds]

    def open_files(self) -> list[OpenFile]:
        memories = [memory.file for memory in self.memories if memory.file.open]
        return [*memories, *(file for vm in self.vms for file in vm.files)]

    def live_memories(self) -> list[MemoryModel]:
        """Return the memories that the kernel must still hold, and no others."""
        live = [context for vm in self.vms for context in vm.live_contexts()]
        mapped = [memory for context in live for memory in context.memories]
        return [memory for memory in self.memories if memory.file.open or memory in mapped]

    def files(self) -> dict[int, object]:
        """Return the owner of each open descriptor."""
        found: dict[int, object] = {0: "standard input"}
        for memory in self.memories:
            found.update(dict.fromkeys(memory.file.fds, memory))
        for vm in self.vms:
            owners: list[VmModel | VcpuModel | ContextModel] = [vm]
            for owner in (*owners, *vm.vcpus.values(), *vm.contexts):
                found.update(dict.fromkeys(owner.file.fds, owner))
        return found

    # ---- creation --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.open_vms()) < 2)
    @rule(how=setups)
    def make_vm(self, how: str) -> None:
        self._make_vm(how)

    def _make_vm(self, how: str) -> None:
        fd = raw(host.kvm.fileno(), "KVM_CREATE_VM")
        assert judge("create vm", fd, set())
        arena = Arena()
        vm = VmModel(OpenFile("vm", [fd]), arena)
        self.vms.append(vm)
        if how != "plain":
            self._enable(vm, CONTEXTS, (3, 20, 0) if how == "small" else (0, 0, 0))
        if how in ("ready", "small"):
            self._place_memory(vm)
            self._make_vcpu(vm, 0)
        if how == "ready":
            self._make_vcpu(vm, 1)

    @precondition(lambda self: self.open_vms())
    @rule(index=indices, what=st.one_of(vcpu_ids, enables, bad_calls))
    def change_vm(self, index: int, what: Any) -> None:
        """Create a vCPU, enable a capability, or call any file with a bad pointer."""
        vm = pick(self.open_vms(), index)
        if isinstance(what, int):
            self._make_vcpu(vm, what)
        elif isinstance(what[0], int):
            self._enable(vm, *what)
        else:
            call, address = what
            fd = pick([file for file in self.open_files() if file.fds], index).fds[0]
            # ENOTTY for the wrong kind of file.
            errors = {errno.EFAULT, errno.EINVAL, errno.ENOTTY}
            judge("call of nothing", raw(fd, call, address), errors)

    def _enable(self, vm: VmModel, flags: int, limits: tuple[int, int, int]) -> None:
        result = enable(vm.file.fds[0], flags, *limits)
        if judge("enable", result, vm.enable_errors(flags, limits)):
            vm.enable(flags, limits)

    def _make_vcpu(self, vm: VmModel, vcpu_id: int) -> None:
        fd = raw(vm.file.fds[0], "KVM_CREATE_VCPU", vcpu_id)
        errors = {errno.EEXIST} if vcpu_id in vm.vcpus else {errno.EINVAL} if vcpu_id > 1 else set()
        if not judge("create vcpu", fd, errors):
            return
        prepare(host.kvm, fd)
        area = RunArea(fd, host.kvm.get_vcpu_mmap_size())
        vm.vcpus[vcpu_id] = VcpuModel(OpenFile(f"vcpu {vcpu_id}", [fd], 0, area), vm, vcpu_id)

    @precondition(lambda self: self.open_vms())
    @rule(index=indices, kind=kinds, named=indices, variant=st.integers(0, 15), slot=slots)
    def make_context(self, index: int, kind: Kind, named: int, variant: int, slot: int) -> None:
        """Create a context, and for a gate a sub context if there is no context yet.

        Args:
            slot: slot to put it into; none if below 2.
        """
        vm, fields = pick(self.open_vms(), index), self._variant(variant)
        if kind is Kind.GATE and not self.open_contexts():
            self._make_context(vm, Kind.SUB, named, fields, None)
        made = self._make_context(vm, kind, named, fields, None)
        vcpus = [vcpu for vcpu in vm.vcpus.values() if vcpu.file.fds]
        if made and vcpus and slot > 1:
            self._fill(vcpus[named % len(vcpus)], slot, made)

    @staticmethod
    def _variant(variant: int) -> dict[str, int]:
        """Return changes to the request: mostly none; some keep the guest from using VMFUNC."""
        return {13: {"flags": 1}, 14: {"gva": 0}, 15: {"size": 2**40}}.get(variant, {})

    @precondition(lambda self: self.open_vms())
    @rule(
        index=indices,
        kind=kinds,
        named=indices,
        mutation=st.one_of(field_mutations, page_mutations, entry_mutations),
    )
    def make_mutated_context(
        self, index: int, kind: Kind, named: int, mutation: tuple[Any, ...]
    ) -> None:
        self._make_context(pick(self.open_vms(), index), kind, named, {}, mutation)

    def _make_context(
        self,
        vm: VmModel,
        kind: Kind,
        named: int,
        fields: dict[str, int],
        mutation: tuple[Any, ...] | None,
    ) -> ContextModel | None:
        target = pick(self.open_contexts(), named) if self.open_contexts() else None
        request = context_request(
            kind,
            vm.arena.address,
            vcpu_id=named % 2,
            target=target.file.fds[0] if target else NOWHERE,
        )
        request = replace(request, fields=fields)
        if self.open_memories() and named != 4:
            memory = pick(self.open_memories(), named).file.fds[0]
            request = with_part(request, memory if named < 5 else NOWHERE, index=int(named == 3))
        if mutation:
            request = mutated(request, mutation)
        files = self.files()
        checked = check_request(vm, request, files)
        fd = create_context(vm.file.fds[0], request)
        if not judge("create context", fd, checked.errors):
            return None
        final = request.fields
        targets = [files[ref] for _, page_kind, ref in request.pages if page_kind == EPTP]
        assert all(isinstance(each, ContextModel) for each in targets)
        made = ContextModel(
            OpenFile(kind.value, [fd]),
            vm,
            None if mutation else kind,
            checked.tables,
            checked.user_pages,
            la57=bool(final.get("flags")),
            tables_free=free_of_tables(final.get("gva", 1 << 40), final.get("size", PAGE)),
            target=targets[0] if targets else None,  # type: ignore[arg-type]
            list_of={ref for _, page_kind, ref in request.pages if page_kind == LIST},
            memories=[files[part] for part, _ in request.parts],  # type: ignore[misc]
        )
        vm.contexts.append(made)
        counted["context with a part"] += bool(made.memories)
        return made

    @precondition(lambda self: self.vms and len(self.open_memories()) < 3)
    @rule(index=indices, what=registrations)
    def register_memory(self, index: int, what: str) -> None:
        vm = pick(self.vms, index)
        address, size = vm.arena.address, ARENA_PAGES * PAGE
        file, reserved = host.kvm.fileno(), 0
        errors = set() if vm.memory == "there" else {errno.EFAULT}
        match what:
            case "empty":
                size = 0
            case "unaligned":
                address += 8
            case "wraps":
                size = 2**64 - PAGE
            case "reserved":
                reserved = 1
            case "too large":
                size = uapi.lib.KVM_ELISA_MAX_MEMORY + PAGE
                errors = {errno.E2BIG}
            case "a vm's call" if vm.file.fds:
                file = vm.file.fds[0]
                errors = {errno.ENOTTY}
        if what in ("empty", "unaligned", "wraps", "reserved"):
            errors = {errno.EINVAL}
        fd = register(file, address, size, reserved)
        if judge("register memory", fd, errors):
            self.memories.append(MemoryModel(OpenFile("memory", [fd])))

    # ---- slots -----------------------------------------------------------------------------------

    @precondition(lambda self: self.open_vcpus())
    @rule(
        index=indices,
        slot=slots,
        what=st.one_of(
            indices, indices, st.sampled_from(["empty", "nothing", "-2", "vm", "stdin"])
        ),
    )
    def fill_slot(self, index: int, slot: int, what: int | str) -> None:
        vcpu = pick(self.open_vcpus(), index)
        if isinstance(what, str):
            fd, error = {
                "empty": (-1, 0),
                "nothing": (NOWHERE, errno.EBADF),
                "-2": (-2, errno.EINVAL),
                "vm": (vcpu.vm.file.fds[0] if vcpu.vm.file.fds else 0, errno.EINVAL),
                "stdin": (0, errno.EINVAL),
            }[what]
            errors = vcpu.set_slot_errors(slot, None, error)
            if judge(f"set slot, {what}", set_slot(vcpu.file.fds[0], slot, fd), errors):
                vcpu.set_slot(slot, None)
        elif self.open_contexts():
            self._fill(vcpu, slot, pick(self.open_contexts(), what))

    def _fill(self, vcpu: VcpuModel, slot: int, context: ContextModel) -> None:
        errors = vcpu.set_slot_errors(slot, context, 0)
        if judge("set slot", set_slot(vcpu.file.fds[0], slot, context.file.fds[-1]), errors):
            vcpu.set_slot(slot, context)

    @precondition(lambda self: self.open_vms())
    @rule(index=indices, vcpu_id=st.sampled_from([0, 1, 0, 7, 2**31]), slot=slots)
    def take_away(self, index: int, vcpu_id: int, slot: int) -> None:
        self._revoke(pick(self.open_vms(), index), vcpu_id, slot)

    @precondition(lambda self: any(vcpu.slots and vcpu.vm.file.fds for vcpu in self.open_vcpus()))
    @rule(index=indices, which=indices)
    def take_away_what_is_there(self, index: int, which: int) -> None:
        """Revoke one of a vCPU's filled slots."""
        vcpu = pick([v for v in self.open_vcpus() if v.slots and v.vm.file.fds], index)
        self._revoke(vcpu.vm, vcpu.id, pick(sorted(vcpu.slots), which))

    @precondition(lambda self: any(vcpu.inside and vcpu.vm.file.fds for vcpu in self.open_vcpus()))
    @rule(index=indices, everything=st.booleans())
    def take_away_from_inside(self, index: int, everything: bool) -> None:
        """Revoke the context in which a vCPU is."""
        vcpus = [vcpu for vcpu in self.open_vcpus() if vcpu.inside and vcpu.vm.file.fds]
        vcpu = pick(vcpus, index)
        found = vcpu.find(vcpu.inside.place, vcpu.slots)
        self._revoke(vcpu.vm, vcpu.id, 0 if everything else found[1])

    def _revoke(self, vm: VmModel, vcpu_id: int, slot: int) -> None:
        result = revoke(vm.file.fds[0], vcpu_id, slot)
        if judge("revoke", result, vm.revoke_errors(vcpu_id, slot)):
            assert vm.vcpus[vcpu_id].revoke(slot)

    # ---- running ---------------------------------------------------------------------------------

    @precondition(lambda self: self.open_vcpus())
    @rule(index=indices, slot=slots, loop=st.booleans())
    def run(self, index: int, slot: int, loop: bool) -> None:
        run_vcpu(pick(self.open_vcpus(), index), slot, loop)

    @precondition(lambda self: any(vcpu.slots for vcpu in self.open_vcpus()))
    @rule(index=indices, which=indices, loop=st.booleans())
    def enter(self, index: int, which: int, loop: bool) -> None:
        """Run a vCPU into one of its filled slots."""
        vcpu = pick([vcpu for vcpu in self.open_vcpus() if vcpu.slots], index)
        run_vcpu(vcpu, pick(sorted(vcpu.slots), which), loop)

    # ---- memory ----------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(
        index=indices,
        what=st.sampled_from(
            ["place", "delete", "second", "unaligned", "gone", "put back", "put back", "read-only"]
        ),
    )
    def change_memory(self, index: int, what: str) -> None:
        """Change the guest's memory slot, or the memory behind it and behind contexts.

        Contexts keep the pages that they have pinned.
        """
        vm = pick(self.vms, index)
        counted[f"memory {what}"] += 1
        if what == "put back":
            vm.arena.put_back()
            vm.memory = "there"
        elif what in ("gone", "read-only"):
            if vm.memory != "gone":
                vm.arena.take_away() if what == "gone" else vm.arena.protect()
                vm.memory = what
        elif vm.file.fds:
            self._change_slot(vm, vm.file.fds[0], what)

    def _change_slot(self, vm: VmModel, fd: int, what: str) -> None:
        if what == "place":
            self._place_memory(vm)
        elif what == "delete":
            errors = set() if vm.has_memory else {errno.EINVAL}
            if judge("memory", set_memory(fd, vm.arena.address, 0), errors):
                vm.has_memory = False
        elif what == "unaligned":
            judge("memory", set_memory(fd, vm.arena.address + 1, slot=1), {errno.EINVAL})
        elif vm.has_memory:
            judge("memory", set_memory(fd, vm.arena.address, slot=1), {errno.EEXIST})

    def _place_memory(self, vm: VmModel) -> None:
        assert judge("memory", set_memory(vm.file.fds[0], vm.arena.address), set())
        vm.has_memory = True

    # ---- files -----------------------------------------------------------------------------------

    @precondition(lambda self: self.open_files())
    @rule(
        index=indices,
        what=st.sampled_from(["close", "close", "copy", "send", "send away", "receive", "unmap"]),
    )
    def change_files(self, index: int, what: str) -> None:
        """Change the descriptors of a file.

        Args:
            what: "send" puts one into a socket, where it stays open until received.
        """
        file = pick(self.open_files(), index)
        if what == "receive" and self.under_way:
            _, (fd,), _, _ = socket.recv_fds(self.inbox, 1, 1)
            file = self.under_way.pop(0)
            file.sent -= 1
            file.fds.append(fd)
        elif what == "unmap" and file.area:
            file.area.close()
            file.area = None
        elif what == "copy" and file.fds:
            file.fds.append(os.dup(file.fds[0]))
        elif what.startswith("send") and file.fds and len(self.under_way) < 3:
            socket.send_fds(self.outbox, [b"."], [file.fds[0]])
            self.under_way.append(file)
            file.sent += 1
        if what in ("close", "send away") and file.fds:
            os.close(file.fds.pop(0))

    # ---- invariants ------------------------------------------------------------------------------

    @invariant()
    def nothing_else_is_held(self) -> None:
        counted["steps"] += 1
        for vm in self.open_vms():
            live = vm.live_contexts()
            assert host.statistics.read(vm.file.fds[0]) == [len(live), vm.pages()], live
        memories = self.live_memories()
        charged = sum(vm.pages() for vm in self.vms)
        charged += sum(memory.pages + memory.tables for memory in memories)
        assert locked_kib() - self.before.locked == charged * 4
        pinned = sum(c.user_pages for vm in self.vms for c in vm.live_contexts())
        pinned += sum(memory.pages for memory in memories)
        assert pinned_pages() - self.before.pinned == pinned

    def teardown(self) -> None:
        try:
            files = self.open_files()
            self.order.shuffle(files)
            for file in files:
                for fd in file.fds:
                    os.close(fd)
                if file.area:
                    file.area.close()
            self.outbox.close()
            self.inbox.close()
            for vm in self.vms:
                vm.arena.close()
            crossings_work(host.kvm)
            after = host_state()
            assert after == self.before, f"{self.before} before, {after} after"
        finally:
            self.log.close()


def pick(things: list[Any], index: int) -> Any:
    """Return an item, counted from the last, so that the newest are used most."""
    return things[-1 - index % len(things)]


def figures() -> str:
    lines = [f"{name}: {count}" for name, count in sorted(counted.items())]
    return "\n".join(lines)


def test_random_sequences(kvm: Kvm) -> None:
    global host  # noqa: PLW0603
    host = Host(kvm, VmStatistics(kvm))
    crossings_work(host.kvm)
    profile = settings(
        database=None,
        suppress_health_check=list(HealthCheck),
        stateful_step_count=30,
        max_examples=20,
        derandomize=True,
        phases=[Phase.generate],  # shrinking a failure takes minutes on the emulated host
    )
    seconds = float(os.environ.get("PYKVM_SEQUENCE_SECONDS", "0"))
    end = time.monotonic() + seconds
    if seconds:
        profile = settings(profile, derandomize=False, max_examples=20)
    counted.clear()
    while True:
        run_state_machine_as_test(Calls, settings=profile)
        if time.monotonic() >= end:
            break
    print(figures())
    # The sequences must have achieved something.
    for name in ("run: home", "run: empty slot"):
        assert counted[name] > 5, counted
    assert counted["context with a part"] > 0, counted
    for name in ("create context", "set slot", "revoke", "register memory"):
        assert counted[f"{name}: done"] > 5, counted
