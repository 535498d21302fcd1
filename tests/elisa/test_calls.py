"""pykvm.elisa.calls: refusal on stock KVM; hypercalls and bad arguments on the patched one.

Tests of working contexts are with the code that builds them.
"""

import errno
from collections.abc import Iterator

import pytest

from pykvm.elisa import calls
from pykvm.elisa.calls import Context
from pykvm.kernel import uapi
from pykvm.kvm import (
    NULL_HYPERCALL,
    CapabilityMissingError,
    Hlt,
    Hypercall,
    IoctlError,
    Kvm,
    ffi,
)
from tests.rigs.real_mode import RealModeGuest, run

USER = uapi.lib.KVM_HC_ELISA_USER


@pytest.mark.kvm
def test_version(kvm: Kvm) -> None:
    assert calls.version(kvm) in (0, uapi.lib.KVM_ELISA_VERSION)


@pytest.mark.kvm
def test_stock_kvm_is_named(kvm: Kvm) -> None:
    if calls.version(kvm):
        assert kvm.require(calls.ELISA, "a test") == uapi.lib.KVM_ELISA_VERSION
        return
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        for call in (
            lambda: calls.enable_user_hypercalls(vm),
            lambda: calls.enable_contexts(vm),
            lambda: calls.revoke_slot(vm, 0, None),
            lambda: calls.create_context(vm, bytes(4096), []),
            lambda: calls.set_slot(vcpu, 2, None),
        ):
            with pytest.raises(CapabilityMissingError, match="KVM_CAP_ELISA") as caught:
                call()
            assert caught.value.capability == "KVM_CAP_ELISA"


