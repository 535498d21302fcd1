"""Search for the processes that keep KVM from being unloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm.host.kvm_users import describe_users


def _process(proc: Path, pid: int, name: str, *links: str) -> None:
    descriptors = proc / str(pid) / "fd"
    descriptors.mkdir(parents=True)
    (proc / str(pid) / "comm").write_bytes(os.fsencode(name) + b"\n")
    for number, target in enumerate(links):
        (descriptors / str(number)).symlink_to(target)


@pytest.mark.unit
def test_users_are_told_by_their_descriptors(tmp_path: Path) -> None:
    _process(tmp_path, 30, "qemu", "/dev/null", "anon_inode:kvm-vm")
    _process(tmp_path, 4, "doctor", "/dev/kvm")
    _process(tmp_path, 5, "vcpu only", "anon_inode:kvm-vcpu:0")
    _process(tmp_path, 6, "bystander", "/dev/null", "anon_inode:[eventfd]", "/home/dev/kvm")
    (tmp_path / "meminfo").touch()
    (tmp_path / "7").mkdir()  # ended between the two reads
    assert describe_users(tmp_path) == ["doctor (4)", "vcpu only (5)", "qemu (30)"]


@pytest.mark.unit
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    _process(tmp_path, 8, "caf\udcff", "/dev/kvm")
    assert describe_users(tmp_path) == ["caf\ufffd (8)"]


@pytest.mark.kvm
def test_a_real_user_is_found() -> None:
    script = "import os; os.open('/dev/kvm', os.O_RDWR); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        found = [text for text in describe_users() if text.endswith(f"({user.pid})")]
        name = Path(f"/proc/{user.pid}/comm").read_text().strip()
        user.communicate(b"\n")
    assert found == [f"{name} ({user.pid})"]
    assert not [text for text in describe_users() if text.endswith(f"({user.pid})")]
    assert not [text for text in describe_users() if text.endswith(f"({os.getpid()})")]
