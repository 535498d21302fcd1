"""Kernel modules that tests need on an emulated host, where nobody has loaded them."""

import subprocess

from pykvm.host.emulation import is_emulated

__all__ = ["load_inside"]


def load_inside(*names: str) -> None:
    """Load modules on an emulated host; a user's host keeps what it has."""
    if is_emulated():
        subprocess.run(["modprobe", "-a", *names], check=True)
