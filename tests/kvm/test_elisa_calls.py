"""pykvm.kvm.elisa_calls: refusal on stock KVM; hypercalls and bad arguments on the patched one.

Contexts that work are tested where they are built, in tests/elisa.
"""

import errno

import pytest

from pykvm.kvm import (
    NULL_HYPERCALL,
    CapabilityMissingError,
    Context,
    Hlt,
    Hypercall,
    IoctlError,
    Kvm,
    ffi,
    lib,
)
from tests.kvm.conftest import RealModeGuest, need, need_hardware, run

USER = lib.KVM_HC_ELISA_USER


@pytest.mark.kvm
def test_version(kvm: Kvm) -> None:
    assert kvm.elisa_version() in (0, lib.KVM_ELISA_VERSION)


@pytest.mark.kvm
def test_stock_kvm_is_named(kvm: Kvm) -> None:
    if kvm.elisa_version():
        assert kvm.require("KVM_CAP_ELISA", "a test") == lib.KVM_ELISA_VERSION
        return
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        for call in (
            vm.enable_user_hypercalls,
            lambda: vm.create_elisa_context(bytes(4096), []),
            lambda: vcpu.set_elisa_slot(2, None),
        ):
            with pytest.raises(CapabilityMissingError, match="KVM_CAP_ELISA") as caught:
                call()
            assert caught.value.capability == "KVM_CAP_ELISA"


@pytest.mark.kvm
def test_tables_are_whole_pages(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        for size in (0, 4095, 4097):
            with pytest.raises(ValueError, match="pass a multiple of 4096"):
                vm.create_elisa_context(bytes(size), [])


@pytest.mark.kvm
def test_a_hypercall_of_stock_kvm(guest: RealModeGuest) -> None:
    """KVM_HC_MAP_GPA_RANGE (12), the one that stock KVM hands to user space."""
    if not need(guest.vm, "KVM_CAP_EXIT_HYPERCALL") & 1 << 12:
        pytest.skip("this kvm keeps KVM_HC_MAP_GPA_RANGE to itself")
    need_hardware("hypercalls in real mode")
    guest.vm.enable_cap("KVM_CAP_EXIT_HYPERCALL", 1 << 12)
    guest.load(f"""
        {hypercall()}
        66 A3 00 60  ; mov [0x6000], eax
        F4           ; hlt
    """)
    guest.vcpu.set_regs(rax=12, rbx=0x4000, rcx=1, rdx=0)
    assert run(guest.vcpu) == Hypercall(12, (0x4000, 1, 0, 0, 0, 0), False)
    guest.vcpu.reply(0x55)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6004] == b"\x55\0\0\0"


def hypercall() -> str:
    """VMCALL on Intel, VMMCALL elsewhere: KVM would rewrite the wrong one, where it can."""
    with open("/proc/cpuinfo") as cpuinfo:
        return "0F 01 C1" if "GenuineIntel" in cpuinfo.read() else "0F 01 D9"


# ---- on the patched KVM -------------------------------------------------------------------------


@pytest.fixture
def calls(guest: RealModeGuest) -> RealModeGuest:
    """VMCALL in a loop of CX turns, its result into [0x6000]."""
    guest.load("""
        89 CF        ; mov di, cx
        89 C5        ; mov bp, ax
        89 E8        ; again: mov ax, bp
        0F 01 C1     ; vmcall
        66 A3 00 60  ; mov [0x6000], eax
        4F           ; dec di
        75 F4        ; jnz again
        F4           ; hlt
    """)
    return guest


def result(guest: RealModeGuest) -> int:
    return int.from_bytes(guest.memory[0x6000:0x6004], "little")


@pytest.mark.elisa
def test_null_hypercall_in_the_kernel(calls: RealModeGuest) -> None:
    stats = calls.vcpu.stats()
    before = stats.value("hypercalls")
    calls.vcpu.set_regs(rax=lib.KVM_HC_ELISA_NULL, rcx=50)
    assert run(calls.vcpu) == Hlt()
    assert result(calls) == 0
    assert stats.value("hypercalls") == before + 50
    assert calls.vcpu.exit_counts().runs == 1  # it never left the kernel


@pytest.mark.elisa
def test_user_hypercalls_are_off_until_enabled(calls: RealModeGuest) -> None:
    calls.vcpu.set_hypercall(0, NULL_HYPERCALL)
    calls.vcpu.set_regs(rax=USER, rcx=1)
    assert run(calls.vcpu) == Hlt()
    assert result(calls) == 2**32 - 1000  # -KVM_ENOSYS
    assert calls.vcpu.exit_counts().hypercalls == {}


