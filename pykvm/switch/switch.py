"""A switch in memory that the caller owns: ports come and go, time passes, addresses get pinned.

The host never takes part in forwarding. It writes the geometry, the word of enabled ports and the
epoch, and removes entries of the address table; guests' calls do everything else.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from pykvm.errors import PykvmError
from pykvm.switch._native import ffi, lib
from pykvm.switch.counters import SwitchCounters, read_counters
from pykvm.switch.geometry import SwitchConfig

__all__ = [
    "PortBusyError",
    "PortStateError",
    "Switch",
    "SwitchMemoryError",
    "parse_address",
]

_CACHE_LINE = 64
_POLL_SECONDS = 0.0005


class SwitchMemoryError(PykvmError):
    """A buffer that cannot hold the switch."""


class PortStateError(PykvmError):
    """A port that does not exist, or already is what it was told to become."""


class PortBusyError(PykvmError):
    """A port that stays inside the switch: its vCPU was stopped, or killed, in the middle."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(
            f"port {port} has been inside the switch for {seconds:g} s",
            f"let its guest run on, or end it and call disable({port}, vcpu_gone=True)",
        )
        self.port = port


class AddressError(PykvmError, ValueError):
    """Text that is no Ethernet address of a single station."""


class PinError(PykvmError):
    """An address for which the table has no room left."""


def parse_address(text: str) -> int:
    """Return ``"02:00:00:00:00:01"`` as a number, first byte lowest.

    Raises AddressError for anything else, group addresses and zero included.
    """
    try:
        octets = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        octets = b""
    if len(octets) != 6 or octets[0] & 1 or not any(octets):
        raise AddressError(
            f"{text!r} is no station's address", "write six octets like 02:00:00:00:00:01"
        )
    return int.from_bytes(octets, "little")


