"""pykvm.kvm.native.decoders and pykvm.kvm.x86.exits: also exits that no test guest can cause."""

import pytest

from pykvm.kvm import (
    BusLock,
    Debug,
    Exit,
    FailEntry,
    GuestException,
    Hypercall,
    InternalError,
    InternalErrorKind,
    Intr,
    Io,
    IoapicEoi,
    MmioRead,
    MmioWrite,
    Nmi,
    Notify,
    Rdmsr,
    SetTpr,
    Struct,
    SystemEvent,
    SystemEventKind,
    TprAccess,
    Unknown,
    Unsupported,
    Wrmsr,
    exit_name,
    ffi,
    lib,
)
from pykvm.kvm.native.decoders import decode_exit

pytestmark = pytest.mark.unit


def decoded(number: int, /, ctype: str = "", **fields: object) -> Exit:
    """Decode a kvm_run with these fields in a buffer of two pages, the size of the kernel's."""
    area = ffi.new("char[]", 8192)
    run = ffi.cast("struct kvm_run *", area)
    run.exit_reason = number
    if ctype:
        union = ffi.cast(ctype, lib.pykvm_exit_payload(run))
        for name, value in fields.items():
            setattr(union, name, value)
    return decode_exit(run)


def test_unknown_number_is_kept() -> None:
    found = decoded(77, "kvm_exit_hw *", hardware_exit_reason=0x1122)
    assert isinstance(found, Unsupported)
    assert found.number == 77
    assert len(found.payload) == 64
    assert int.from_bytes(found.payload[:8], "little") == 0x1122
    assert "77" in str(found)
    assert decoded(2**32 - 1) == Unsupported(2**32 - 1, bytes(64))


def test_known_to_the_header_but_not_decoded() -> None:
    found = decoded(lib.KVM_EXIT_WATCHDOG)
    assert isinstance(found, Unsupported)
    assert "KVM_EXIT_WATCHDOG" in str(found)


def test_names() -> None:
    assert exit_name(lib.KVM_EXIT_HLT) == "KVM_EXIT_HLT"
    assert exit_name(0) == "KVM_EXIT_UNKNOWN"  # not KVM_EXIT_IO_IN, which is 0 too
    assert exit_name(12345) == "exit reason 12345"


def test_plain_exits() -> None:
    for reason, kind in (
        (lib.KVM_EXIT_INTR, Intr),
        (lib.KVM_EXIT_NMI, Nmi),
        (lib.KVM_EXIT_SET_TPR, SetTpr),
        (lib.KVM_EXIT_X86_BUS_LOCK, BusLock),
    ):
        assert type(decoded(reason)) is kind


def test_fields() -> None:
    assert decoded(0, "kvm_exit_hw *", hardware_exit_reason=65) == Unknown(65)
    assert decoded(
        lib.KVM_EXIT_FAIL_ENTRY, "kvm_exit_fail_entry *", hardware_entry_failure_reason=0x80000021
    ) == FailEntry(0x80000021, 0)
    assert decoded(
        lib.KVM_EXIT_EXCEPTION, "kvm_exit_ex *", exception=14, error_code=2
    ) == GuestException(14, 2)
    assert decoded(
        lib.KVM_EXIT_HYPERCALL, "kvm_exit_hypercall *", nr=12, args=[1, 2, 3], longmode=1
    ) == Hypercall(12, (1, 2, 3, 0, 0, 0), True)
    assert decoded(
        lib.KVM_EXIT_TPR_ACCESS, "kvm_exit_tpr_access *", rip=0x10, is_write=1
    ) == TprAccess(0x10, True)
    assert decoded(lib.KVM_EXIT_IOAPIC_EOI, "kvm_exit_eoi *", vector=0x41) == IoapicEoi(0x41)
    assert decoded(lib.KVM_EXIT_X86_WRMSR, "kvm_exit_msr *", index=0x10, data=5, reason=2) == Wrmsr(
        0x10, 5, 2
    )
    assert decoded(lib.KVM_EXIT_X86_RDMSR, "kvm_exit_msr *", index=0x10, reason=4) == Rdmsr(0x10, 4)
    assert decoded(lib.KVM_EXIT_NOTIFY, "kvm_exit_notify *", flags=1) == Notify(1)


def test_mmio() -> None:
    union = "kvm_exit_mmio *"
    write = decoded(
        lib.KVM_EXIT_MMIO, union, phys_addr=0xFEC0, data=list(range(1, 9)), len=4, is_write=1
    )
    assert write == MmioWrite(0xFEC0, b"\1\2\3\4")
    assert isinstance(write, MmioWrite)
    assert write.value == 0x04030201
    read = decoded(lib.KVM_EXIT_MMIO, union, phys_addr=0xFEC0, len=8, is_write=0)
    assert read == MmioRead(0xFEC0, 8)


def test_io_takes_data_from_its_offset() -> None:
    area = ffi.new("char[]", 8192)
    run = ffi.cast("struct kvm_run *", area)
    run.exit_reason = lib.KVM_EXIT_IO
    io: Struct = ffi.cast("kvm_exit_io *", lib.pykvm_exit_payload(run))
    io.direction, io.size, io.port, io.count, io.data_offset = 1, 2, 0x3F8, 3, 4096
    ffi.buffer(area)[4096:4102] = b"abcdef"
    found = decode_exit(run)
    assert found == Io(0x3F8, 2, 3, True, b"abcdef")
    assert isinstance(found, Io)
    assert found.value == int.from_bytes(b"ab", "little")
    assert "x3" in str(found)


def test_debug() -> None:
    area = ffi.new("char[]", 8192)
    run = ffi.cast("struct kvm_run *", area)
    run.exit_reason = lib.KVM_EXIT_DEBUG
    union: Struct = ffi.cast("kvm_exit_debug *", lib.pykvm_exit_payload(run))
    union.arch.exception, union.arch.pc, union.arch.dr6 = 1, 0x1000, 1 << 14
    found = decode_exit(run)
    assert found == Debug(1, 0x1000, 1 << 14, 0)
    assert isinstance(found, Debug)
    assert found.single_step


def test_internal_error_with_instruction() -> None:
    words = [1, int.from_bytes(b"\3\x0f\x01\xd4\0\0\0\0", "little"), 0]
    found = decoded(
        lib.KVM_EXIT_INTERNAL_ERROR,
        "kvm_exit_internal *",
        suberror=lib.KVM_INTERNAL_ERROR_EMULATION,
        ndata=3,
        data=words,
    )
    assert isinstance(found, InternalError)
    assert found.suberror == InternalErrorKind.EMULATION
    assert found.instruction == b"\x0f\x01\xd4"
    assert "0f 01 d4" in str(found)


def test_internal_error_of_a_newer_kernel() -> None:
    found = decoded(
        lib.KVM_EXIT_INTERNAL_ERROR, "kvm_exit_internal *", suberror=99, ndata=2000, data=[7]
    )
    assert isinstance(found, InternalError)
    assert found.data == (7, *[0] * 15)
    assert found.instruction == b""
    assert "suberror 99" in str(found)


def test_system_event() -> None:
    union = "kvm_exit_system_event *"
    reset = decoded(lib.KVM_EXIT_SYSTEM_EVENT, union, type=lib.KVM_SYSTEM_EVENT_RESET, ndata=1)
    assert reset == SystemEvent(SystemEventKind.RESET, (0,))
    assert "reset" in str(reset)
    assert str(decoded(lib.KVM_EXIT_SYSTEM_EVENT, union, type=200)) == "system event 200"
