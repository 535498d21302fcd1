"""pykvm.kvm.system: the handle on /dev/kvm, and the errors if it is not usable."""

import errno
import os
from pathlib import Path

import pytest

from pykvm.errors import PykvmError
from pykvm.kvm import (
    CapabilityMissingError,
    HandleClosedError,
    Kvm,
    KvmError,
    KvmMissingError,
    KvmPermissionError,
    NotKvmError,
    lib,
)
from tests.rigs.messages import one_line


@pytest.mark.unit
def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(KvmMissingError) as caught:
        Kvm(tmp_path / "kvm")
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value, PykvmError)
    assert "pykvm doctor" in one_line(caught.value)


@pytest.mark.unit
def test_no_permission(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    user = os.geteuid()
    if user == 0:  # root may open anything
        os.seteuid(65534)
    try:
        with pytest.raises(KvmPermissionError) as caught:
            Kvm(device)
    finally:
        os.seteuid(user)
    assert caught.value.errno == errno.EACCES
    assert "pykvm doctor" in one_line(caught.value)


@pytest.mark.unit
def test_not_the_device() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(NotKvmError) as caught:
        Kvm("/dev/null")
    assert "/dev/null" in one_line(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.unit
def test_a_directory_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(KvmError) as caught:
        Kvm(tmp_path)
    assert caught.value.errno == errno.EISDIR
    one_line(caught.value)


@pytest.mark.kvm
def test_closing_twice() -> None:
    kvm = Kvm()
    fd = kvm.fileno()
    kvm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    # The number now belongs to another file: the second close must not touch it.
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, fd)
    try:
        kvm.close()
        os.fstat(fd)
    finally:
        os.close(fd)
        if other != fd:
            os.close(other)
    assert kvm.closed
    with pytest.raises(HandleClosedError, match="create another one"):
        kvm.create_vm()


@pytest.mark.kvm
def test_a_forgotten_handle_is_closed_and_reported() -> None:
    kvm = Kvm()
    fd = kvm.fileno()
    with pytest.warns(ResourceWarning, match="unclosed <Kvm"):
        del kvm
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.kvm
def test_extensions(kvm: Kvm) -> None:
    extensions = kvm.extensions()
    assert extensions["KVM_CAP_USER_MEMORY"] == 1
    assert extensions["KVM_CAP_NR_MEMSLOTS"] >= 32
    assert extensions["KVM_CAP_IMMEDIATE_EXIT"] == 1
    assert "KVM_CAP_S390_PSW" not in extensions or extensions["KVM_CAP_S390_PSW"]
    assert kvm.check_extension("KVM_CAP_USER_MEMORY") == kvm.check_extension(
        lib.KVM_CAP_USER_MEMORY
    )
    with pytest.raises(CapabilityMissingError) as caught:
        kvm.check_extension("KVM_CAP_NO_SUCH_THING")
    assert caught.value.capability == "KVM_CAP_NO_SUCH_THING"
    one_line(caught.value)


@pytest.mark.kvm
def test_a_missing_capability_is_named(kvm: Kvm) -> None:
    assert not kvm.check_extension("KVM_CAP_S390_UCONTROL")
    with pytest.raises(CapabilityMissingError, match=r"a test needs KVM_CAP_S390_UCONTROL"):
        kvm.require("KVM_CAP_S390_UCONTROL", "a test")


@pytest.mark.kvm
def test_vcpu_mmap_size(kvm: Kvm) -> None:
    size = kvm.get_vcpu_mmap_size()
    assert size % 4096 == 0
    assert size >= 4096