@pytest.mark.kvm
def test_tables_are_whole_pages(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        for size in (0, 4095, 4097):
            with pytest.raises(ValueError, match="pass a multiple of 4096"):
                calls.create_context(vm, bytes(size), [])


# ---- on the patched KVM -------------------------------------------------------------------------


@pytest.fixture
def real_mode(kvm: Kvm) -> Iterator[RealModeGuest]:
    with kvm.create_vm() as vm:
        yield RealModeGuest(vm)


@pytest.fixture
def caller(real_mode: RealModeGuest) -> RealModeGuest:
    """A guest that executes VMCALL CX times and stores the result at [0x6000]."""
    real_mode.load("""
        89 CF        ; mov di, cx
        89 C5        ; mov bp, ax
        89 E8        ; again: mov ax, bp
        0F 01 C1     ; vmcall
        66 A3 00 60  ; mov [0x6000], eax
        4F           ; dec di
        75 F4        ; jnz again
        F4           ; hlt
    """)
    return real_mode


def result(caller: RealModeGuest) -> int:
    return int.from_bytes(caller.memory[0x6000:0x6004], "little")


@pytest.mark.elisa
def test_null_hypercall_in_the_kernel(caller: RealModeGuest) -> None:
    stats = caller.vcpu.stats()
    before = stats.value("hypercalls")
    caller.vcpu.set_regs(rax=uapi.lib.KVM_HC_ELISA_NULL, rcx=50)
    assert run(caller.vcpu) == Hlt()
    assert result(caller) == 0
    assert stats.value("hypercalls") == before + 50
    assert caller.vcpu.exit_counts().runs == 1  # it never left the kernel


@pytest.mark.elisa
def test_user_hypercalls_are_off_until_enabled(caller: RealModeGuest) -> None:
    caller.vm.handlers.add_hypercall(USER, NULL_HYPERCALL)
    caller.vcpu.set_regs(rax=USER, rcx=1)
    assert run(caller.vcpu) == Hlt()
    assert result(caller) == 2**32 - 1000  # -KVM_ENOSYS
    assert caller.vcpu.exit_counts().native == {}


@pytest.mark.elisa
def test_native_handler(caller: RealModeGuest) -> None:
    calls.enable_user_hypercalls(caller.vm)
    caller.vm.handlers.add_hypercall(USER + 3, NULL_HYPERCALL)
    caller.vcpu.set_regs(rax=USER + 3, rcx=100)
    assert run(caller.vcpu) == Hlt()
    counts = caller.vcpu.exit_counts()
    assert counts.native == {"KVM_EXIT_HYPERCALL": 100}
    assert result(caller) == 0


@pytest.mark.elisa
def test_handler_gets_arguments_and_context(caller: RealModeGuest) -> None:
    seen: list[tuple[int, list[int]]] = []

    def handler(context: object, args: object) -> int:
        words = ffi.cast("uint64_t *", args)
        seen.append((int(ffi.cast("uintptr_t", context)), list(words[0:4])))
        return 0xABCD

    pointer = ffi.callback("uint64_t(void *, const uint64_t *)", handler)
    context = ffi.new("int *")
    calls.enable_user_hypercalls(caller.vm)
    caller.vm.handlers.add_hypercall(USER + 15, pointer, context)
    caller.vcpu.set_regs(rax=USER + 15, rbx=1, rcx=1, rdx=3, rsi=4)
    assert run(caller.vcpu) == Hlt()
    assert seen == [(int(ffi.cast("uintptr_t", context)), [1, 1, 3, 4])]
    assert result(caller) == 0xABCD


@pytest.mark.elisa
def test_hypercall_without_a_handler_comes_to_python(caller: RealModeGuest) -> None:
    calls.enable_user_hypercalls(caller.vm)
    caller.vcpu.set_regs(rax=USER + 1, rcx=1, rbx=9)
    found = run(caller.vcpu)
    assert isinstance(found, Hypercall)
    assert (found.number, found.args[0]) == (USER + 1, 9)
    caller.vcpu.reply(77)
    assert run(caller.vcpu) == Hlt()
    assert result(caller) == 77


@pytest.mark.elisa
def test_a_stop_between_hypercalls(caller: RealModeGuest) -> None:
    """Stopping a guest that only makes hypercalls loses and repeats none."""
    calls.enable_user_hypercalls(caller.vm)
    caller.vm.handlers.add_hypercall(USER, NULL_HYPERCALL)
    caller.vcpu.set_regs(rax=USER, rcx=3000)
    stops = 0
    while run(caller.vcpu, 0.01) != Hlt():
        stops += 1
        assert stops < 10000
    assert caller.vcpu.exit_counts().native == {"KVM_EXIT_HYPERCALL": 3000}


@pytest.mark.elisa
def test_bad_tables(real_mode: RealModeGuest) -> None:
    with pytest.raises(IoctlError) as caught:
        calls.create_context(real_mode.vm, b"\xff" * 4096, [])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.ioctl == "KVM_ELISA_CREATE_CONTEXT"


@pytest.mark.elisa
def test_bad_slots(real_mode: RealModeGuest) -> None:
    for slot in (
        uapi.lib.KVM_ELISA_SLOT_DEFAULT,
        uapi.lib.KVM_ELISA_SLOT_TRANSIENT,
        uapi.lib.KVM_ELISA_SLOTS,
    ):
        with pytest.raises(IoctlError, match="use slots 2 to 511") as caught:
            calls.set_slot(real_mode.vcpu, slot, None)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.elisa
def test_a_context_closes_with_its_vm(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        guest = RealModeGuest(vm)
        # One page, at GPA 0: entry 0 of every table points to the next table, the last to page 0.
        tables = bytearray(4 * 4096)
        for table in range(4):
            leaf = table == 3
            entry = 0b001 | 6 << 3 if leaf else 0b111 | (table + 1) << 12
            tables[table * 4096 : table * 4096 + 8] = entry.to_bytes(8, "little")
        pages = [(guest.host_address, uapi.lib.KVM_ELISA_PAGE_USER, 0)]
        context = calls.create_context(vm, tables, pages)
        assert isinstance(context, Context)
        calls.set_slot(guest.vcpu, 2, context)
        calls.set_slot(guest.vcpu, 2, None)
        calls.set_slot(guest.vcpu, 511, context)
    assert context.closed
    context.close()
