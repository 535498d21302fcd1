"""The patch's two calls on the real kernel: every refusal leaves nothing behind, and whatever is
closed in whatever order, everything is given back when nobody can use it any more."""

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import resource
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pykvm.boot.bare import BareGuest, GuestTimeoutError
from pykvm.boot.compiler import GUEST_SOURCES
from pykvm.elisa.objects import SharedObject
from pykvm.kvm import Context, IoctlError, Kvm, Vcpu, Vm, ffi, lib
from pykvm.kvm.handle import Handle
from pykvm.memory.guest_memory import LockLimitError
from tests.elisa.host_state import (
    HostState,
    host_state,
    locked_kib,
    nothing_stays,
    pinned_pages,
    quiet_kernel,
)
from tests.elisa.probe import WILD, Probe, Wild, attach, calls, give, prepare, results, run

pytestmark = pytest.mark.elisa

PAGE = 4096
USER, LIST, EPTP = lib.KVM_ELISA_PAGE_USER, lib.KVM_ELISA_PAGE_LIST, lib.KVM_ELISA_PAGE_EPTP
R, W, X = 1, 2, 4  # SDM vol. 3C, table 29-1 and 29-6: bits 0 to 2 of every EPT entry
WB = 6 << 3  # memory type of a leaf
LARGE = 1 << 7
# struct kvm_elisa_create: nr_tables, nr_pages, tables, pages, flags, pad, gva, size,
# reserved[2]
CREATE = struct.Struct("<IIQQIIQQQQ")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_kernel():
        yield


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@dataclass(frozen=True)
class Machine:
    """A VM with one vCPU that never runs, and three pages of memory at `address`."""

    vm: Vm
    vcpu: Vcpu
    address: int


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Machine]:
    with Memory(3) as address, kvm.create_vm() as vm:
        vm.enable_elisa_contexts()
        yield Machine(vm, vm.create_vcpu(0), address)


class Memory:
    """Anonymous memory of this process; entered, its address."""

    def __init__(self, pages: int) -> None:
        self._map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(first)
        del first

    def __enter__(self) -> int:
        return self.address

    def __exit__(self, *_: object) -> None:
        self._map.close()


def table(**entries: int) -> bytes:
    """One table: ``table(e0=..., e511=...)``."""
    words = [0] * 512
    for name, value in entries.items():
        words[int(name[1:])] = value
    return struct.pack("<512Q", *words)


def branch(index: int, access: int = R | W | X) -> int:
    return index << 12 | access


def leaf(index: int = 0, access: int = R | W, kind: int = WB) -> int:
    return index << 12 | access | kind


def chain(*leaves: int) -> list[bytes]:
    """Four tables, one behind the other; the last one with these entries."""
    last = table(**{f"e{number}": entry for number, entry in enumerate(leaves)})
    return [table(e0=branch(1)), table(e0=branch(2)), table(e0=branch(3)), last]


@dataclass(frozen=True)
class Request:
    """KVM_ELISA_CREATE_CONTEXT, with everything that can be wrong in it.

    pages: (addr, kind, ref). fields: of struct kvm_elisa_create, in place of the right ones.
    """

    tables: list[bytes]
    pages: list[tuple[int, int, int]]
    fields: dict[str, int] = field(default_factory=dict)

    def send(self, vm: Vm) -> int:
        """The descriptor, or -errno."""
        tables = ffi.from_buffer(b"".join(self.tables))
        pages = ffi.new("struct kvm_elisa_page[]", len(self.pages))
        for slot, (addr, kind, ref) in enumerate(self.pages):
            pages[slot].addr, pages[slot].kind, pages[slot].ref = addr, kind, ref
        values = {
            "nr_tables": len(self.tables),
            "nr_pages": len(self.pages),
            "tables": int(ffi.cast("uintptr_t", tables)),
            "pages": int(ffi.cast("uintptr_t", pages)),
            **{"flags": 0, "pad": 0, "gva": 1 << 40, "size": PAGE, "reserved0": 0, "reserved1": 0},
            **self.fields,
        }
        request = ffi.from_buffer(CREATE.pack(*values.values()))
        return call(vm, "KVM_ELISA_CREATE_CONTEXT", request)


def call(handle: Handle, name: str, argument: Any) -> int:
    try:
        return handle.ioctl(name, argument)
    except IoctlError as error:
        return -(error.errno or 0)


def set_slot(vcpu: Vcpu, slot: int, fd: int) -> int:
    request = ffi.new("struct kvm_elisa_slot *")
    request.slot, request.fd = slot, fd
    return call(vcpu, "KVM_ELISA_SET_SLOT", request)


