"""pykvm.elisa.exits: the patch's exit, decoded and as a sentence."""

import subprocess
import sys

import pytest

from pykvm.elisa.exits import ElisaExit
from pykvm.kernel import uapi
from pykvm.kernel.uapi import lib
from pykvm.kvm import Exit, ffi
from pykvm.kvm import lib as kvm_lib
from pykvm.kvm.native.decoders import decode_exit, exit_name

pytestmark = pytest.mark.unit


def decoded(**fields: int) -> Exit:
    """Decode a kvm_run with these fields in a buffer of two pages, the size of the kernel's."""
    area = ffi.new("char[]", 8192)
    run = ffi.cast("struct kvm_run *", area)
    run.exit_reason = lib.KVM_EXIT_ELISA
    union = uapi.ffi.cast("struct kvm_elisa_exit *", kvm_lib.pykvm_exit_payload(run))
    for name, value in fields.items():
        setattr(union, name, value)
    return decode_exit(run)


def test_whoever_uses_contexts_gets_the_exit() -> None:
    """Any import of the package registers the decoder."""
    code = "import pykvm.elisa.calls, sys; assert 'pykvm.elisa.exits' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_name() -> None:
    assert exit_name(lib.KVM_EXIT_ELISA) == "KVM_EXIT_ELISA"


def test_violation_reads_as_a_sentence() -> None:
    found = decoded(
        cause=lib.KVM_ELISA_EXIT_VIOLATION,
        at=lib.KVM_ELISA_AT_SUB,
        slot=2,
        vmx_exit_reason=48,
        qualification=0b1_1000_1010,  # write; page readable; GVA valid; not from a page walk
        gpa=0x4000001000,
        gva=0x7000,
        rip=0x100002000,
    )
    assert isinstance(found, ElisaExit)
    assert found.access == "write"
    assert str(found) == (
        "ept violation in the sub context of slot 2 at rip 0x100002000: "
        "write of GPA 0x4000001000 (GVA 0x7000), the page allows r--"
    )


def test_vmfunc_and_refused() -> None:
    vmfunc = decoded(
        cause=lib.KVM_ELISA_EXIT_VMFUNC,
        at=lib.KVM_ELISA_AT_DEFAULT,
        rip=0x1000,
        index=17,
    )
    assert str(vmfunc) == "failed vmfunc in the default context at rip 0x1000: vmfunc(0x0, 0x11)"
    refused = decoded(
        cause=lib.KVM_ELISA_EXIT_REFUSED,
        at=lib.KVM_ELISA_AT_GATE,
        slot=3,
        vmx_exit_reason=10,
    )
    assert "refused exit in the gate context of slot 3" in str(refused)
    assert "cpuid (vmx reason 10)" in str(refused)
    assert "elisa exit 9" in str(decoded(cause=9))
