"""pykvm.kvm.ioctls: the table against the header and against the code that uses it."""

import errno
import re
from pathlib import Path

import pytest

import pykvm.kvm
from pykvm.kvm import IOCTLS, IoctlError, lib
from pykvm.kvm.ioctls import Scope

pytestmark = pytest.mark.unit

_SOURCES = sorted(Path(pykvm.kvm.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("entry", IOCTLS.values(), ids=lambda entry: entry.name)
def test_entry(entry: object) -> None:
    assert isinstance(entry, pykvm.kvm.ioctls.Ioctl)
    number = getattr(lib, entry.name)
    assert number >> 8 & 0xFF == 0xAE  # KVMIO
    assert entry.scopes
    for scope in Scope:
        needed = entry.needs(scope)
        if needed is not None and scope in entry.scopes:
            assert isinstance(needed, str), "stock KVM's, which the header knows by name"
            assert isinstance(getattr(lib, needed), int)
    for error in (errno.EINVAL, errno.E2BIG, errno.ENOSPC, errno.EMFILE):
        assert "\n" not in (entry.next_step(error) or "")


def test_numbers_are_the_kernels() -> None:
    assert lib.KVM_GET_API_VERSION == 0xAE00
    assert lib.KVM_RUN == 0xAE80
    assert lib.KVM_SET_USER_MEMORY_REGION == 0x4020AE46


def test_no_two_calls_of_a_scope_share_a_number() -> None:
    for scope in Scope:
        numbers = [getattr(lib, e.name) for e in IOCTLS.values() if scope in e.scopes]
        assert len(numbers) == len(set(numbers)), scope


def test_code_and_table_agree() -> None:
    text = "\n".join(p.read_text() for p in _SOURCES if p.name not in ("ioctls.py", "build_kvm.py"))
    used = set(re.findall(r'"(KVM_[A-Z0-9_]+)"', text))
    used = {name for name in used if not name.startswith(("KVM_CAP_", "KVM_EXIT_"))}
    used = {name for name in used if not name.endswith("_")}  # prefixes of constants
    assert used - IOCTLS.keys() == set()
    assert IOCTLS.keys() - used == set(), "entries that nothing uses"


def test_a_hint_about_arguments_is_not_given_for_other_errors() -> None:
    """Too many open files are not caused by a vCPU's id."""
    entry = IOCTLS["KVM_CREATE_VCPU"]
    assert "vcpu id" in (entry.next_step(errno.EEXIST) or "")
    assert entry.next_step(errno.EMFILE) is None
    assert "ulimit -n" in IoctlError(entry.name, errno.EMFILE).next_step


def test_steps_by_errno() -> None:
    entry = IOCTLS["KVM_SET_CPUID2"]
    assert entry.next_step(errno.EINVAL) != entry.next_step(errno.E2BIG)
    assert entry.next_step(errno.EFAULT) is None