def good(machine: Machine, *leaves: int) -> Request:
    """A context of three user pages, the list page and the tables' entries."""
    pages = [(machine.address + n * PAGE, USER, 0) for n in range(3)]
    return Request(chain(*(leaves or (leaf(0), leaf(1, R | X), leaf(3)))), [*pages, (0, LIST, 0)])


def test_a_good_context(machine: Machine) -> None:
    """What the refusals below are changes of; it pins and charges three pages."""
    with nothing_stays() as before:
        fd = good(machine).send(machine.vm)
        assert fd > 0
        now = host_state()
        assert (now.locked - before.locked, now.pinned - before.pinned) == (12, 3)
        assert set_slot(machine.vcpu, 2, fd) == 0
        assert set_slot(machine.vcpu, 2, fd) == 0  # the same again
        assert set_slot(machine.vcpu, 511, fd) == 0
        os.close(fd)
        assert host_state().pinned == now.pinned
        assert set_slot(machine.vcpu, 2, -1) == 0
        assert host_state().pinned == now.pinned
        assert set_slot(machine.vcpu, 511, -1) == 0


BAD_LEAVES = {
    "write without read": leaf(0, W),
    "write and execute": leaf(0, W | X),
    "all access": leaf(0, R | W | X),
    "no access": leaf(0, 0),
    "uncached": leaf(0, R, 0),
    "write-combining": leaf(0, R, 1 << 3),
    "write-through": leaf(0, R, 4 << 3),
    "write-protected": leaf(0, R, 5 << 3),
    "reserved memory type": leaf(0, R, 7 << 3),
    "ignore pat": leaf(0, R) | 1 << 6,
    "bit 7": leaf(0, R) | LARGE,
    "accessed": leaf(0, R) | 1 << 8,
    "dirty": leaf(0, R | W) | 1 << 9,
    "user execute": leaf(0, R) | 1 << 10,
    "ignored bit 11": leaf(0, R) | 1 << 11,
    "bit 52": leaf(0, R) | 1 << 52,
    "shadow stack": leaf(0, R) | 1 << 60,
    "suppress #ve": leaf(0, R) | 1 << 63,
    "page out of range": leaf(4, R),
    "page far out of range": leaf((1 << 40) - 1, R),
    "list page executable": leaf(3, R | X),
    "list page execute-only": leaf(3, X),
}


@pytest.mark.parametrize("name", BAD_LEAVES)
def test_bad_leaf(machine: Machine, name: str) -> None:
    with nothing_stays():
        assert good(machine, leaf(0), BAD_LEAVES[name]).send(machine.vm) == -errno.EINVAL


def one_wrong(level: int, entry: int) -> list[bytes]:
    tables = chain(leaf(0))
    tables[4 - level] = table(e0=branch(5 - level), e7=entry)
    return tables


