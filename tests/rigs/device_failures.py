"""Failures of a virtio device, waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pykvm.devices.virtio.device import VirtioDevice

__all__ = ["failures_of"]


def failures_of(device: VirtioDevice) -> Callable[[], list[str]]:
    """Return what waits for the first failure of `device`, and returns all until then."""
    seen: list[str] = []
    happened = threading.Event()

    def note(reason: str) -> None:
        seen.append(reason)
        happened.set()

    device.on_failure = note

    def wait() -> list[str]:
        assert happened.wait(10), "the device has not failed"
        return seen

    return wait
