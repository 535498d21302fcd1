"""The processor as /proc/cpuinfo and the VMX capability MSRs describe it."""

import os
import subprocess
from pathlib import Path

import pytest

from pykvm.host.processor import MsrUnreadableError, VmxCapabilities, read_msr, read_processor
from pykvm.kernel import modules

INTEL = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Core(TM) i7-7800X CPU @ 3.50GHz
stepping\t: 4
microcode\t: 0x2000043
flags\t\t: fpu vme vmx smx
vmx flags\t: vnmi ept vpid

processor\t: 1
vendor_id\t: Other
"""


@pytest.mark.unit
def test_first_processor_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(INTEL)
    processor = read_processor(file)
    assert processor.is_intel
    assert processor.has_vmx
    assert (processor.family, processor.model, processor.stepping) == (6, 85, 4)
    assert processor.name == "Intel(R) Core(TM) i7-7800X CPU @ 3.50GHz"
    assert processor.microcode == "0x2000043"


@pytest.mark.unit
def test_missing_words_are_empty(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu svm\n")
    processor = read_processor(file)
    assert not processor.is_intel
    assert not processor.has_vmx
    assert (processor.name, processor.model) == ("", -1)


@pytest.mark.unit
def test_capability_bits_are_decoded() -> None:
    # Values of a Skylake server; bit 45 of the secondary controls is "enable VM functions".
    vmx = VmxCapabilities(
        feature_control=0x5,
        procbased=0xFFF9FFFE0401E172,
        procbased2=0x00157FFF00000000 | 1 << 45,
        ept_vpid=0xF0106734141,
        vmfunc=1,
    )
    assert vmx.enabled_by_firmware
    assert vmx.vm_functions
    assert vmx.eptp_switching
    features = vmx.ept_features()
    assert features["execute-only"]
    assert features["4 levels"]
    assert not features["5 levels"]
    assert features["INVEPT of all contexts"]


@pytest.mark.unit
@pytest.mark.parametrize(("value", "enabled"), [(0, True), (1, False), (4, True), (5, True)])
def test_firmware_lock(value: int, enabled: bool) -> None:
    assert VmxCapabilities(value, 0, 0, 0, 0).enabled_by_firmware is enabled


@pytest.mark.unit
def test_a_processor_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(MsrUnreadableError, match=r"modprobe msr|pykvm testbed|run this as root"):
        read_msr(0x3A, cpu=4095)


@pytest.mark.elisa
def test_this_processor_switches_eptps() -> None:
    # KVM offers ELISA only if the processor has EPTP switching: two independent sources.
    assert modules.elisa_version() > 0
    assert os.geteuid() == 0, "reading MSRs takes root"
    subprocess.run(["/sbin/modprobe", "msr"], check=True)
    vmx = VmxCapabilities.read()
    assert vmx.enabled_by_firmware
    assert vmx.vm_functions
    assert vmx.eptp_switching
    assert vmx.ept_features()["4 levels"]