BAD_TABLES = {
    **{
        f"{what} at level {level}": one_wrong(level, entry | (5 - level) << 12)
        for level in (4, 3, 2)
        for what, entry in (
            ("large page", R | W | LARGE | WB),
            ("memory type", R | WB),
            ("accessed", R | 1 << 8),
            ("bit 52", R | 1 << 52),
            ("write without read", W),
            ("no access", 0),
        )
    },
    "table out of range": one_wrong(2, branch(4)),
    "root as a lower table": one_wrong(2, branch(0)),
    "table at two levels": one_wrong(3, branch(3)),
    "table at its own level": one_wrong(3, branch(1)),
    "unreached table": [*chain(leaf(0)), table(e0=leaf(0))],
    "unreached empty table": [*chain(leaf(0)), table()],
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(machine: Machine, name: str) -> None:
    with nothing_stays():
        request = replace(good(machine), tables=BAD_TABLES[name])
        assert request.send(machine.vm) == -errno.EINVAL


def test_a_table_named_twice_at_one_level(machine: Machine) -> None:
    with nothing_stays():
        fd = replace(good(machine), tables=one_wrong(2, branch(3))).send(machine.vm)
        assert fd > 0
        os.close(fd)


def test_bad_requests(machine: Machine) -> None:
    vm, plain = machine.vm, good(machine)
    user = plain.pages[0]
    cases: list[tuple[Request, int]] = [
        (replace(plain, fields={"flags": 2}), errno.EINVAL),
        (replace(plain, fields={"gva": 1}), errno.EINVAL),
        (replace(plain, fields={"size": 0}), errno.EINVAL),
        (replace(plain, fields={"size": PAGE + 8}), errno.EINVAL),
        (replace(plain, fields={"gva": 2**64 - PAGE, "size": 2 * PAGE}), errno.EINVAL),
        (replace(plain, fields={"pad": 1}), errno.EINVAL),
        (replace(plain, fields={"reserved0": 1}), errno.EINVAL),
        (replace(plain, fields={"reserved1": 1}), errno.EINVAL),
        (replace(plain, fields={"nr_tables": 0}), errno.EINVAL),
        (replace(plain, fields={"nr_pages": 0}), errno.EINVAL),
        (replace(plain, fields={"nr_tables": lib.KVM_ELISA_MAX_TABLES + 1}), errno.E2BIG),
        (replace(plain, fields={"nr_pages": lib.KVM_ELISA_MAX_PAGES + 1}), errno.E2BIG),
        (replace(plain, fields={"nr_tables": 2**32 - 1}), errno.E2BIG),
        (replace(plain, fields={"tables": 0}), errno.EFAULT),
        (replace(plain, fields={"tables": 1 << 63}), errno.EFAULT),
        (replace(plain, fields={"pages": 0}), errno.EFAULT),
        (replace(plain, fields={"pages": 1 << 63}), errno.EFAULT),
    ]
    bad_pages = [
        ((machine.address + 8, USER, 0), errno.EINVAL),
        ((machine.address, USER, 1), errno.EINVAL),
        ((0, USER, 0), errno.EFAULT),
        ((0xFFFF_8880_0000_0000, USER, 0), errno.EFAULT),
        ((1 << 62, USER, 0), errno.EFAULT),
        ((machine.address, LIST, 0), errno.EINVAL),
        ((0, LIST, -1), errno.EINVAL),
        ((0, LIST, 1), errno.ENOENT),
        ((machine.address, EPTP, 0), errno.EINVAL),
        ((0, EPTP, -1), errno.EBADF),
        ((0, EPTP, 9999), errno.EBADF),
        ((0, EPTP, vm.fileno()), errno.EINVAL),
        ((0, 3, 0), errno.EINVAL),
    ]
    # Behind a good page, so that something has been pinned when the bad one is met.
    cases += [
        (replace(plain, pages=[user, page, *plain.pages[2:]]), code) for page, code in bad_pages
    ]
    for request, code in cases:
        with nothing_stays():
            assert request.send(vm) == -code, request


def test_memory_that_cannot_be_pinned(machine: Machine) -> None:
    """Holes in the middle of a run, and pages that this process may not write."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Memory(4) as address:
        pages = [(address + n * PAGE, USER, 0) for n in range(4)]
        request = Request(chain(leaf(0), leaf(3)), pages)
        for protection in (mmap.PROT_READ, 0):
            page = ctypes.c_void_p(address + 2 * PAGE)
            assert libc.mprotect(page, ctypes.c_size_t(PAGE), protection) == 0
            with nothing_stays():
                assert request.send(machine.vm) == -errno.EFAULT
        assert libc.mprotect(page, ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
        with nothing_stays():
            os.close(request.send(machine.vm))


def test_contexts_that_name_contexts(kvm: Kvm, machine: Machine) -> None:
    def with_target(vm: Vm, fd: int, entry: int) -> int:
        return Request(chain(entry), [(0, EPTP, fd)]).send(vm)

    def no_new_pins(vm: Vm, fd: int, entry: int, code: int) -> None:
        before = host_state()
        assert with_target(vm, fd, entry) == -code
        assert host_state() == before

    with nothing_stays():
        target = good(machine).send(machine.vm)
        no_new_pins(machine.vm, target, leaf(0), errno.EINVAL)  # writable
        no_new_pins(machine.vm, target, leaf(0, R | X), errno.EINVAL)
        gate = with_target(machine.vm, target, leaf(0, R))
        assert gate > 0
        no_new_pins(machine.vm, gate, leaf(0, R), errno.ELOOP)
        with kvm.create_vm() as other:
            other.enable_elisa_contexts()
            no_new_pins(other, target, leaf(0, R), errno.EINVAL)
            assert set_slot(other.create_vcpu(0), 2, target) == -errno.EINVAL
        pinned = pinned_pages()
        os.close(target)
        assert pinned_pages() == pinned  # the gate keeps it
        os.close(gate)
        assert pinned_pages() == pinned - 3


def test_bad_slots(machine: Machine) -> None:
    with nothing_stays():
        fd = good(machine).send(machine.vm)
        for slot in (0, 1, 512, 513, 2**31, 2**32 - 1):
            assert set_slot(machine.vcpu, slot, fd) == -errno.EINVAL
            assert set_slot(machine.vcpu, slot, -1) == -errno.EINVAL
        for bad, code in (
            (-2, errno.EINVAL),
            (9999, errno.EBADF),
            (machine.vm.fileno(), errno.EINVAL),
            (machine.vcpu.fileno(), errno.EINVAL),
        ):
            assert set_slot(machine.vcpu, 2, bad) == -code
        assert set_slot(machine.vcpu, 2, -1) == 0  # nothing was there
        os.close(fd)


# ---- permissions and limits, in a child process --------------------------------------------------

CAP_IPC_LOCK, CAP_SYS_ADMIN = 14, 21


def in_child(body: Callable[[], int], *, without: int | None = None, memlock: int = 0) -> int:
    """What body() returns in a child process without a capability; no exception gets out of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer = -1000
        try:
            if memlock:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            if without is not None:
                _drop(without)
            answer = body()
        finally:
            os.write(writer, struct.pack("<q", answer))
            os._exit(0)
    os.close(writer)
    try:
        (answer,) = struct.unpack("<q", os.read(reader, 8))
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    assert answer != -1000, "the child failed"
    return int(answer)


def _drop(capability: int) -> None:
    # capget(2): struct __user_cap_header_struct version 3, then two of __user_cap_data_struct.
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << capability)  # effective
    data[1] &= ~(1 << capability)  # permitted
    assert libc.capset(header, data) == 0