@pytest.mark.elisa
def test_native_handler(calls: RealModeGuest) -> None:
    calls.vm.enable_user_hypercalls()
    calls.vcpu.set_hypercall(3, NULL_HYPERCALL)
    calls.vcpu.set_regs(rax=USER + 3, rcx=100)
    assert run(calls.vcpu) == Hlt()
    counts = calls.vcpu.exit_counts()
    assert counts.hypercalls == {3: 100}
    assert counts.native == {"KVM_EXIT_HYPERCALL": 100}
    assert result(calls) == 0


@pytest.mark.elisa
def test_handler_gets_arguments_and_context(calls: RealModeGuest) -> None:
    seen: list[tuple[int, list[int]]] = []

    def handler(context: object, args: object) -> int:
        words = ffi.cast("uint64_t *", args)
        seen.append((int(ffi.cast("uintptr_t", context)), list(words[0:4])))
        return 0xABCD

    pointer = ffi.callback("uint64_t(void *, const uint64_t *)", handler)
    context = ffi.new("int *")
    calls.vm.enable_user_hypercalls()
    calls.vcpu.set_hypercall(15, pointer, context)
    calls.vcpu.set_regs(rax=USER + 15, rbx=1, rcx=1, rdx=3, rsi=4)
    assert run(calls.vcpu) == Hlt()
    assert seen == [(int(ffi.cast("uintptr_t", context)), [1, 1, 3, 4])]
    assert result(calls) == 0xABCD


@pytest.mark.elisa
def test_hypercall_without_a_handler_comes_to_python(calls: RealModeGuest) -> None:
    calls.vm.enable_user_hypercalls()
    calls.vcpu.set_regs(rax=USER + 1, rcx=1, rbx=9)
    found = run(calls.vcpu)
    assert isinstance(found, Hypercall)
    assert (found.number, found.args[0]) == (USER + 1, 9)
    calls.vcpu.reply(77)
    assert run(calls.vcpu) == Hlt()
    assert result(calls) == 77


@pytest.mark.elisa
def test_a_stop_between_hypercalls(calls: RealModeGuest) -> None:
    """A guest that does nothing but call is stopped, and no call is lost or made twice."""
    calls.vm.enable_user_hypercalls()
    calls.vcpu.set_hypercall(0, NULL_HYPERCALL)
    calls.vcpu.set_regs(rax=USER, rcx=3000)
    stops = 0
    while run(calls.vcpu, 0.01) != Hlt():
        stops += 1
        assert stops < 10000
    assert calls.vcpu.exit_counts().hypercalls == {0: 3000}


@pytest.mark.elisa
def test_bad_tables(guest: RealModeGuest) -> None:
    with pytest.raises(IoctlError) as caught:
        guest.vm.create_elisa_context(b"\xff" * 4096, [])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.ioctl == "KVM_ELISA_CREATE_CONTEXT"


@pytest.mark.elisa
def test_bad_slots(guest: RealModeGuest) -> None:
    for slot in (lib.KVM_ELISA_SLOT_DEFAULT, lib.KVM_ELISA_SLOT_TRANSIENT, lib.KVM_ELISA_SLOTS):
        with pytest.raises(IoctlError, match="use slots 2 to 511") as caught:
            guest.vcpu.set_elisa_slot(slot, None)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.elisa
def test_a_context_closes_with_its_vm(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.enable_elisa_contexts()
        guest = RealModeGuest(vm)
        # One page, at GPA 0: entry 0 of every table leads to the next table, the last to page 0.
        tables = bytearray(4 * 4096)
        for table in range(4):
            leaf = table == 3
            entry = 0b001 | 6 << 3 if leaf else 0b111 | (table + 1) << 12
            tables[table * 4096 : table * 4096 + 8] = entry.to_bytes(8, "little")
        pages = [(guest.host_address, lib.KVM_ELISA_PAGE_USER, 0)]
        context = vm.create_elisa_context(tables, pages)
        assert isinstance(context, Context)
        guest.vcpu.set_elisa_slot(2, context)
        guest.vcpu.set_elisa_slot(2, None)
        guest.vcpu.set_elisa_slot(511, context)
    assert context.closed
    context.close()
