"""Two Linux guests on one bridge: ping, a file over HTTP, and memcached, over virtio-net."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from pykvm.errors import PykvmError

__all__ = ["KINDS", "PairError", "measure_pair"]

KINDS: Final = {
    "ping": "echo, there and back",
    "http": "a file of 256 KiB over HTTP",
    "set": "memcached: set of 100 bytes",
    "get": "memcached: get of 100 bytes",
}
"""Requests of the client, and a description of each."""

_INSIDE: Final = Path(__file__).with_name("inside")
_BRIDGE: Final = "pykvm-demo"
_HOST: Final = "10.188.0.1"
_FILE_BYTES: Final = 256 << 10
_SEED: Final = 7
_PINGS: Final = 5
_FETCHES: Final = 3
_PATIENCE: Final = 1800.0  # seconds; a boot takes a minute on the emulated host


class PairError(PykvmError):
    """A guest that did not do what it was told."""


def measure_pair(requests: int, memory: str) -> dict[str, Any]:
    """Start both guests, let one use the other, and return what that took.

    Args:
        requests: sets, and gets, of memcached.
        memory: memory of a guest, as `--memory` takes it.

    Returns:
        By name of `KINDS`: "sent", "right" (answers whose bytes were the expected ones), "each"
        (nanoseconds of the client's clock) and "median".

    Raises:
        PairError: a guest could not be started, or has failed.
    """
    with ExitStack() as stack:
        words = [str(_FILE_BYTES), str(_SEED)]
        server = _start(stack, "server", memory, [*words, _HOST])
        counts = [str(count) for count in (_PINGS, _FETCHES, requests)]
        client = _start(stack, "client", memory, [*words, *counts])
        assert server.stdout
        address = server.stdout.readline().strip()
        if not address:
            raise PairError(
                f"the guest that serves has ended with status {server.wait()}",
                "see what it says above, or in the kernel's log if it says nothing",
            )
        try:
            said, _ = client.communicate(f"{address}\n", timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise PairError("the guests do not finish", "try again") from error
        if client.returncode:
            raise PairError(
                f"the guest that asks ended with status {client.returncode}",
                "see what it says above",
            )
        report: dict[str, Any] = json.loads(said.splitlines()[-1])
    for found in report.values():
        found["median"] = statistics.median(found["each"]) if found["each"] else 0
    return report


def _start(stack: ExitStack, role: str, memory: str, words: list[str]) -> subprocess.Popen[str]:
    program = (_INSIDE / f"{role}.py").read_text()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pykvm", "run", "--name", f"demo-{role}", "--memory", memory),
            *("--net", f"tap,bridge={_BRIDGE},address={_HOST}/24"),
            *("--", "/usr/bin/python3", "-c", program, *words),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    """End a guest: by the end of its input, or else as it is."""
    with suppress(OSError, ValueError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    if process.stdout:
        process.stdout.close()
