"""pykvm.kvm.x86.vcpu: registers and all other state of a vCPU, written and read back."""

import pytest

from pykvm.kvm import (
    Breakpoint,
    Debug,
    Hlt,
    IoctlError,
    Kvm,
    MpState,
    StateSizeError,
    Struct,
    Translation,
    ffi,
    lib,
)
from tests.rigs.messages import one_line
from tests.rigs.needs import need, need_hardware, refused_without
from tests.rigs.real_mode import CODE, RealModeGuest, run

pytestmark = pytest.mark.kvm


def fields(struct: Struct) -> bytes:
    return ffi.buffer(struct)[:]


def test_regs(guest: RealModeGuest) -> None:
    regs = guest.vcpu.get_regs()
    names = [name for name, _ in ffi.typeof("struct kvm_regs").fields]
    assert len(names) == 18
    for number, name in enumerate(names):
        setattr(regs, name, 0x1111_0000_0000_0000 + number)
    regs.rflags = 2
    guest.vcpu.set_regs(regs)
    assert fields(guest.vcpu.get_regs()) == fields(regs)


def test_single_registers(guest: RealModeGuest) -> None:
    guest.vcpu.set_regs(rax=7, r15=2**64 - 1)
    guest.vcpu.set_regs(rbx=9)
    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.r15, regs.rip) == (7, 9, 2**64 - 1, CODE)
    with pytest.raises(AttributeError):
        guest.vcpu.set_regs(eax=1)
    with pytest.raises(OverflowError):
        guest.vcpu.set_regs(rax=2**64)


def test_registers_reach_the_guest(guest: RealModeGuest) -> None:
    guest.load("01 D8 F4 ; add ax, bx; hlt")
    guest.vcpu.set_regs(rax=40, rbx=2)
    assert run(guest.vcpu) == Hlt()
    assert guest.vcpu.get_regs().rax == 42


def long_mode(guest: RealModeGuest) -> Struct:
    """Return the guest's special registers, changed to long mode, after setting a CPUID for it.

    KVM of Linux 6.12 refuses bits of EFER that the guest's CPUID lacks, with EINVAL.
    """
    guest.vcpu.set_cpuid2(guest.vm.kvm.get_supported_cpuid())
    sregs = guest.vcpu.get_sregs()
    sregs.cr3 = 0x3000
    sregs.cr4 |= 1 << 5  # PAE
    sregs.cr0 |= 1 << 31 | 1  # PG, PE
    sregs.efer |= 1 << 8 | 1 << 10  # LME, LMA
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 0x10
        segment.type = 11 if name == "cs" else 3
        segment.present = segment.s = segment.g = 1
        segment.db, segment.l = (0, 1) if name == "cs" else (1, 0)
    return sregs


def test_sregs(guest: RealModeGuest) -> None:
    sregs = long_mode(guest)
    sregs.gdt.base, sregs.gdt.limit = 0x5000, 0x7F
    sregs.idt.base, sregs.idt.limit = 0x6000, 0xFFF
    guest.vcpu.set_sregs(sregs)
    again = guest.vcpu.get_sregs()
    assert (again.cr3, again.gdt.base, again.gdt.limit) == (0x3000, 0x5000, 0x7F)
    assert (again.idt.base, again.idt.limit, again.cs.l) == (0x6000, 0xFFF, 1)
    assert again.efer & 1 << 10
    assert (again.cr0, again.cr4) == (sregs.cr0, sregs.cr4)


def test_sregs_that_contradict_each_other(guest: RealModeGuest) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.efer |= 1 << 10  # long mode active, without paging
    sregs.cr0 |= 1 << 31  # paging, without protection
    with pytest.raises(IoctlError, match="agree with each other"):
        guest.vcpu.set_sregs(sregs)