def _own_machine(body: Callable[[Machine], int]) -> int:
    with Kvm() as kvm, Memory(3) as address, kvm.create_vm() as vm:
        with contextlib.suppress(IoctlError):  # one without CAP_SYS_ADMIN may not
            vm.enable_elisa_contexts()
        return body(Machine(vm, vm.create_vcpu(0), address))


def test_without_sys_admin() -> None:
    with nothing_stays():

        def create() -> int:
            return _own_machine(lambda m: good(m).send(m.vm))

        def empty_slot() -> int:
            return _own_machine(lambda m: set_slot(m.vcpu, 2, -1))

        for body in (create, empty_slot):
            assert in_child(body, without=CAP_SYS_ADMIN) == -errno.EPERM


def test_lock_limit() -> None:
    def create(m: Machine) -> int:
        answer = good(m).send(m.vm)
        assert locked_kib() == (12 if answer > 0 else 0)
        return min(answer, 1)

    with nothing_stays():
        for memlock, expected in ((2 * PAGE, -errno.ENOMEM), (3 * PAGE, 1)):
            answer = in_child(lambda: _own_machine(create), without=CAP_IPC_LOCK, memlock=memlock)
            assert answer == expected
        # With the capability, the limit does not count.
        assert in_child(lambda: _own_machine(create), memlock=PAGE) == 1


def test_lock_limit_of_an_object() -> None:
    def body() -> int:
        counter = SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c")
        with counter.open() as instance, Kvm() as kvm, kvm.create_vm() as vm:
            vm.enable_elisa_contexts()
            with pytest.raises(LockLimitError, match="ulimit -l"):
                instance.attach(vm, vm.create_vcpu(0), 0)
            return locked_kib()

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=PAGE) == 0


def test_a_vm_of_another_process(machine: Machine) -> None:
    """A child inherits the descriptors; KVM serves them in the process that made them only."""
    with nothing_stays():
        fd = good(machine).send(machine.vm)
        assert in_child(lambda: good(machine).send(machine.vm)) == -errno.EIO
        assert in_child(lambda: set_slot(machine.vcpu, 2, fd)) == -errno.EIO
        os.close(fd)


# ---- lifetime (invariant I9) ---------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(("context", "vcpu", "vm"))))
def test_any_order_of_closing(kvm: Kvm, order: tuple[str, ...]) -> None:
    """A context in a slot, and each of the three files, keep the VM; the last one gives it back."""
    with Memory(3) as address, nothing_stays() as before:
        vm = kvm.create_vm()
        vm.enable_elisa_contexts()
        vcpu = vm.create_vcpu(0)
        context = Context(vm, good(Machine(vm, vcpu, address)).send(vm))
        vcpu.set_elisa_slot(2, context)
        handles: dict[str, Handle] = {"context": context, "vcpu": vcpu, "vm": vm}
        for name in order:
            assert pinned_pages() == before.pinned + 3
            if name == "vm":
                Handle.close(vm)  # Vm.close() would close the other two before
            else:
                handles[name].close()