class Switch:
    """One switch in `buffer`: shared memory at offset 0, windows from `windows_offset` on.

    `buffer` is writable, starts on a cache line, and is kept referenced: an mmap of the object's
    memfd for guests, any mmap for native use. Everything in the shared part is overwritten.
    `windows_offset` defaults to ``config.windows_offset``. `hash_seed` places addresses in the
    table; it is random unless a test wants the same places every time. Raises SwitchMemoryError.
    """

    def __init__(
        self,
        config: SwitchConfig,
        buffer: Any,
        windows_offset: int | None = None,
        *,
        hash_seed: int | None = None,
    ) -> None:
        self.config = config
        self._windows_offset = config.windows_offset if windows_offset is None else windows_offset
        needed = self._windows_offset + config.ports * config.window_size
        self._memory = buffer
        self._buffer = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
        if len(self._buffer) < needed:
            raise SwitchMemoryError(
                f"this switch takes {needed} bytes, the buffer has {len(self._buffer)}",
                "allocate config.total_size",
            )
        if self._windows_offset < config.shared_size or self._windows_offset % 4096:
            raise SwitchMemoryError(
                f"windows cannot start at {self._windows_offset:#x}", "use config.windows_offset"
            )
        self.address = int(ffi.cast("uintptr_t", self._buffer))
        if self.address % _CACHE_LINE:
            raise SwitchMemoryError(f"the buffer is not {_CACHE_LINE}-byte aligned", "use mmap")
        self._shared = ffi.cast("struct switch_shared *", self._buffer)
        self._windows = self._buffer + self._windows_offset
        self._envs: dict[int, Any] = {}
        lib.switch_initialise(
            self._shared,
            config.ports,
            config.tx_slots,
            config.lane_slots,
            config.frame_limit,
            config.max_age,
            config.group_forward_mask,
            secrets.randbits(64) if hash_seed is None else hash_seed,
        )

    def _check_port(self, port: int) -> None:
        if not 0 <= port < self.config.ports:
            raise PortStateError(
                f"there is no port {port}", f"this switch has 0 to {self.config.ports - 1}"
            )

    def is_enabled(self, port: int) -> bool:
        """Return whether `port` sends and receives."""
        self._check_port(port)
        return bool(self._shared.enabled >> port & 1)

    def enable(self, port: int, timeout: float = 1.0) -> None:
        """Give `port` an empty window and let it send and receive.

        Call it before the port's guest runs: what the window held is erased, so that a new
        guest sees nothing of the one before. Waits, up to `timeout` seconds, for calls of other
        ports that began while the port's previous guest was there.

        Raises PortStateError when it is enabled already, PortBusyError after the timeout.
        """
        if self.is_enabled(port):
            raise PortStateError(f"port {port} is enabled already", f"disable({port}) first")
        self._wait_for_calls(port, timeout)
        lib.switch_enable_port(self._shared, self._windows, self.config.window_size, port)

    def disable(self, port: int, *, vcpu_gone: bool = False) -> None:
        """Let `port` neither send nor receive, and forget the addresses learned behind it.

        A call of another port that is under way may still deliver its burst. Say `vcpu_gone` once
        the port's vCPU can never run again: if it was killed inside the switch, frames that it
        had delivered are shown to their receivers, its counters are made to add up, and nobody
        waits for it any more. Disabling a disabled port does nothing.
        """
        self._check_port(port)
        lib.switch_disable_port(self._shared, port)
        if vcpu_gone:
            lib.switch_port_left(self._shared, self._windows, self.config.window_size, port)

    def _wait_for_calls(self, port: int, timeout: float) -> None:
        """Wait until each call of another port that is inside now has ended."""
        inside = {
            other: lib.switch_port_inside(self._shared, other)
            for other in range(self.config.ports)
            if other != port
        }
        deadline = time.monotonic() + timeout
        for other, sequence in inside.items():
            while sequence and lib.switch_port_inside(self._shared, other) == sequence:
                if time.monotonic() >= deadline:
                    raise PortBusyError(other, timeout)
                time.sleep(_POLL_SECONDS)

    def tick(self) -> None:
        """Let one epoch pass. Call it regularly: every 10 s with max_age 30 keeps 5 minutes."""
        lib.switch_tick(self._shared)

    def pin(self, address: str, port: int) -> None:
        """Bind a station's address to `port` for good, on every VLAN.

        It does not age, and frames that claim it as their source from another port are dropped
        and counted as spoofed. Raises AddressError, PortStateError, PinError.
        """
        self._check_port(port)
        if lib.switch_pin(self._shared, parse_address(address), port) != 0:
            raise PinError(f"no room to pin {address}", "unpin another address first")

    def unpin(self, address: str) -> None:
        """Forget `address` on every VLAN, pinned or learned; it can be learned again.

        Raises AddressError.
        """
        lib.switch_unpin(self._shared, parse_address(address))

    def counters(self) -> SwitchCounters:
        """Return a snapshot of all counters, also while frames flow."""
        return read_counters(self._memory)

    def window(self, port: int) -> Any:
        """`port`'s window as a cffi ``uint8_t *``. Raises PortStateError."""
        self._check_port(port)
        return self._windows + port * self.config.window_size

    def native_env(self, port: int) -> Any:
        """Return a ``struct elisa_env *`` with this process's addresses, for calls on the host.

        It is the context argument of ``switch_hypercall`` for the guest at `port`, and lives as
        long as this object does. Raises PortStateError.
        """
        self._check_port(port)
        if port not in self._envs:
            self._envs[port] = ffi.new(
                "struct elisa_env *",
                {
                    "shared": self.address,
                    "shared_size": self.config.shared_size,
                    "windows": self.address + self._windows_offset,
                    "window_size": self.config.window_size,
                    "id": port,
                    "guests": self.config.ports,
                    "vcpu": 0,
                    "vcpus": 1,
                },
            )
        return self._envs[port]

    @property
    def hypercall(self) -> Any:
        """``uint64_t (*)(void *env, const uint64_t args[6])``: the VMCALL-mediated entry."""
        return ffi.addressof(lib, "switch_hypercall")
