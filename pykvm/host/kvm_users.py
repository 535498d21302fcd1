"""Processes that hold KVM open, for refusals that name them."""

import os
from pathlib import Path

__all__ = ["describe_users"]

# What /proc/PID/fd links to: the device, and the anonymous files of virt/kvm/kvm_main.c.
_LINKS = ("/dev/kvm", "anon_inode:kvm-")


def describe_users(proc: Path = Path("/proc")) -> list[str]:
    """Return who has `/dev/kvm`, a VM or a vCPU open, as `name (pid)`, in order of their ids.

    Without root only the caller's own processes can be seen.
    """
    users = []
    for directory in proc.iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            if _holds_kvm(directory / "fd"):
                name = (directory / "comm").read_text(errors="replace").strip()
                users.append((int(directory.name), name))
        except OSError:  # it has ended meanwhile, or belongs to somebody else
            continue
    return [f"{name} ({pid})" for pid, name in sorted(users)]


def _holds_kvm(descriptors: Path) -> bool:
    for name in os.listdir(descriptors):
        try:
            target = os.readlink(descriptors / name)
        except FileNotFoundError:
            continue
        if target.startswith(_LINKS):
            return True
    return False