@pytest.mark.parametrize("installed", [True, False])
def test_a_copied_descriptor_keeps_a_context(machine: Machine, installed: bool) -> None:
    with nothing_stays() as before:
        fd = good(machine).send(machine.vm)
        copy = os.dup(fd)
        if installed:
            assert set_slot(machine.vcpu, 2, fd) == 0
        os.close(fd)
        assert pinned_pages() == before.pinned + 3
        if installed:
            assert set_slot(machine.vcpu, 2, -1) == 0
        assert pinned_pages() == before.pinned + 3
        os.close(copy)


def test_a_child_closes_last(kvm: Kvm) -> None:
    """What is charged to this process is given back to it, whoever drops the last reference."""
    with nothing_stays() as before, Memory(3) as address:
        with kvm.create_vm() as vm:
            vm.enable_elisa_contexts()
            fd = good(Machine(vm, vm.create_vcpu(0), address)).send(vm)
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(writer)
                os.read(reader, 1)  # until the parent closes its end
                os._exit(0)
            os.close(reader)
            os.close(fd)
        assert pinned_pages() == before.pinned + 3
        assert locked_kib() == before.locked + 12
        os.close(writer)
        os.waitpid(child, 0)


def test_many_contexts(machine: Machine) -> None:
    """Slots are replaced under the old contexts' feet; only the last ones count."""
    with nothing_stays() as before:
        for _ in range(40):
            fd = good(machine).send(machine.vm)
            for slot in (2, 3):
                assert set_slot(machine.vcpu, slot, fd) == 0
            os.close(fd)
        assert pinned_pages() == before.pinned + 3
        for slot in (2, 3):
            assert set_slot(machine.vcpu, slot, -1) == 0


def wild(name: str = "wild") -> SharedObject:
    return SharedObject(name, WILD, shared=PAGE, window=PAGE, guests=2)


def looping(guest: BareGuest, slot: int) -> None:
    """Let the guest stop in the middle of a call that never returns."""
    give(guest, calls(slot, Wild.LOOP))
    guest.start()
    with pytest.raises(GuestTimeoutError):
        guest.wait(0.3)


@pytest.fixture
def nothing_stays_of_guests() -> Iterator[HostState]:
    """As `nothing_stays`, around a test with guests: a `BareGuest` keeps its memory readable until
    nobody refers to it."""
    with nothing_stays() as before:
        yield before
        gc.collect()


def test_memory_closed_under_a_vcpu_inside_the_object(
    kvm: Kvm, nothing_stays_of_guests: HostState
) -> None:
    before = nothing_stays_of_guests
    with BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        with wild().open() as instance:
            looping(guest, attach(guest, instance).slot)
            assert instance.shared[0] == 1
        # The object's memory is unmapped here; the guest goes on inside it, in the pinned pages.
        guest.start()
        with pytest.raises(GuestTimeoutError):
            guest.wait(0.3)
        assert pinned_pages() > before.pinned
    assert pinned_pages() == before.pinned
    still_works(kvm)


@pytest.mark.usefixtures("nothing_stays_of_guests")
def test_a_vcpu_closed_inside_the_object(kvm: Kvm) -> None:
    """Another guest of the same object does not notice."""
    with wild().open() as instance, BareGuest(kvm, Probe()) as second:
        with BareGuest(kvm, Probe()) as first:
            prepare(first)
            looping(first, attach(first, instance).slot)
            first.vcpu.close()
        prepare(second)
        give(second, calls(attach(second, instance, 1).slot, Wild.HELLO))
        assert run(second) == []
        assert results(second) == [1001]


def still_works(kvm: Kvm) -> None:
    with wild().open() as instance, BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        give(guest, calls(attach(guest, instance).slot, Wild.HELLO))
        assert run(guest) == []
        assert results(guest) == [1000]


def test_killed_inside_the_object(kvm: Kvm) -> None:
    """SIGKILL while a vCPU runs in a sub context: the kernel cleans up alone."""
    with nothing_stays() as before:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                _run_for_ever(writer)
            finally:
                os._exit(1)
        os.close(writer)
        try:
            assert os.read(reader, 1) == b"!"
            assert pinned_pages() > before.pinned
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            os.close(reader)
        assert os.WTERMSIG(status) == signal.SIGKILL
    still_works(kvm)


def _run_for_ever(tell: int) -> None:
    with Kvm() as kvm, wild().open() as instance, BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        give(guest, calls(attach(guest, instance).slot, Wild.LOOP))

        def watch() -> None:
            while not instance.shared[0]:
                pass
            os.write(tell, b"!")

        threading.Thread(target=watch, daemon=True).start()
        run(guest)