def test_sregs2(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_SREGS2")
    sregs = guest.vcpu.get_sregs2()
    assert sregs.cr0 == guest.vcpu.get_sregs().cr0
    sregs.cr3 = 0x5000
    guest.vcpu.set_sregs2(sregs)
    assert guest.vcpu.get_sregs2().cr3 == 0x5000
    assert guest.vcpu.get_sregs().cr3 == 0x5000


def test_fpu(guest: RealModeGuest) -> None:
    fpu = guest.vcpu.get_fpu()
    fpu.fcw = 0x27F
    fpu.mxcsr = 0x1F80
    fpu.xmm[3][0] = 0xAB
    fpu.xmm[15][15] = 0xCD
    guest.vcpu.set_fpu(fpu)
    again = guest.vcpu.get_fpu()
    assert (again.fcw, again.xmm[3][0], again.xmm[15][15]) == (0x27F, 0xAB, 0xCD)


def test_xsave(guest: RealModeGuest) -> None:
    if refused_without(guest.vm, "KVM_CAP_XSAVE", guest.vcpu.get_xsave):
        return
    guest.vcpu.set_cpuid2(guest.vm.kvm.get_supported_cpuid())
    area = bytearray(guest.vcpu.get_xsave())
    assert len(area) >= 4096
    area[512] |= 2  # XSTATE_BV: SSE state is valid (SDM vol. 1, 13.4.2)
    area[160 + 2 * 16 + 1] = 0x77  # XMM2; XMM0 is at byte 160 (table 10-2)
    guest.vcpu.set_xsave(bytes(area))
    assert guest.vcpu.get_xsave()[160 + 2 * 16 + 1] == 0x77
    assert guest.vcpu.get_fpu().xmm[2][1] == 0x77


def test_xcrs(guest: RealModeGuest) -> None:
    if refused_without(guest.vm, "KVM_CAP_XCRS", guest.vcpu.get_xcrs):
        return
    guest.vcpu.set_cpuid2(guest.vm.kvm.get_supported_cpuid())
    xcrs = guest.vcpu.get_xcrs()
    assert xcrs[0] & 1  # x87 state is always enabled
    guest.vcpu.set_xcrs({0: 3})
    assert guest.vcpu.get_xcrs() == {0: 3}
    with pytest.raises(IoctlError):
        guest.vcpu.set_xcrs({0: 0})


def test_debugregs(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_DEBUGREGS")
    regs = guest.vcpu.get_debug_regs()
    regs.db = [0x1000, 0x2000, 0x3000, 0x4000]
    regs.dr7 = 0x400
    guest.vcpu.set_debug_regs(regs)
    assert list(guest.vcpu.get_debug_regs().db) == [0x1000, 0x2000, 0x3000, 0x4000]


def test_events(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_VCPU_EVENTS")
    assert guest.vcpu.get_vcpu_events().nmi.masked == 0
    events = guest.vcpu.get_vcpu_events()
    events.nmi.masked = 1
    events.flags |= lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    guest.vcpu.set_vcpu_events(events)
    assert guest.vcpu.get_vcpu_events().nmi.masked == 1


def test_nmi(guest: RealModeGuest) -> None:
    guest.memory[2 * 4 : 2 * 4 + 4] = b"\x00\x20\x00\x00"  # vector 2 of the IVT: 0000:2000
    guest.load("90 90 F4 ; nop; nop; hlt")
    guest.load("B0 4E E6 10 F4 ; mov al, 'N'; out 0x10, al; hlt", at=0x2000)
    guest.vcpu.nmi()
    assert "out port 0x10" in str(run(guest.vcpu))


def test_interrupt_window(guest: RealModeGuest) -> None:
    """Without an irqchip user space injects; an exit says that the guest enabled interrupts."""
    guest.memory[0x21 * 4 : 0x21 * 4 + 4] = b"\x00\x20\x00\x00"
    guest.load("""
        FA     ; cli
        E6 10  ; out 0x10, al
        FB     ; sti
        90     ; nop
        90     ; nop
        EB FC  ; jmp $-2
    """)
    guest.load("E6 11 F4 ; out 0x11, al; hlt", at=0x2000)
    assert "out port 0x10" in str(run(guest.vcpu))
    assert not guest.vcpu.ready_for_interrupt
    guest.vcpu.request_irq_window(True)
    assert str(run(guest.vcpu)) == "interrupt window open"
    assert guest.vcpu.ready_for_interrupt
    guest.vcpu.request_irq_window(False)
    guest.vcpu.interrupt(0x21)
    assert "out port 0x11" in str(run(guest.vcpu))


def test_mp_state(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        need(vm, "KVM_CAP_MP_STATE")
        vm.create_irqchip()
        first, second = vm.create_vcpu(0), vm.create_vcpu(1)
        assert first.get_mp_state() == MpState.RUNNABLE
        assert second.get_mp_state() == MpState.UNINITIALIZED
        second.set_mp_state(MpState.RUNNABLE)
        assert second.get_mp_state() == MpState.RUNNABLE


def test_mp_state_needs_an_irqchip(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_MP_STATE")
    with pytest.raises(IoctlError, match=r"need create_irqchip\(\)"):
        guest.vcpu.set_mp_state(MpState.UNINITIALIZED)


def test_lapic(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        registers = bytearray(vcpu.get_lapic())
        assert len(registers) == 1024
        registers[0x80] = 0x20  # task priority
        vcpu.set_lapic(bytes(registers))
        assert vcpu.get_lapic()[0x80] == 0x20


def test_no_lapic_without_an_irqchip(guest: RealModeGuest) -> None:
    with pytest.raises(IoctlError, match=r"create_irqchip\(\) before create_vcpu\(\)"):
        guest.vcpu.get_lapic()


def test_tsc(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_GET_TSC_KHZ")
    khz = guest.vcpu.get_tsc_khz()
    assert khz > 1000
    if refused_without(guest.vm, "KVM_CAP_TSC_CONTROL", lambda: guest.vcpu.set_tsc_khz(khz)):
        return
    guest.vcpu.set_tsc_khz(khz)
    assert guest.vcpu.get_tsc_khz() == khz


def test_tsc_offset(guest: RealModeGuest) -> None:
    if not guest.vcpu.has_tsc_offset():
        pytest.skip("this kvm has no attribute KVM_VCPU_TSC_OFFSET")
    need_hardware("offset of the TSC")
    guest.vcpu.set_tsc_offset(-5)
    assert guest.vcpu.get_tsc_offset() == 2**64 - 5


def test_translate(guest: RealModeGuest) -> None:
    assert guest.vcpu.translate_gva(0x1234) == Translation(0x1234, True, False)


def test_translate_follows_page_tables(guest: RealModeGuest) -> None:
    def entry(table: int, index: int, value: int) -> None:
        guest.memory[table + index * 8 : table + index * 8 + 8] = value.to_bytes(8, "little")

    entry(0x3000, 0, 0x4000 | 3)
    entry(0x4000, 0, 0x5000 | 3)
    entry(0x5000, 0, 0x6000 | 3)
    entry(0x6000, 7, 0x9000 | 3)
    sregs = long_mode(guest)
    guest.vcpu.set_sregs(sregs)
    found = guest.vcpu.translate_gva(0x7123)
    assert found is not None
    assert found.physical == 0x9123
    assert guest.vcpu.translate_gva(0x8000) is None


def test_single_step(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_SET_GUEST_DEBUG")
    guest.load("40 40 40 F4 ; inc ax; inc ax; inc ax; hlt")
    guest.vcpu.set_guest_debug(single_step=True)
    found = run(guest.vcpu)
    assert isinstance(found, Debug)
    if found.pc == CODE:  # Bochs traps once more, before the first instruction
        found = run(guest.vcpu)
    for step in (1, 2, 3):
        found = found if step == 1 else run(guest.vcpu)
        assert isinstance(found, Debug)
        assert found.single_step
        assert found.pc == CODE + step
        assert guest.vcpu.get_regs().rax & 0xFFFF == step
    guest.vcpu.set_guest_debug()
    assert run(guest.vcpu) == Hlt()


def test_hardware_breakpoint(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_SET_GUEST_DEBUG")
    guest.load("40 40 40 F4 ; inc ax; inc ax; inc ax; hlt")
    guest.vcpu.set_guest_debug(breakpoints=[Breakpoint(0x9999), Breakpoint(CODE + 2)])
    found = run(guest.vcpu)
    assert isinstance(found, Debug)
    assert found.pc == CODE + 2
    assert found.dr6 & 0xF == 0b10
    guest.vcpu.set_guest_debug()
    assert run(guest.vcpu) == Hlt()
    assert guest.vcpu.get_regs().rax & 0xFFFF == 3


def test_impossible_breakpoints(guest: RealModeGuest) -> None:
    with pytest.raises(ValueError, match="use at most 4"):
        guest.vcpu.set_guest_debug(breakpoints=[Breakpoint(0)] * 5)
    with pytest.raises(ValueError, match="use execute, write or access"):
        guest.vcpu.set_guest_debug(breakpoints=[Breakpoint(0, "read")])


def test_nested_state(guest: RealModeGuest) -> None:
    if refused_without(guest.vm, "KVM_CAP_NESTED_STATE", guest.vcpu.get_nested_state):
        return
    state = guest.vcpu.get_nested_state()
    assert int.from_bytes(state[4:8], "little") == len(state)
    guest.vcpu.set_nested_state(state)


def test_mce(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_MCE")
    guest.vcpu.setup_mce(guest.vm.kvm.get_mce_cap_supported() & ~0xFF | 4)
    assert guest.vcpu.get_msrs([0x179])[0x179] & 0xFF == 4  # IA32_MCG_CAP: banks


def test_states_of_another_length(guest: RealModeGuest) -> None:
    """The kernel reads its own number of bytes, whatever the length passed."""
    need(guest.vm, "KVM_CAP_XSAVE")
    area = guest.vcpu.get_xsave()
    for wrong in (area[:-1], area + bytes(1), b""):
        with pytest.raises(StateSizeError, match=f"pass {len(area)}") as caught:
            guest.vcpu.set_xsave(wrong)
        one_line(caught.value)
    with pytest.raises(StateSizeError, match="pass 1024") as caught:
        guest.vcpu.set_lapic(bytes(1023))
    one_line(caught.value)
    with pytest.raises(StateSizeError, match="extended control registers") as caught:
        guest.vcpu.set_xcrs(dict.fromkeys(range(100), 1))
    one_line(caught.value)
    for wrong in (b"", bytes(64)):  # too short, and another size than its header says
        with pytest.raises(StateSizeError, match="nested state") as caught:
            guest.vcpu.set_nested_state(wrong)
        one_line(caught.value)
